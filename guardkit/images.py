"""Reading images that nobody vouches for: as a viewer would show them, or not at all, with a reason."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from guardkit.schema import ImageError

MAX_PIXELS = 100_000_000
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
# raster formats that Pillow decodes itself; never those that call another program (EPS, PDF)
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_WHITE = (255, 255, 255, 255)
_READER = 1  # counts up when the same bytes are read as other pixels
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0

ImageLike = str | Path | bytes | Image.Image | np.ndarray


def read_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads an image as a viewer would show it.

    The type follows from the bytes, not from the name. EXIF rotation is applied, CMYK is converted through its colour
    profile if it has a valid one, 16-bit values are scaled, transparency lies on white, of an animation the first
    frame counts.

    Args:
        source: a path, encoded bytes, a PIL image, or an (h, w, 3) or (h, w) uint8 array.
        max_pixels: an image with more is rejected before it is decoded; what exceeds Pillow's own limit of
            2 * PIL.Image.MAX_IMAGE_PIXELS (about 179 million) is rejected in any case.
    Returns:
        (h, w, 3) uint8 RGB.
    Raises:
        ImageError: the reason why there is no image to be had.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    try:
        with _without_pillow_warnings():
            if isinstance(source, Image.Image):
                return _convert(source, max_pixels)
            with _opened(source) as file, Image.open(file, formats=_FORMATS) as image:
                return _convert(image, max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image of a known type") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))} pixels") from error
    except Exception as error:  # decoders raise whatever damaged bytes lead them into, RuntimeError and struct.error too
        raise ImageError(f"damaged image: {' '.join(str(error).split())[:120] or type(error).__name__}") from error


_quiet_lock = threading.Lock()
_quiet_readers = 0
_quiet_filters: warnings.catch_warnings | None = None


@contextmanager
def _without_pillow_warnings() -> Iterator[None]:
    """Silences what Pillow says about an image, for as long as some thread reads one.

    `warnings.catch_warnings` alone is not safe here: of two threads that overlap, the one that leaves last restores
    the filters of the other, for good. So the first reader sets the filter and the last one takes it away.
    """
    global _quiet_readers, _quiet_filters
    with _quiet_lock:
        if not _quiet_readers:
            _quiet_filters = warnings.catch_warnings()
            _quiet_filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_readers += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_readers -= 1
            if not _quiet_readers and _quiet_filters is not None:
                _quiet_filters.__exit__(None, None, None)
                _quiet_filters = None


def _opened(source: str | Path | bytes) -> BinaryIO:
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise ImageError("empty file")
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        return _open_file(Path(source))
    raise ImageError(f"an image must be a path, bytes, a PIL image or an array, got {type(source).__name__}")


def _open_file(path: Path) -> io.BufferedReader:
    try:
        status = path.stat()
        # only a regular file is opened: a pipe would block, a device might never end
        file = open(path, "rb") if stat.S_ISREG(status.st_mode) and status.st_size else None  # noqa: SIM115 - the caller closes it
    except FileNotFoundError as error:
        raise ImageError("file does not exist") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if file is None:
        if stat.S_ISDIR(status.st_mode):
            raise ImageError("is a folder, not a file")
        raise ImageError("empty file" if stat.S_ISREG(status.st_mode) else "is a pipe or device, not a file")
    return file


def _from_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(f"array must be (h, w, 3) or (h, w) uint8, got {array.dtype} of shape {array.shape}")
    _check_size(array.shape[1], array.shape[0], max_pixels)
    return np.ascontiguousarray(array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if not width or not height:
        raise ImageError("image has no pixels")
    if width * height > max_pixels:
        raise ImageError(f"{width}x{height} is more than {max_pixels} pixels")


def _convert(image: Image.Image, max_pixels: int) -> np.ndarray:
    _check_size(*image.size, max_pixels)
    image.load()
    turn = _turn(image)
    rgb = _to_rgb(image)
    # a copy, because the array that Pillow lends is read-only, which torch warns about
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the pixels upright. To be asked after loading: Pillow turns TIFF files itself, and clears the tag."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data raise anything, and do not make the pixels worthless: a viewer shows them unturned
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I"):
        return _grey16_to_rgb(image)
    if mode == "F":
        raise ImageError("floating-point pixels, which have no defined white")
    if mode == "LAB":
        raise ImageError("Lab colours, which are not supported")
    if mode == "CMYK":
        return _cmyk_to_rgb(image)
    if mode == "La":
        image = image.convert("LA")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Scales, where Pillow would clip at 255, and sees to what Pillow does for 8-bit greyscale only."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(_TIFF_BITS) == (12,) else 65535
    if values.min() < 0 or values.max() > white:
        raise ImageError(f"greyscale values outside 0 to {white}, which have no defined white")
    grey = np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a broken profile does not make the pixels worthless: a viewer falls back to the plain formula
    return image.convert("RGB")


def bytes_key(data: bytes) -> str:
    """The key of encoded bytes as a content, the same as that of a file that holds them."""
    return f"file-{_READER}:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True)
class FileContent:
    """An image file, read when somebody asks."""

    path: Path
    max_pixels: int = MAX_PIXELS

    @cached_property
    def key(self) -> str:
        """Of the file's bytes and the version of the reader; not of `max_pixels`, which decides whether there are
        pixels, not which. Raises ImageError when the file cannot be read."""
        try:
            with _open_file(self.path) as file:
                return f"file-{_READER}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB. Raises ImageError."""
        return read_image(self.path, max_pixels=self.max_pixels)


@dataclass(frozen=True, eq=False)
class ArrayContent:
    """Pixels that are in memory already."""

    array: np.ndarray

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
