"""`GuardClassifier`: an encoder, a head, thresholds and the policy they enforce. The thing other code imports."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from guardkit import __version__
from guardkit.artifacts import fingerprint, hash_file, write_json, written
from guardkit.encoders.base import Encoder
from guardkit.heads import HEADS, Head
from guardkit.images import read_image
from guardkit.policy import Policy
from guardkit.schema import Decision, ImageError, InputError, Judgment
from guardkit.seen import FILE as _SEEN
from guardkit.seen import SeenImages

FORMAT = 1
ImageLike = str | Path | bytes | Image.Image | np.ndarray
_CONFIG, _WEIGHTS, _POLICY = "config.json", "model.safetensors", "policy.yaml"


class GuardClassifier:
    """Tells images that a policy forbids from those it allows. Meets the `Guard` protocol.

    Args:
        head: trained, (n, d) -> (n, 1 + k) logits.
        encoder: whose embeddings the head takes.
        policy: with k categories.
        threshold: flag when score >= threshold.
        operating_points: named thresholds and what they gave on validation images.
        training: facts of the training, plain JSON (prevalence, label budget).
        metrics: measured on a test set, plain JSON.
        training_images: those it was trained and validated on, so that it is tested on others; None: nobody knows.

    Attributes:
        name: for tables: the experiment it was trained in, else the kind of its head.
    """

    is_normalized = True

    def __init__(
        self,
        head: Head,
        encoder: Encoder,
        policy: Policy,
        *,
        threshold: float = 0.5,
        operating_points: Mapping[str, dict] | None = None,
        training: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        training_images: SeenImages | None = None,
    ) -> None:
        self.head = head.eval()
        self.encoder = encoder
        self.policy = policy
        self.threshold = threshold
        self.operating_points = dict(operating_points or {})
        self.training = dict(training or {})
        self.metrics = dict(metrics or {})
        self.training_images = training_images
        self.name = str(self.training.get("experiment", head.kind))

    @property
    def covers(self) -> frozenset[str] | None:
        """The categories of its policy."""
        return frozenset(self.policy.category_names)

    # --- deciding -----------------------------------------------------------------------------------------------------

    def predict(
        self, images: ImageLike | Iterable[ImageLike], *, threshold: float | None = None, max_pixels: int = 100_000_000
    ) -> list[Decision]:
        """Decides over one image or many; never stops at a bad one.

        Args:
            images: paths, encoded bytes, PIL images or (h, w, 3) uint8 RGB arrays; one or an iterable of them.
            threshold: instead of the guard's own, in [0, 1].
            max_pixels: larger images are not decoded.
        Returns:
            One decision per image, in order. A decision on an image that cannot be read has no label, a NaN score and
            the reason in `error`.
        Raises:
            ValueError: the threshold is out of range.
        """
        limit = self.threshold if threshold is None else threshold
        if not 0 <= limit <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {limit}")
        many = [images] if isinstance(images, (str, Path, bytes, Image.Image, np.ndarray)) else images
        decisions: list[Decision] = []
        batch: list[ImageLike] = []
        for image in many:
            batch.append(image)
            if len(batch) == self.encoder.batch_size:
                decisions += self._decide(batch, limit, max_pixels)
                batch = []
        return decisions + self._decide(batch, limit, max_pixels)

    def judge(self, images: Sequence[np.ndarray]) -> list[Judgment]:
        """`predict`, as other people's classifiers answer."""
        return [Judgment(decision.score, decision.error) for decision in self.predict(images)]

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(n, d) embeddings, on any device -> (n,) float32 logits of unsafe on the CPU, differentiable."""
        return self.head(embeddings.to("cpu", torch.float32))[:, 0]

    @property
    def fingerprint(self) -> str:
        """A hash over everything its probabilities depend on: head, encoder and policy; 64 hex digits."""
        weights = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in self.head.state_dict().items()}
        head = {"kind": self.head.kind, "settings": self.head.settings, "weights": weights}
        return fingerprint({"head": head, "encoder": self.encoder.fingerprint, "policy": self.policy.digest})

    def score_embeddings(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, d) float embeddings of the guard's encoder -> (n,) probability of unsafe in [0, 1].

        Raises:
            ValueError: another width, or values that are not finite.
        """
        return self.probabilities(embeddings)[:, 0]

    def probabilities(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, d) embeddings -> (n, 1 + k) float64: probability of unsafe, then of each category, in [0, 1].

        Raises:
            ValueError: another width, or values that are not finite.
        """
        embeddings = np.asarray(embeddings, dtype=np.float32)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.encoder.dim:
            raise ValueError(f"embeddings must be (n, {self.encoder.dim}) for encoder {self.encoder.name}, got shape {embeddings.shape}")
        if not np.isfinite(embeddings).all():
            raise ValueError("embeddings hold NaN or infinite values; embed those images again or leave them out")
        with torch.inference_mode():
            logits = self.head(torch.from_numpy(embeddings))
        return torch.sigmoid(logits.double()).numpy()

    def _decide(self, batch: list[ImageLike], threshold: float, max_pixels: int) -> list[Decision]:
        pixels: list[torch.Tensor] = []
        errors: dict[int, str] = {}
        for i, image in enumerate(batch):
            try:
                pixels.append(self.encoder.preprocess(read_image(image, max_pixels=max_pixels)))
            except ImageError as error:
                errors[i] = str(error)
        rows = iter(self.probabilities(self.encoder.encode_preprocessed(pixels)) if pixels else [])
        decisions = []
        for i in range(len(batch)):
            if i in errors:
                decisions.append(Decision(None, float("nan"), threshold, {}, errors[i]))
                continue
            score, *categories = (float(value) for value in next(rows))
            named = dict(zip(self.policy.category_names, categories, strict=True))
            decisions.append(Decision(int(score >= threshold), score, threshold, named))
        return decisions

    # --- keeping ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes `config.json`, `model.safetensors`, `policy.yaml`, `training_images.parquet` and a model card; config.json comes last.

        Returns:
            The folder.
        """
        folder = Path(folder)
        with written(folder / _WEIGHTS) as temporary:
            save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, temporary)
        self.policy.save(folder / _POLICY)
        if self.training_images is not None:
            self.training_images.save(folder / _SEEN)
        else:
            (folder / _SEEN).unlink(missing_ok=True)  # of another guard
        config: dict[str, Any] = {
            "format": FORMAT,
            "guardkit_version": __version__,
            "head": {"kind": self.head.kind, "settings": self.head.settings},
            "categories": list(self.policy.category_names),
            "threshold": self.threshold,
            "operating_points": self.operating_points,
            "training": self.training,
            "encoder": {
                "name": self.encoder.name,
                "config": self.encoder.config,
                "fingerprint": self.encoder.fingerprint,
                "preprocessing": self.encoder.preprocessing,
                "dim": self.encoder.dim,
            },
            "policy": {"name": self.policy.name, "digest": self.policy.digest},
            "metrics": self.metrics,
            "weights_sha256": hash_file(folder / _WEIGHTS),
            "training_images_sha256": None if self.training_images is None else hash_file(folder / _SEEN),
        }
        config["digest"] = fingerprint(config)
        with written(folder / "README.md") as temporary:
            temporary.write_text(_model_card(config, self.policy), encoding="utf-8")
        write_json(folder / _CONFIG, config)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, encoder: Encoder | None = None) -> GuardClassifier:
        """Loads a guard from a folder, or from the Hugging Face Hub by its id.

        Args:
            folder: a path, or "organisation/name" on the Hub.
            encoder: to use instead of building the one that the guard names; it must be the same one.
        Raises:
            InputError: not a guard folder, a damaged file, or an encoder with other weights or preprocessing.
        """
        path = _locate(folder)
        try:
            config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
            digest = config.pop("digest")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"{path / _CONFIG} is not a guard's configuration ({error}); train the guard again or copy the folder anew"
            ) from error
        if config.get("format") != FORMAT:
            raise InputError(
                f"{path} has guard format {config.get('format')!r}, this guardkit reads {FORMAT}; use guardkit {config.get('guardkit_version')}"
            )
        if fingerprint(config) != digest:
            raise InputError(f"{path / _CONFIG} was changed after it was written (its digest does not match); copy the folder anew")
        policy = Policy.load(path / _POLICY)
        if policy.digest != config["policy"]["digest"]:
            raise InputError(
                f"{path / _POLICY} was changed after the guard was trained (its digest does not match); train a guard for the new policy"
            )
        if not (path / _WEIGHTS).is_file() or hash_file(path / _WEIGHTS) != config["weights_sha256"]:
            raise InputError(f"{path / _WEIGHTS} is missing or damaged (its SHA-256 does not match); copy the folder anew")
        kind = config["head"]["kind"]
        if kind not in HEADS:
            raise InputError(f"{path} has a head of kind {kind!r}, this guardkit knows {', '.join(HEADS)}")
        head = HEADS[kind](**config["head"]["settings"])
        try:
            head.load_state_dict(load_file(path / _WEIGHTS))
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{path / _WEIGHTS} does not fit its configuration: {error}") from error
        if encoder is None:
            encoder = _build_encoder(config["encoder"])
        _check_encoder(path, config["encoder"], encoder)
        return cls(
            head,
            encoder,
            policy,
            threshold=config["threshold"],
            operating_points=config["operating_points"],
            training=config["training"],
            metrics=config["metrics"],
            training_images=_seen_images(path, config.get("training_images_sha256")),
        )


