"""One model, several ways to images' vectors: how they are read and what the model computes in.

Which way made an embedding is part of the encoder, and what another way would change is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import product

import cv2
import numpy as np

from guardkit.encoders.base import BACKENDS, DECODES, DTYPES, FLOAT32, Encoder, enough
from guardkit.encoders.frozen import FrozenEncoder
from guardkit.images import read_image

log = logging.getLogger(__name__)

WAYS = {"backend": BACKENDS, "decode": DECODES, "dtype": DTYPES}  # settings that are a way, and what they may be
N_DRAWN = 8
_ROWS, _COLUMNS = 1440, 1920


def of_the_same_weights(fingerprint: str, encoder: Encoder) -> FrozenEncoder | None:
    """The encoder with that fingerprint, where it differs from one at hand in its way alone; None where in more than that.

    It shares the model.
    """
    if not isinstance(encoder, FrozenEncoder):
        return None
    names = list(encoder.way)
    others = (encoder.going(dict(zip(names, chosen, strict=True))) for chosen in product(*(WAYS[name] for name in names)))
    return next((other for other in others if (other.fingerprint, other.dim) == (fingerprint, encoder.dim)), None)


def going_alike(encoder: Encoder, fingerprint: str | None, whose: str) -> Encoder:
    """An encoder that goes somebody else's way, if its weights are the same; it is said where that changes it.

    Args:
        encoder: as it was chosen.
        fingerprint: of the encoder that made what is at hand already; None: nobody knows.
        whose: what is at hand, for the message, such as "the source's embeddings are".
    """
    if fingerprint in (None, encoder.fingerprint) or (other := of_the_same_weights(str(fingerprint), encoder)) is None:
        return encoder
    log.warning("%s of encoder %s with %s, and so images are read here too", whose, encoder.name, said_way(other))
    return other


def in_float32(encoder: Encoder) -> Encoder:
    """The encoder as one that computes in float32; itself where it does, or has no choice."""
    is_cast = isinstance(encoder, FrozenEncoder) and encoder.casts and encoder.dtype != FLOAT32
    return encoder.going({"dtype": FLOAT32}) if is_cast else encoder  # type: ignore[attr-defined]


def said_way(encoder: Encoder) -> str:
    """An encoder's way, as its settings."""
    assert isinstance(encoder, FrozenEncoder)
    return " ".join(f"{name}={chosen}" for name, chosen in encoder.way.items())


def moved_by(scores: Callable[[np.ndarray], np.ndarray], one: Encoder, other: Encoder) -> float:
    """How far scores are apart on drawn images that two encoders of one model see: the largest difference.

    Args:
        scores: (n, d) embeddings -> probabilities.
    """
    images = drawn_images()
    here, there = (
        scores(encoder.encode_images([read_image(data, at_least=enough(encoder)) for data in images])) for encoder in (one, other)
    )
    return float(np.abs(here - there).max())


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
        levels = np.rint(np.clip(shades + rng.normal(0, 8, shades.shape), 0, 255)).astype(np.uint8)
        done, data = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, 90])
        assert done
        images.append(data.tobytes())
    return images
