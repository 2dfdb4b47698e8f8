"""Reading untrusted images: as a viewer would show them, or not at all, with a reason."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, TypeVar

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from guardkit.limits import MAX_FRAMES, MAX_PIXELS, check_bytes, check_size, shrink
from guardkit.pixels import as_shown, each_frame
from guardkit.schema import Content, ImageError, TooLargeError

SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
# raster formats that Pillow decodes itself; never those that call another program (EPS, PDF)
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_READER = 2  # counts up when the same bytes are read as other pixels

T = TypeVar("T")
ImageLike = str | Path | bytes | Image.Image | np.ndarray


def read_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> np.ndarray:
    """Reads an image as a viewer would show it.

    The type follows from the bytes, not from the name. EXIF rotation is applied, colours are converted to sRGB through an
    embedded profile if it is a valid one for such pixels, or by a PNG's gamma and primaries, 16-bit values are scaled,
    transparency lies on white, of an animation the first frame counts. Greyscale integers of 32 bits have no fixed
    white: it is 255 where no value is larger, else 65,535. What cannot be worked on is rejected (see `limits`).

    Args:
        source: a path, encoded bytes, a PIL image, or an (h, w, 3) or (h, w) uint8 array.
        max_pixels: an image with more is rejected before it is decoded; what exceeds Pillow's own limit of
            2 * PIL.Image.MAX_IMAGE_PIXELS (about 179 million) is rejected in any case.
        at_least: pixels of a side that are enough: a JPEG whose sides are twice, four or eight times as long is decoded at a half, a quarter
            or an eighth. None: as it is.
    Returns:
        (h, w, 3) uint8 RGB.
    Raises:
        ImageError: the reason why there is no image to be had.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    return _of_opened(source, max_pixels, lambda image: as_shown(image, max_pixels, at_least))


def load(content: Content, at_least: int | None = None) -> np.ndarray:
    """(h, w, 3) uint8 RGB of a content, `at_least` as for `read_image`, where it is an encoded image. Raises ImageError."""
    reduced = None if at_least is None else getattr(content, "load_reduced", None)
    return content.load() if reduced is None else reduced(at_least)


def read_frames(
    source: ImageLike,
    take: Callable[[np.ndarray], T],
    *,
    max_pixels: int = MAX_PIXELS,
    max_frames: int = MAX_FRAMES,
    at_least: int | None = None,
) -> list[T]:
    """Reads every frame of an animation, or page of a TIFF, as a viewer would show it; of a still image the one there is.

    Args:
        source: as for `read_image`.
        take: is given each frame, (h, w, 3) uint8 RGB; what it gives is kept.
        max_pixels: a frame with more is rejected before it is decoded, and so is an animation with ten times as many.
        max_frames: an animation with more is rejected.
        at_least: as for `read_image`.
    Returns:
        What `take` gave, in order; the first frame is that of `read_image`.
    Raises:
        ImageError: the reason why there is no image to be had. One damaged frame is enough.
    """
    if isinstance(source, np.ndarray):
        return [take(_from_array(source, max_pixels))]
    return _of_opened(source, max_pixels, lambda image: each_frame(image, max_pixels, max_frames, take, at_least))


def _of_opened(source: ImageLike, max_pixels: int, work: Callable[[Image.Image], T]) -> T:
    """What `work` makes of an opened image; whatever goes wrong is an ImageError."""
    try:
        with _quietly():
            if isinstance(source, Image.Image):
                return work(source)
            assert not isinstance(source, np.ndarray)
            with _opened(source) as file, Image.open(file, formats=_FORMATS) as image:
                return work(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image of a known type") from error
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"more than {min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))} pixels") from error
    except Exception as error:  # decoders raise whatever damaged bytes lead them into, RuntimeError and struct.error too
        raise ImageError(f"damaged image: {' '.join(str(error).split())[:120] or type(error).__name__}") from error


class _Quiet:
    """Silences what Pillow, OpenCV and torchvision say about an image, for as long as some thread reads one.

    `warnings.catch_warnings` alone is not safe here: of two threads that overlap, the one that leaves last restores
    the filters of the other, for good. So the first reader sets the filter and the last one takes it away.
    """

    def __init__(self) -> None:
        self.readers = 0
        self._lock = threading.Lock()
        self._filters = warnings.catch_warnings()
        self._level = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self.readers:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                warnings.filterwarnings("ignore", module=r"torchvision\.io")  # which calls its decoder outdated
                self._level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
            self.readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.readers -= 1
            if not self.readers:
                self._filters.__exit__(None, None, None)
                cv2.utils.logging.setLogLevel(self._level)


