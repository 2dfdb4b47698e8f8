"""Pictures of a training run. The one file of this room that knows matplotlib; it draws without a display."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from guardkit.limits import shrink

_UNSAFE, _SAFE, _GREY = "#b3362b", "#2b6cb3", "#777777"
_PICTURE_PX = 320  # of the longer side


@dataclass(frozen=True)
class PicturedPair:
    """A pair to look at.

    Attributes:
        title: a few words.
        original: (h, w, 3) uint8 RGB, the unsafe image.
        counterfactual: of it, of the same size.
        scores: of the two.
    """

    title: str
    original: np.ndarray
    counterfactual: np.ndarray
    scores: tuple[float, float]


def pairs(shown: list[PicturedPair], threshold: float, path: Path) -> None:
    """Unsafe image, counterfactual and difference side by side, with both scores; wrong decisions are marked."""
    if not shown:
        _note("No pair to show: no counterfactual was accepted, or the source holds embeddings only.", path)
        return
    columns = 2 if len(shown) > 1 else 1
    rows = -(-len(shown) // columns)
    width, height = 6.4 * columns, 2.45 * rows + 0.25
    figure = Figure(figsize=(width, height))
    # one axis in inches for all images: an axis for each would take as long as everything else here
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    step, room = (
        0.995 * width / (3 * columns),
        (0.98 * height - 0.55) / (1.16 * rows - 0.16),
    )  # of an image, from left to right and in height
    for i, pair in enumerate(shown):
        row, column = divmod(i, columns)
        original, twin = shrink(pair.original, _PICTURE_PX), shrink(pair.counterfactual, _PICTURE_PX)
        difference = np.abs(original.astype(int) - twin.astype(int)).max(axis=2)
        unsafe, safe = pair.scores
        y = height - 0.55 - (1.16 * row + 0.5) * room
        trio: list[tuple[np.ndarray, str, int, str]] = [
            (original, f"unsafe: {unsafe:.2f} {'flagged' if unsafe >= threshold else 'MISSED'}", 9, _UNSAFE),
            (twin, f"twin: {safe:.2f} {'WRONGLY FLAGGED' if safe >= threshold else 'passed'}", 9, _SAFE),
            (difference, pair.title, 8, _GREY),
        ]
        for place, (image, title, size, color) in enumerate(trio):
            inch = min(0.96 * step / image.shape[1], room / image.shape[0])  # of a pixel
            half_width, half_height = inch * image.shape[1] / 2, inch * image.shape[0] / 2
            x = 0.0025 * width + (3 * column + place + 0.5) * step
            extent = (x - half_width, x + half_width, y - half_height, y + half_height)
            axis.imshow(image, cmap="magma", vmin=0, vmax=255, extent=extent, aspect="auto")
            axis.text(x, y + half_height + 0.07, title, fontsize=size, color=color, ha="center", va="baseline")
    axis.set(xlim=(0, width), ylim=(0, height))
    figure.suptitle(
        f"Test pairs: unsafe image, counterfactual, difference. Flagged when score >= {threshold:.2f}",
        fontsize=10,
        y=1 - 0.08 / height,
        va="top",
    )
    # noise hardly compresses, and the default level spends a fifth of a second on it
    figure.savefig(path, dpi=85, pil_kwargs={"compress_level": 1})


def learning(curve: list[dict[str, Any]], best_epoch: int, path: Path) -> None:
    """Training and validation loss by epoch, and which epoch was kept."""
    if not curve:
        _note("Nothing was trained: the head is as it was built.", path)
        return
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    epochs = [point["epoch"] for point in curve]  # from 0, as Lightning and metrics.json count them
    axis.plot(epochs, [point["train_loss"] for point in curve], color=_SAFE, label="training")
    axis.plot(epochs, [point["validation_loss"] for point in curve], color=_UNSAFE, label="validation")
    axis.axvline(best_epoch, color=_GREY, linestyle=":", label=f"kept: epoch {best_epoch}")
    axis.set_xlabel("epoch, from 0")
    axis.set_ylabel("loss")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _note(text: str, path: Path) -> None:
    figure = Figure(figsize=(6, 1.2))
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, wrap=True)
    figure.savefig(path, dpi=110)
