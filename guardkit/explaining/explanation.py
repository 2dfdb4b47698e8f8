"""What an explanation is: a heat map at the image's size, and a picture of it for people."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_COLD_TO_HOT = ((60, 20, 110), (190, 40, 95), (245, 125, 30), (255, 235, 120))  # darker to lighter, so that it is read without colours too
_MOST_COLOUR = 0.8  # of the hottest place, so that the picture is still seen in it
_GREY = (0.299, 0.587, 0.114)  # light of red, green and blue, ITU-R BT.601
_STRIP_PX = 1 << 20  # at once
_LEVELS = 256
_HEAT = np.linspace(0, 1, _LEVELS, dtype=np.float32)
_SEEN = 1 - _MOST_COLOUR * _HEAT  # of the image
_COLOURS = (1 - _SEEN)[:, None] * np.stack(  # that are added, by level of heat
    [np.interp(_HEAT, np.linspace(0, 1, len(_COLD_TO_HOT)), channel) for channel in zip(*_COLD_TO_HOT, strict=True)], axis=1
).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Which parts of an image a score comes from.

    Heat is relative to the hottest place of the same image: it says where, never how much, and two images cannot be compared by it.
    What lowers the score is as cold as what does nothing, and so is what the encoder never sees because its preprocessing crops it away.

    Attributes:
        heat: (h, w) float32 in [0, 1], at the size of the image as it is read. The hottest place has 1; all is 0 where nothing in the
            image raises the score.
        method: how it was found: "grad_eclip", "activation", "attention_pooling" or "occlusion".
        category: whose score it is; None: that of the decision.
        score: in [0, 1], as `predict` gives it.
        image: (h, w, 3) uint8 RGB, as it was read.
    """

    heat: np.ndarray = field(repr=False)
    method: str
    category: str | None
    score: float
    image: np.ndarray = field(repr=False)

    def overlay(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB: the image without its colours, and the heat over it from violet to yellow."""
        height, width = self.heat.shape
        picture = np.empty((height, width, 3), np.uint8)
        step = max(1, _STRIP_PX // width)
        for top in range(0, height, step):
            levels = np.rint(self.heat[top : top + step] * (_LEVELS - 1)).astype(np.intp)
            grey = self.image[top : top + step] @ np.array(_GREY, np.float32)
            picture[top : top + step] = np.rint(_COLOURS[levels] + _SEEN[levels, None] * grey[..., None])
        return picture