def _seen_images(path: Path, sha256: str | None) -> SeenImages | None:
    """The list of training images; None for a guard of an earlier guardkit, which kept none."""
    if sha256 is None:
        return None
    if not (path / _SEEN).is_file() or hash_file(path / _SEEN) != sha256:
        raise InputError(f"{path / _SEEN} is missing or damaged (its SHA-256 does not match); copy the folder anew")
    return SeenImages.load(path / _SEEN)


def _locate(folder: str | Path) -> Path:
    path = Path(folder)
    if path.exists():
        return path
    name = str(folder)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and os.sep not in name.split("/")[1]:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS, _POLICY, _SEEN]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{name!r} is neither a folder here nor a guard on the Hub that can be reached ({reason})") from error
    raise InputError(f"guard folder {name!r} does not exist; give the folder `guard/` that training wrote, or a Hub id like org/name")


def _build_encoder(config: Mapping[str, Any]) -> Encoder:
    from guardkit.encoders.open_clip import OpenClipEncoder

    return OpenClipEncoder(**config["config"])


def _check_encoder(path: Path, expected: Mapping[str, Any], encoder: Encoder) -> None:
    if encoder.fingerprint == expected["fingerprint"]:
        return
    raise InputError(
        f"guard {path} needs encoder {expected['name']} ({expected['dim']}-d, fingerprint {expected['fingerprint'][:12]}, "
        f"preprocessing {expected['preprocessing']}), got {encoder.name} ({encoder.dim}-d, fingerprint {encoder.fingerprint[:12]}, "
        f"preprocessing {encoder.preprocessing}); use the first, or train a guard on the second"
    )


