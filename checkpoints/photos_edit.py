"""What an editor of photographs learns from: photographs of 64 pixels whose box is covered, and the names of their classes.

A photograph has no exact counterfactual, so the editor learns to put back what a box held, given its name. It sees one half
of the photographs; whoever judges its edits is trained on the other half (`benchmarks/photos_editor.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from checkpoints.edit_recipe import CROP_PX, Pool
from checkpoints.photos_clip.world import plain, read_classes
from guardkit.images import bytes_key

_NAMED = ("a photo of a {}", "a photo of a {}", "{}")  # what an instructor says, and the bare name


@dataclass(frozen=True)
class Photos:
    """Settings of one training run.

    Attributes:
        data: a folder with `train.parquet` (columns `image`, `wnid`, `x_min`, `y_min`, `x_max`, `y_max`) and `classes.csv`.
        n_photographs: of the editor's half, at most; 0 for all of them.
    """

    data: str = "tiny_imagenet"
    out: str = "photos_edit"
    autoencoder_minutes: float = 30.0
    unet_minutes: float = 600.0
    n_photographs: int = 0
    batch_size: int = 32
    learning_rate: float = 1e-3
    text: str = "checkpoints/photos_clip"
    device: str = "cpu"
    start: str = "checkpoints/scenes_edit"

    seed: ClassVar[int] = 7_004
    pooled_words: ClassVar[bool] = True

    def pool(self) -> Pool:
        import pyarrow.parquet as pq

        classes = Path(self.data) / "classes.csv"
        if not classes.is_file():
            raise SystemExit(f"expected classes.csv and train.parquet in data={self.data}; name the folder that holds them")
        synonyms = {wnid: one.synonyms for wnid, one in read_classes(classes).items()}
        table = pq.ParquetFile(Path(self.data) / "train.parquet")
        rows = [row for part in table.iter_batches(2_000) for row in part.to_pylist() if is_of_editor(bytes_key(row["image"]["bytes"]))]
        if self.n_photographs:
            rows = [rows[i] for i in np.random.default_rng(self.seed).permutation(len(rows))[: self.n_photographs]]
        images = np.stack([photograph(row) for row in rows])
        boxes = CROP_PX * np.array([[row[side] for side in ("x_min", "y_min", "x_max", "y_max")] for row in rows], np.float32)
        names = [synonyms[row["wnid"]] for row in rows]

        def words(number: int, rng: np.random.Generator) -> str:
            return plain(str(rng.choice(_NAMED)).format(rng.choice(names[number])))

        return Pool(images, images, boxes, words)


def is_of_editor(key: str) -> bool:
    """Whether the editor learns from the photograph with this `guardkit.images.bytes_key`; its judge learns from the others."""
    return bytes.fromhex(key.rpartition(":")[2])[0] % 2 == 0


def photograph(row: dict[str, Any]) -> np.ndarray:
    """(64, 64, 3) uint8."""
    image = Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")
    return np.asarray(image if image.size == (CROP_PX, CROP_PX) else image.resize((CROP_PX, CROP_PX), Image.Resampling.BICUBIC))
