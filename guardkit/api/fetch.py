"""Fetching an encoder once, into a folder that can be copied and needs no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from guardkit.checks import check_path
from guardkit.encoders.base import Encoder, Portable
from guardkit.folders import claim, refuse_others
from guardkit.schema import InputError

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # of a model, whichever library it is for
_TEXT = "A photo of two dogs, outdoors."
_TOLERANCE = 1e-5  # of a coordinate of a unit vector


def fetch_encoder(encoder: Encoder, output_dir: str | Path) -> Encoder:
    """Writes a model with all that belongs to it into a folder, and checks that it is the same model from there.

    Args:
        encoder: whose weights may still have to be fetched, from the Hub or elsewhere.
        output_dir: of the model. An earlier model in it is replaced, once the new one was fetched.
    Returns:
        The encoder that the folder gives. A guard that was trained on the one is loaded with the other.
    Raises:
        InputError: the model cannot be had, or not be written for use without a network; the folder belongs to something
            else; or what was written gives other vectors.
    """
    folder = check_path("output_dir", output_dir)
    if not isinstance(encoder, Portable):
        raise InputError(
            f"encoder {encoder.name} cannot be written into a folder; copy its files, or take encoder=open_clip or transformers"
        )
    refuse_others(folder, "fetch", replaces=True)
    if encoder.reads(folder):
        raise InputError(f"encoder {encoder.name} is read from {folder} itself; choose another output_dir")
    fingerprint, expected = encoder.fingerprint, _vectors(encoder)
    with claim(folder, "fetch", {"encoder": encoder.config, "fingerprint": fingerprint}, replaces=_FILES):
        copy = encoder.save(folder)
        found = _vectors(copy)
        if copy.fingerprint != fingerprint or not all(
            np.allclose(found[kind], expected[kind], rtol=0, atol=_TOLERANCE) for kind in expected
        ):
            far = ", ".join(f"{kind} differs by up to {np.abs(found[kind] - expected[kind]).max():.1g}" for kind in expected)
            raise InputError(f"what was written to {folder} is not the model {encoder.name} (the vector of an {far}); fetch it again")
    return copy


def _vectors(encoder: Encoder) -> dict[str, np.ndarray]:
    """Of an image and, where the encoder reads texts, of a text: (1, d) each."""
    rows, columns = np.mgrid[:48, :64]
    image = np.stack([rows * 5, columns * 4, (rows * columns) % 256], axis=-1).astype(np.uint8)
    vectors = {"image": encoder.encode_images([image])}
    encode_texts = getattr(encoder, "encode_texts", None)
    return vectors if encode_texts is None else vectors | {"text": encode_texts([_TEXT])}
