"""A guard in ONNX: its head alone, and encoder and head."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guardkit import __version__
from guardkit.checks import check_path, is_list
from guardkit.classifier import GuardClassifier
from guardkit.encoders.base import Traceable
from guardkit.encoders.lookup import ENCODER_KINDS
from guardkit.encoders.places import LOCAL
from guardkit.encoders.ways import N_DRAWN, in_float32, moved_by
from guardkit.exporting.modules import HeadScores, ImageScores
from guardkit.exporting.onnx_files import TOLERANCE, check_installed, standardised_pixels, unit_vectors, write_onnx
from guardkit.folders import claim, refuse_others
from guardkit.schema import InputError

log = logging.getLogger(__name__)

PARTS = ("head", "guard")
WRITTEN = ("head.onnx", "head.onnx.data", "guard.onnx", "guard.onnx.data")
_HEAD_ALONE = "export the head alone with parts=[head], and run it on the encoder's embeddings"


@dataclass(frozen=True)
class ExportReport:
    """What an export gives.

    Attributes:
        files: part -> its file.
        differences: part -> the largest difference of a probability between ONNX Runtime and torch, in batches of 1, 2 and 7.
        folder: that holds them.
    """

    files: dict[str, Path]
    differences: dict[str, float]
    folder: Path

    @property
    def table(self) -> str:
        """A line for each file, to print."""
        return "\n".join(
            f"  {path.name:<11} {path.stat().st_size / 1e6:.1f} MB, differs from torch by at most {self.differences[part]:.0e} "
            f"(allowed: {TOLERANCE:g})"
            for part, path in self.files.items()
        )


def export_guard(
    guard: GuardClassifier | str | Path,
    output_dir: str | Path,
    *,
    parts: Sequence[str] = PARTS,
    trust: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Writes a guard as ONNX for other runtimes, and checks that ONNX Runtime gives the scores of `GuardClassifier.predict`.

    The same as `python -m guardkit.export`. `head.onnx` takes `embeddings`, (n, d) float32 unit vectors of the guard's encoder; `guard.onnx`
    takes `pixels`, (n, 3, height, width) float32, prepared as its metadata says. Both give `score`, (n,) probability of unsafe, and
    `categories`, (n, k), calibration included; NaN is no score, and means an error. n is whatever the caller likes. The metadata, JSON each,
    says the rest: preprocessing, categories, thresholds, policy, fingerprints, licences. Thresholds are not applied: docs/sharing.md shows
    how. Files compute in float32; of an encoder that does not, a warning says how far scores moved.

    Args:
        guard: a `GuardClassifier`, or the folder or Hub id of a saved one, which is loaded on the processor.
        output_dir: of the files. Those of an earlier export are replaced.
        parts: "head", "guard" or both.
        trust: packages that a saved guard may take its head and encoder from.
        settings: of a command, for the mark of the folder.
    Raises:
        InputError: a package is missing, torch cannot export head or encoder, or the file gives scores that differ by more than 1e-4,
            or 1 %, from torch's; a file that does is not kept.
    """
    if not is_list(parts) or not parts or not set(parts) <= set(PARTS):
        raise InputError(f"parts must be a list of {' and '.join(PARTS)}, got {parts!r}")
    check_installed()
    folder = check_path("output_dir", output_dir)
    refuse_others(folder, "export", replaces=True)
    if not isinstance(guard, GuardClassifier):
        guard = GuardClassifier.from_pretrained(guard, trust=trust, device="cpu")
    if "guard" in parts:
        _check_encoder(guard)
    marked = dict(settings) if settings is not None else {"guard": guard.fingerprint, "parts": sorted(set(parts))}
    differences = {}
    with claim(folder, "export", marked, replaces=WRITTEN):
        for part in PARTS:
            if part in parts:
                differences[part] = _write_head(guard, folder) if part == "head" else _write_guard(guard, folder)
    return ExportReport({part: folder / f"{part}.onnx" for part in differences}, differences, folder)