_quiet = _Quiet()


def _quietly() -> _Quiet:
    return _quiet


def _start_anew() -> None:
    # a lock that another thread held when a process was forked is never released in the child
    global _quiet
    _quiet = _Quiet()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def _opened(source: str | Path | bytes) -> BinaryIO:
    if isinstance(source, (bytes, bytearray, memoryview)):
        check_bytes(len(source))
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        return open_file(Path(source))
    raise ImageError(f"an image must be a path, bytes, a PIL image or an array, got {type(source).__name__}")


def open_file(path: Path) -> io.BufferedReader:
    """A regular file that is not too large, opened. Raises ImageError for anything else."""
    try:
        status = path.stat()
        # only a regular file is opened: a pipe would block, a device might never end
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("is a folder, not a file" if stat.S_ISDIR(status.st_mode) else "is a pipe or device, not a file")
        check_bytes(status.st_size)
        return open(path, "rb")
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("file does not exist") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _from_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(f"array must be (h, w, 3) or (h, w) uint8, got {array.dtype} of shape {array.shape}")
    check_size(array.shape[1], array.shape[0], max_pixels)
    return np.ascontiguousarray(array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2))


def bytes_key(data: bytes) -> str:
    """The key of encoded bytes as a content, the same as that of a file that holds them."""
    return f"file-{_READER}:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True)
class FileContent:
    """An image file, read when somebody asks."""

    path: Path
    max_pixels: int = MAX_PIXELS

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def key(self) -> str:
        """Of the file's bytes and the version of the reader; not of `max_pixels`, which decides whether there are
        pixels, not which. Raises ImageError when the file cannot be read."""
        try:
            with open_file(self.path) as file:
                return f"file-{_READER}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB. Raises ImageError."""
        return read_image(self.path, max_pixels=self.max_pixels)

    def load_reduced(self, at_least: int) -> np.ndarray:
        """The same, a JPEG decoded at a fraction; see `read_image`."""
        return read_image(self.path, max_pixels=self.max_pixels, at_least=at_least)


@dataclass(frozen=True, eq=False)
class BytesContent:
    """An encoded image that is in memory already.

    Attributes:
        data: of the file.
        name: for people.
        max_pixels: larger images are not read.
    """

    data: bytes
    name: str
    max_pixels: int = MAX_PIXELS

    def __str__(self) -> str:
        return self.name

    @cached_property
    def key(self) -> str:
        """That of a file with these bytes."""
        return bytes_key(self.data)

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB. Raises ImageError."""
        return read_image(self.data, max_pixels=self.max_pixels)

    def load_reduced(self, at_least: int) -> np.ndarray:
        """The same, a JPEG decoded at a fraction; see `read_image`."""
        return read_image(self.data, max_pixels=self.max_pixels, at_least=at_least)


@dataclass(frozen=True, eq=False)
class ArrayContent:
    """Pixels that are in memory already."""

    array: np.ndarray

    def __str__(self) -> str:
        return f"an array of shape {self.array.shape}"

    @cached_property
    def key(self) -> str:
        """Of shape and values."""
        return f"array:{hashlib.sha256(repr(self.array.shape).encode() + np.ascontiguousarray(self.array).tobytes()).hexdigest()}"

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB. Raises ImageError."""
        return read_image(self.array)


def encode_png(image: np.ndarray) -> bytes:
    """(h, w, 3) uint8 RGB -> a PNG, lossless and quick rather than small."""
    # checked, because OpenCV stores 16-bit values as such, and other types in ways that do not come back
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image must be (h, w, 3) uint8, got {image.dtype} of shape {image.shape}")
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise ValueError(f"an image of shape {image.shape} could not be encoded")
    return data.tobytes()


def decode_png(data: bytes) -> np.ndarray:
    """The inverse of `encode_png`. Raises ImageError when the bytes are damaged."""
    return read_image(data)


def encode_jpeg(image: np.ndarray, *, max_px: int) -> bytes:
    """(h, w, 3) uint8 RGB -> a JPEG to look at, whose longer side has at most `max_px` pixels."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(shrink(image, max_px), cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    if not done:
        raise ValueError(f"an image of shape {image.shape} could not be encoded")
    return data.tobytes()
