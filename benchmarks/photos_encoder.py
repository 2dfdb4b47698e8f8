"""How well does an encoder know photographs? The figures of checkpoints/photos_clip/README.md.

    python benchmarks/photos_encoder.py data=DIR [encoder=guardkit:photos_clip] [dtype=float32]

DIR holds `train.parquet`, `val.parquet` (columns `image` and `wnid`) and `classes.csv`. Everything is measured on
`val.parquet`: naming the class among all by its first synonym (zero-shot), by a linear probe (multinomial logistic
regression on all of `train.parquet`, its decay chosen on a tenth of it), and telling each class from the rest by a logistic
probe that was given few labels, half of them of the class. Intervals are 95 %: over images for shares, over classes for AUROC.
"""

from __future__ import annotations

import sys
from io import BytesIO
from math import sqrt
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn import functional

from checkpoints.photos_clip.world import read_classes
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.metrics.figures import classification_metrics

BUDGETS = (8, 64, 512)
BATCH = 500


def read(encoder: OpenClipEncoder, path: Path, rows: dict[str, int]) -> tuple[torch.Tensor, np.ndarray]:
    """(n, dim) unit vectors and (n,) classes."""
    vectors, labels = [], []
    for batch in pq.ParquetFile(path).iter_batches(BATCH, columns=["image", "wnid"]):
        table = batch.to_pylist()
        vectors.append(encoder.encode_images([np.asarray(Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")) for row in table]))
        labels += [rows[row["wnid"]] for row in table]
    return torch.from_numpy(np.concatenate(vectors)), np.array(labels)


def fit(x: torch.Tensor, target: torch.Tensor, decay: float, steps: int = 150) -> torch.Tensor:
    """Minimises mean cross-entropy plus decay / 2 x squared weights; (dim + 1, n_classes), the last row the bias.

    x: (n, dim); target: (n,) classes, or (n, n_problems) of 0 and 1 for as many independent problems.
    """
    x = functional.pad(x, (0, 1), value=1.0)
    width = target.shape[1] if target.ndim == 2 else int(target.max()) + 1
    weights = torch.zeros(x.shape[1], width, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ weights
        per_problem = (
            functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=0).sum() if target.ndim == 2 else None
        )
        loss = (functional.cross_entropy(logits, target) if per_problem is None else per_problem) + decay / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def share(right: np.ndarray) -> str:
    rate = float(np.mean(right))
    return f"{rate:.3f} ± {1.96 * sqrt(rate * (1 - rate) / len(right)):.3f}"


def main(data: str, encoder: str = "guardkit:photos_clip", dtype: str = "float32") -> None:
    model = OpenClipEncoder(None, encoder, dtype=dtype, batch_size=250)
    classes = read_classes(Path(data) / "classes.csv")
    rows = {wnid: row for row, wnid in enumerate(classes)}
    x, y = read(model, Path(data) / "train.parquet", rows)
    test, truth = read(model, Path(data) / "val.parquet", rows)
    texts = torch.from_numpy(model.encode_texts([f"a photo of a {one.synonyms[0]}" for one in classes.values()]))
    print(f"zero-shot top-1 of {len(classes)}: {share((test @ texts.T).argmax(1).numpy() == truth)} (n {len(truth)})")

    mean, spread = x.mean(dim=0), x.std(dim=0)
    x, test = (x - mean) / spread, (test - mean) / spread
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    held, fitted = order[: len(x) // 10], order[len(x) // 10 :]
    target = torch.from_numpy(y)

    def named(weights: torch.Tensor, images: torch.Tensor) -> np.ndarray:
        return (functional.pad(images, (0, 1), value=1.0) @ weights).argmax(dim=1).numpy()

    decays = (1e-5, 1e-4, 1e-3)
    right = [np.mean(named(fit(x[fitted], target[fitted], decay), x[held]) == y[held]) for decay in decays]
    decay = decays[int(np.argmax(right))]
    print(f"linear probe top-1: {share(named(fit(x, target, decay), test) == truth)} (decay {decay:g})")

    for budget in BUDGETS:
        aurocs = []
        for row in range(len(classes)):
            own = rng.permutation(np.flatnonzero(y == row))[: budget // 2]
            others = rng.permutation(np.flatnonzero(y != row))[: budget // 2]
            chosen = np.concatenate([own, others])
            weights = fit(x[chosen], torch.from_numpy((y[chosen] == row).astype(np.float32))[:, None], decay=1e-1, steps=50)
            scores = torch.sigmoid(functional.pad(test, (0, 1), value=1.0) @ weights)[:, 0].numpy()
            aurocs.append(float(classification_metrics((truth == row).astype(int), scores, 0.5)["auroc"] or 0.0))
        half = 1.96 * np.std(aurocs, ddof=1) / sqrt(len(aurocs))
        print(
            f"AUROC of a class against the rest, {budget} labels: {np.mean(aurocs):.3f} ± {half:.3f} over {len(aurocs)} classes", flush=True
        )


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
