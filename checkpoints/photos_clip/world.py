"""What `checkpoints/photos_clip` learns from: 64-pixel photographs of 200 classes, and sentences about the classes.

The sentences are made of each class's WordNet synonyms, hypernyms and gloss; the words safe and unsafe never occur. A
sentence that holds for other classes too ("a kind of arachnid") is no mistake where it meets their images, so it counts
neither for nor against them. Photographs are shown at 64 pixels and later enlarged, because a network that halves its
input four times before its last layers loses small objects first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from checkpoints.clip_recipe import Texts

STORED_PX = 64
IMAGE_PX = 96
_ENLARGED_FROM = 0.5  # share of the time after which photographs are shown at IMAGE_PX
_TOO_GENERAL = frozenset(("entity", "physical entity", "object", "whole", "matter"))
_NAMED = (
    "{}", "a photo of a {}", "a photograph of the {}", "a picture of a {}", "an image of a {}", "a close photo of a {}", "a blurry photo of a {}",
    "a small {} in the picture", "there is a {} in the photo", "a person with a {}", "a scene with a {}", "the {} on the ground", "photos of {}s",
)  # fmt: skip
_KINDS = ("a photo of a {}, a kind of {}", "{}, {}", "a {} which is a {}")
_GLOSSED = ("a {}, {}", "a photo of a {}: {}")
_GENERAL = ("a photo of a {}", "a kind of {}", "some {}", "a picture of a {} of some kind", "photos of {}s")
_UNKNOWN = "qqq"  # in no vocabulary: texts of policies hold words that the world does not
_SHARES = {"named": 0.5, "kind": 0.2, "glossed": 0.15, "general": 0.15}


@dataclass(frozen=True)
class Described:
    """A class in words: its synonyms, its hypernyms (nearest first) and its gloss."""

    synonyms: tuple[str, ...]
    hypernyms: tuple[str, ...]
    gloss: str


def plain(text: str) -> str:
    """Lower case, words and commas only."""
    return " ".join(re.sub(r"[^a-z0-9, ]+", " ", text.lower().replace(";", ",")).replace(",", " , ").split())


def plural(text: str) -> str:
    """A noun's plural by the commonest rules, as the last word of a phrase."""
    if text.endswith(("s", "x", "ch", "sh")):
        return text + "es"
    return text[:-1] + "ies" if text.endswith("y") and text[-2:-1] not in "aeiou" else text + "s"


def read_classes(path: Path) -> dict[str, Described]:
    """The classes of a `classes.csv`, by WordNet id, in the file's order."""
    import pandas as pd

    table = pd.read_csv(path, keep_default_na=False)
    return {
        row.wnid: Described(
            tuple(plain(word) for word in row.synonyms.split("|")),
            tuple(plain(word) for word in row.hypernyms.split("|") if word not in _TOO_GENERAL),
            plain(row.gloss),
        )
        for row in table.itertuples()
    }


