"""JPEG through torchvision's decoder: the very pixels that Pillow gives, in two thirds of the time.

What it refuses, and everything unusual, is Pillow's to judge, so that neither reads what the other would not. Because the pixels are the
same, nothing of this belongs to what an embedding depends on. torchvision has announced that its decoder will go; without it all is Pillow's.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)  # one that has a length, or the end
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_SCAN, _END = 0xDA, 0xD9


def decode(data: bytes, width: int, height: int) -> np.ndarray | None:
    """Decodes a JPEG of red, green and blue.

    Args:
        data: of three components and without a colour profile.
        width, height: as Pillow found them; memory is taken for no other size.
    Returns:
        (h, w, 3) uint8 RGB as stored, not turned upright; None: Pillow is to read it.
    """
    # importing torch takes seconds, which no image is worth
    if "torch" not in sys.modules or _size(data) != (width, height):
        return None
    read = _decoder()
    try:
        pixels = None if read is None else read(data)
    except RuntimeError:
        return None
    return pixels if pixels is not None and pixels.shape == (height, width, 3) else None


def _size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a decoder will take memory for; None where the file is not laid out as usual, or has no end."""
    at = 2
    found = None
    while (marker := _MARKER.search(data, at)) is not None and marker[1][0] != _END:
        if marker.start() != at:
            return None  # bytes between segments, of which the decoder would complain aloud
        kind, at = marker[1][0], marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
        if kind == _SCAN:
            return found if data.rfind(b"\xff\xd9") >= at else None
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            if found is not None or kind not in _FRAMES:
                return None
            frame = data[marker.end() + 2 : marker.end() + 7]
            found = int.from_bytes(frame[3:5]), int.from_bytes(frame[1:3])
    return None


@cache
def _decoder() -> Callable[[bytes], np.ndarray] | None:
    """torchvision's, if there is one and it gives what Pillow gives, which another libjpeg might not."""
    import torch

    try:
        from torchvision.io import decode_jpeg
    except (ImportError, RuntimeError):
        return None

    def read(data: bytes) -> np.ndarray:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), "RGB").permute(1, 2, 0).numpy()

    noise = np.random.default_rng(0).integers(0, 256, (29, 37, 3), np.uint8)
    try:
        for progressive in (False, True):
            buffer = io.BytesIO()
            Image.fromarray(noise).save(buffer, "JPEG", quality=90, subsampling=2, progressive=progressive)
            with Image.open(buffer) as image:
                if not np.array_equal(read(buffer.getvalue()), np.asarray(image)):
                    return None
    except (RuntimeError, TypeError):  # it was built without it, or wants other arguments by now
        return None
    return read
