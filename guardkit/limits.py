"""How much work one image may make: its pixels, its sides, its bytes, and the pixels that all threads decode at once."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import cv2
import numpy as np

from guardkit.schema import ImageError, TooLargeError

MAX_PIXELS = 100_000_000
MAX_SIDE = 32_768  # pixels
MAX_ASPECT = 300  # longer side over shorter side: resized to a model's shorter side, the longer one must still fit into memory
MAX_SCANNED = 25 * MAX_PIXELS  # pixels of a JPEG times its scans: seconds of work
MAX_FRAMES = 200  # of an animation that is decided over frame by frame
MAX_BYTES = 1 << 30  # of an encoded image
WORKING_SIDE = 4096  # pixels, of the longer side: larger images are edited, changed and compared at this size
DECODING_BYTES = 1 << 30  # of pixels that are being decoded at once, in all threads together
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)  # none of those that stand within a scan
_LARGE_BYTES = 64 << 20  # what is freed of an image below this size, the allocator may keep
_BYTES_PER_PIXEL = 8  # a decoder's own four, what becomes of them, and some room


def check_scans(data: bytes, width: int, height: int) -> None:
    """Whether a JPEG may be decoded: each of its scans, of a hundred bytes or less, goes over all pixels anew.

    Raises:
        ImageError: its scans and pixels together are more than `MAX_SCANNED`.
    """
    most = MAX_SCANNED // (width * height)
    # scans alone begin with these bytes, but a thumbnail, or what lies behind the image, may hold some too
    if data.count(b"\xff\xda") > most and _n_scans(data) > most:
        raise TooLargeError(f"a JPEG of {width}x{height} in more than {most} scans")


def _n_scans(data: bytes) -> int:
    n, at = 0, 2
    while (marker := _JPEG_MARKER.search(data, at)) is not None and marker[1] != b"\xd9":
        n += marker[1] == b"\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])  # over the segment, which may hold anything
    return n


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Whether an image of that size can be worked on.

    Raises:
        ImageError: it has no pixels, more than `max_pixels`, a side longer than MAX_SIDE, or is thinner than 1 : MAX_ASPECT.
    """
    if not width or not height:
        raise ImageError("image has no pixels")
    if width * height > max_pixels:
        raise TooLargeError(f"{width}x{height} is more than {max_pixels} pixels")
    if max(width, height) > MAX_SIDE:
        raise TooLargeError(f"{width}x{height} has a side of more than {MAX_SIDE} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise TooLargeError(f"{width}x{height} is longer than {MAX_ASPECT} times its shorter side")


def check_bytes(n_bytes: int) -> None:
    """Whether so many encoded bytes are read at all.

    Raises:
        ImageError: none, or more than MAX_BYTES.
    """
    if not n_bytes:
        raise ImageError("empty file")
    if n_bytes > MAX_BYTES:
        raise TooLargeError(f"{n_bytes} encoded bytes are more than {MAX_BYTES}")


def shrink(image: np.ndarray, max_px: int = WORKING_SIDE) -> np.ndarray:
    """An image, of which the longer side has at most `max_px` pixels: the same array, or a smaller one by averages."""
    height, width = image.shape[:2]
    scale = max_px / max(height, width)
    if scale >= 1:
        return image
    return cv2.resize(image, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)


class _Budget:
    """Bytes that are taken and given back by all threads. Who wants more than there is waits, but never alone."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, n_bytes: int) -> Iterator[None]:
        with self._changed:
            # what is larger than the whole budget goes when nothing else is under way
            self._changed.wait_for(lambda: not self.taken or self.taken + n_bytes <= self.limit)
            self.taken += n_bytes
        try:
            yield
        finally:
            with self._changed:
                self.taken -= n_bytes
                self._changed.notify_all()


_decoding = _Budget(DECODING_BYTES)


@contextmanager
def decoding(width: int, height: int) -> Iterator[None]:
    """Waits until an image of that size may be decoded beside those that other threads decode; one always may."""
    n_bytes = width * height * _BYTES_PER_PIXEL
    with _decoding.take(n_bytes):
        if n_bytes > _LARGE_BYTES:
            _return_freed_memory()
        yield


def _return_freed_memory() -> None:
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """glibc's; without it each thread's heap keeps an image that it has freed. None on other systems."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def _start_anew() -> None:
    # threads that were decoding when a process was forked do not live in the child, and would never give back
    global _decoding
    _decoding = _Budget(DECODING_BYTES)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