@dataclass
class Photos:
    """Settings of one training run; the defaults made the shipped encoder.

    Attributes:
        data: a folder with `train.parquet` (columns `image` and `wnid`) and `classes.csv`.
        minutes: of optimisation, after reading.
        logit_scale, late_logit_scale: see `checkpoints.scenes_clip.world.Scenes`.
        averaging: of the weights that are saved, for each step.
    """

    data: str = "tiny_imagenet"
    out: str = "checkpoints/photos_clip"
    minutes: float = 110.0
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    logit_scale: float = 20.0
    late_logit_scale: float = 12.0
    label_smoothing: float = 0.1
    averaging: float = 0.998
    _images: np.ndarray = field(default_factory=lambda: np.zeros(0), init=False, repr=False)
    _labels: np.ndarray = field(default_factory=lambda: np.zeros(0, int), init=False, repr=False)
    _order: np.ndarray = field(default_factory=lambda: np.zeros(0, int), init=False, repr=False)

    seed: ClassVar[int] = 7_003
    model: ClassVar[dict[str, Any]] = {
        "embed_dim": 256,
        "vision_cfg": {
            "image_size": IMAGE_PX,
            "timm_model_name": "resnet10t",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
        "text_cfg": {"context_length": 40, "width": 128, "heads": 4, "layers": 2, "tokenizer_kwargs": {"clean": "lower"}},
    }
    preprocessing: ClassVar[dict[str, Any]] = {
        "mean": (0.48, 0.45, 0.40), "std": (0.28, 0.27, 0.28), "interpolation": "bicubic", "resize_mode": "shortest",
    }  # fmt: skip

    def __post_init__(self) -> None:
        self._classes = list(read_classes(Path(self.data) / "classes.csv").values()) if (Path(self.data) / "classes.csv").is_file() else []

    def words(self) -> set[str]:
        if not self._classes:
            raise SystemExit(f"expected classes.csv and train.parquet in data={self.data}; name the folder that holds them")
        texts = [plain(template.replace("{}", " ")) for template in (*_NAMED, *_KINDS, *_GLOSSED, *_GENERAL)]
        for one in self._classes:
            texts += [*one.synonyms, *one.hypernyms, *map(plural, (*one.synonyms, *one.hypernyms)), one.gloss]
        everyday = "and or with without no not holding hand man woman people someone something image drawing in at near used being their"
        return {word for text in (*texts, everyday) for word in text.split()} - {",", "safe", "unsafe"}

    def prepare(self) -> None:
        import pyarrow.parquet as pq

        rows = {wnid: row for row, wnid in enumerate(read_classes(Path(self.data) / "classes.csv"))}
        images, labels = [], []
        for batch in pq.ParquetFile(Path(self.data) / "train.parquet").iter_batches(2_000, columns=["image", "wnid"]):
            for one in batch.to_pylist():
                image = Image.open(BytesIO(one["image"]["bytes"])).convert("RGB")
                images.append(
                    np.asarray(
                        image.resize((STORED_PX, STORED_PX), Image.Resampling.BICUBIC) if image.size != (STORED_PX, STORED_PX) else image
                    )
                )
                labels.append(rows[one["wnid"]])
        self._images, self._labels = np.stack(images), np.array(labels)

    def batch(self, progress: float, rng: np.random.Generator) -> tuple[torch.Tensor, list[Texts]]:
        if len(self._order) < self.batch_size:
            self._order = np.concatenate([self._order, rng.permutation(len(self._images))])
        chosen, self._order = self._order[: self.batch_size], self._order[self.batch_size :]
        pixels = _augment(self._images[chosen], IMAGE_PX if progress >= _ENLARGED_FROM else STORED_PX, rng)
        said, holds = self._sentences(rng)
        texts = list(dict.fromkeys(said))
        true_of = np.stack([holds[[row for row, other in enumerate(said) if other == text]].any(axis=0) for text in texts])
        own = np.array([texts.index(text) for text in said])
        labels = self._labels[chosen]
        also_true = true_of[:, labels].T.copy()
        also_true[np.arange(len(labels)), own[labels]] = False
        return pixels, [Texts(texts, own[labels], also_true=also_true)]

    def _sentences(self, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
        """A sentence for each class, and (n_classes, n_classes) bool: sentence i holds for class j."""
        n = len(self._classes)
        said, holds = [], np.eye(n, dtype=bool)
        for row, one in enumerate(self._classes):
            kind = str(rng.choice(list(_SHARES), p=list(_SHARES.values())))
            name = str(rng.choice(one.synonyms))
            near = one.hypernyms[int(rng.integers(min(3, len(one.hypernyms))))]
            if kind == "kind":
                text = str(rng.choice(_KINDS)).format(name, near)
            elif kind == "glossed":
                text = str(rng.choice(_GLOSSED)).format(name, one.gloss) if rng.random() < 0.5 else one.gloss
            else:
                noun = name
                if kind == "general":
                    noun = str(rng.choice(one.hypernyms[:6]))
                    holds[row] = [noun in other.hypernyms or noun in other.synonyms for other in self._classes]
                template = str(rng.choice(_NAMED if kind == "named" else _GENERAL))
                text = template.replace("{}s", plural(noun)).format(noun)
            words = plain(text).split()
            if rng.random() < 0.15:
                words.insert(int(rng.integers(len(words) + 1)), _UNKNOWN)
            said.append(" ".join(words))
        return said, holds


def _augment(images: np.ndarray, px: int, rng: np.random.Generator) -> torch.Tensor:
    """Crops, mirrors and relights a batch; one size of crop for all, another place for each."""
    n, stored = len(images), images.shape[1]
    side = round(stored * float(np.sqrt(rng.uniform(0.4, 1.0))))
    tops, lefts = rng.integers(stored - side + 1, size=n), rng.integers(stored - side + 1, size=n)
    cropped = np.stack([image[top : top + side, left : left + side] for image, top, left in zip(images, tops, lefts, strict=True)])
    pixels = torch.from_numpy(cropped).permute(0, 3, 1, 2).float() / 255
    if side != px:
        pixels = functional.interpolate(pixels, size=(px, px), mode="bicubic", align_corners=False)
    mirrored = torch.from_numpy(rng.random(n) < 0.5)
    pixels[mirrored] = pixels[mirrored].flip(3)
    gain = torch.from_numpy(rng.uniform(0.8, 1.2, (n, 3, 1, 1)).astype(np.float32))
    return (pixels * gain).clamp(0, 1)