def _check_encoder(guard: GuardClassifier) -> None:
    if not isinstance(guard.encoder, Traceable):
        raise InputError(f"encoder {guard.encoder.name} is no model that torch could export to ONNX; {_HEAD_ALONE}")


def _write_head(guard: GuardClassifier, folder: Path) -> float:
    dim = guard.encoder.dim
    return write_onnx(
        folder / "head.onnx",
        HeadScores(guard),
        given="embeddings",
        example=lambda n: unit_vectors(n, dim),
        expected=guard.probabilities,
        metadata=_metadata(guard) | {"input": {"name": "embeddings", "shape": ["batch", dim], "is_unit_length": True}},
        what=f"the guard's head of kind {guard.head.kind}",
        instead="use the guard in Python, or train one with a head of guardkit's",
    )


def _write_guard(guard: GuardClassifier, folder: Path) -> float:
    encoder = in_float32(guard.encoder)
    assert isinstance(encoder, Traceable)
    if encoder is not guard.encoder:
        log.warning(
            "guard.onnx computes in float32, and encoder %s of guard %s in bfloat16: on %d drawn images scores moved by up to %.4f",
            encoder.name,
            guard.name,
            N_DRAWN,
            moved_by(guard.probabilities, guard.encoder, encoder),
        )
    size = encoder.preprocessing["size"]

    def by_torch(pixels: np.ndarray) -> np.ndarray:
        import torch

        return guard.probabilities(encoder.encode_preprocessed(list(torch.from_numpy(pixels))))

    return write_onnx(
        folder / "guard.onnx",
        ImageScores(guard, encoder.image_module()),
        given="pixels",
        example=lambda n: standardised_pixels(n, size),
        expected=by_torch,
        metadata=_metadata(guard) | {"input": {"name": "pixels", "shape": ["batch", 3, *size]}},
        what=f"encoder {encoder.name} with the guard's head",
        instead=_HEAD_ALONE,
    )


def _metadata(guard: GuardClassifier) -> dict[str, Any]:
    """What a program that has nothing but the file needs to know, in plain JSON types."""
    encoder = guard.encoder
    return {
        "guardkit": __version__,
        "guard": {"name": guard.name, "fingerprint": guard.fingerprint, "head": guard.head.kind},
        "encoder": {
            "name": _without_place(encoder.name),
            "kind": ENCODER_KINDS.name(type(encoder)),
            "dim": encoder.dim,
            "fingerprint": encoder.fingerprint,
        },
        "preprocessing": _preprocessing(encoder.preprocessing, rounds_down=ENCODER_KINDS.name(type(encoder)) == "transformers"),
        "policy": {"name": guard.policy.name, "digest": guard.policy.digest},
        "categories": list(guard.policy.category_names),
        "thresholds": guard.thresholds.to_dict(),
        "promises": [] if guard.calibration is None else guard.calibration.promises,
        "licences": guard.all_licences,
    }


def _without_place(name: str) -> str:
    """An encoder's name; of a folder or file of this machine the last part alone, because the exported file is for others."""
    place = Path(name.removeprefix(LOCAL)).expanduser()
    return place.name if name.startswith(LOCAL) or place.exists() else name


def _preprocessing(said: Mapping[str, Any], *, rounds_down: bool) -> dict[str, Any]:
    """An encoder's preprocessing with what guardkit's own encoders leave unsaid, because `prepare_image` does it."""
    whole = {
        "resize": list(said["size"]),
        "resize_library": said.get("backend", "pil"),
        "crop": "center",
        # of an odd number of rows or columns too many, see `prepare_pixels`
        "crop_rounding": "down" if rounds_down else "even",
        "padding": 0,
        "channels": "RGB",
        "layout": "NCHW",
        "pixel_range": [0, 1],
    }
    return whole | dict(said)
