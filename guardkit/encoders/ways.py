"""One model, several ways to read images for it: which way made an embedding is part of the encoder, and what another way would change is measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import product
from typing import Any

import cv2
import numpy as np

from guardkit.encoders.base import BACKENDS, DECODES, FULL, PIL, Encoder
from guardkit.encoders.frozen import FrozenEncoder

log = logging.getLogger(__name__)

WAYS = {"backend": PIL, "decode": FULL}  # settings that are a way to read, with what they were when preprocessing did not say
N_DRAWN = 8
_ROWS, _COLUMNS = 1440, 1920


def of_the_same_weights(fingerprint: str, encoder: Encoder) -> Encoder | None:
    """The encoder with that fingerprint, where it differs from one at hand in how it reads images alone; None where in more than that.

    It shares the model.
    """
    ways = product(BACKENDS, DECODES) if isinstance(encoder, FrozenEncoder) else ()
    others = (encoder.reading_as({"backend": backend, "decode": decode}) for backend, decode in ways)  # type: ignore[attr-defined]
    return next((other for other in others if (other.fingerprint, other.dim) == (fingerprint, encoder.dim)), None)


def reading_alike(encoder: Encoder, fingerprint: str | None, whose: str) -> Encoder:
    """An encoder that reads images as somebody else's did, if its weights are the same; it is said where that changes it.

    Args:
        encoder: as it was chosen.
        fingerprint: of the encoder that made what is at hand already; None: nobody knows.
        whose: what is at hand, for the message, such as "the source's embeddings are".
    """
    if fingerprint in (None, encoder.fingerprint) or (other := of_the_same_weights(str(fingerprint), encoder)) is None:
        return encoder
    log.warning("%s of encoder %s with %s, and so images are read here too", whose, encoder.name, said_way(other.preprocessing))
    return other


def said_way(preprocessing: Mapping[str, Any]) -> str:
    """How images are read, as its settings."""
    return " ".join(f"{key}={preprocessing.get(key, usual)}" for key, usual in WAYS.items())


def drawn_images() -> list[bytes]:
    """JPEG files of a photograph's size, with shades, edges and grain: the same ones every time."""
    rng = np.random.default_rng(0)
    images = []
    for coarse in 4 ** np.arange(1, 5).repeat(N_DRAWN // 4):
        shades = cv2.resize(
            rng.uniform(0, 255, (3 * coarse // 4, coarse, 3)).astype(np.float32), (_COLUMNS, _ROWS), interpolation=cv2.INTER_CUBIC
        )
        for _ in range(12):
            corner, colour = rng.integers(0, (_COLUMNS, _ROWS)), rng.integers(0, 256, 3).tolist()
            cv2.ellipse(shades, corner.tolist(), rng.integers(15, 360, 2).tolist(), float(rng.uniform(0, 180)), 0, 360, colour, -1)
        done, data = cv2.imencode(".jpg", np.clip(shades + rng.normal(0, 8, shades.shape), 0, 255), [cv2.IMWRITE_JPEG_QUALITY, 90])
        assert done
        images.append(data.tobytes())
    return images