def _model_card(config: Mapping[str, Any], policy: Policy) -> str:
    """A Hugging Face model card: what the guard decides, on what it was trained, what was measured."""
    test, pairs = config["metrics"].get("test") or {}, config["metrics"].get("pairs") or {}

    def figure(value: Any) -> str:
        return "not measured" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    rows = [(name, test.get(name)) for name in ("auroc", "average_precision", "f1", "recall", "fpr", "n")]
    rows += [(name, pairs.get(name)) for name in ("pair_accuracy", "ranking_accuracy")] + [("test pairs", pairs.get("n"))]
    table = "\n".join(f"| {name} | {figure(value)} |" for name, value in rows)
    points = "\n".join(
        f"| {name} | {point['threshold']:.4f} | {point['recall']:.3f} | {point['fpr']:.3f} (95 % upper bound {point['fpr_ci_high']:.3f}, {point['n_safe']} safe images) |"
        for name, point in config["operating_points"].items()
    )
    categories = "\n".join(f"- **{category.name}**: {category.definition}" for category in policy.categories)
    return f"""---
library_name: guardkit
tags: [image-safety, image-classification]
---

# Image guard for the policy `{policy.name}`

A `{config["head"]["kind"]}` head on frozen embeddings of {config["encoder"]["name"]} ({config["encoder"]["dim"]}-d). Label 1 is unsafe; flagged means score >= {config["threshold"]:.4f}.

```python
from guardkit import GuardClassifier

decisions = GuardClassifier.from_pretrained("THIS_FOLDER").predict(["image.jpg"])
```

## What it was trained to flag

{categories}

Policy digest `{config["policy"]["digest"][:16]}`, encoder fingerprint `{config["encoder"]["fingerprint"][:16]}`, guardkit {config["guardkit_version"]}.
Training: {json.dumps(config["training"])}.

## Measured on its test set

| metric | value |
|---|---|
{table}

## Operating points, chosen on validation images

| name | threshold | recall | false-positive rate |
|---|---|---|---|
{points}

## Limits

The figures hold for images like those of the test set. A guard this small sees only what its encoder sees; measure it on your own images before you rely on it, and let people review what it decides.
"""
