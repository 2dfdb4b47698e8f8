"""What callers hand over as images, from file objects to tensors, as what `read_image` reads."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from guardkit.images import ImageLike
from guardkit.schema import ImageError, InputError, TooLargeError

_ACCEPTED = "a path, the bytes of an image file, a file opened in binary mode, a PIL image, an array or a tensor"
_CHANNELS = (1, 3, 4)
_MAX_FILE_BYTES = 512 << 20  # more than an uncompressed image of 100 megapixels takes
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def each_image(images: Any) -> Iterator[Any]:
    """One image or many, one by one, not read yet.

    Args:
        images: anything that `readable` takes is one image; arrays and tensors with four dimensions and all other iterables
            hold many.
    Raises:
        InputError: neither, or a collection that leaves the order or the meaning open.
    """
    if isinstance(images, (Mapping, Set)):
        kind = "list(images.values())" if isinstance(images, Mapping) else "sorted(images)"
        raise InputError(f"images must be one image or an ordered collection of them, got a {type(images).__name__}; pass {kind}")
    if _is_array(images):
        # a batch, or a column of paths; everything else with numbers in it is one image
        is_column = images.ndim == 1 and isinstance(images, np.ndarray) and images.dtype.kind in "OUS"
        return iter(images) if images.ndim == 4 or is_column else iter([images])
    if _is_one(images):
        return iter([images])
    if hasattr(images, "__array__"):
        try:
            return each_image(_from_anybody(images))
        except ImageError:  # it is one image, whose decision says why it cannot be read
            return iter([images])
    try:
        return iter(images)
    except TypeError as error:
        raise InputError(f"an image must be {_ACCEPTED}, got {type(images).__name__}") from error


def holds_many(images: Any) -> bool:
    """Whether `each_image` takes it as a collection, be it empty, and not as one image."""
    if _is_one(images):
        return False
    if not hasattr(images, "__array__"):
        return True
    kind = getattr(getattr(images, "dtype", None), "kind", "")
    return getattr(images, "ndim", 0) == 4 or (getattr(images, "ndim", 0) == 1 and kind in tuple("OUS"))


def readable(image: Any, max_pixels: int) -> ImageLike:
    """One image as `read_image` takes it.

    Args:
        image: a path, encoded bytes, a file object (read whole), a PIL image, an array or tensor of (h, w), (h, w, c) or
            (c, h, w) with 1, 3 or 4 channels, uint8 or floating-point in [0, 1].
        max_pixels: larger arrays are not converted.
    Raises:
        ImageError: it is none of these; says what to pass instead.
    """
    if isinstance(image, str) and _URL.match(image) and not os.path.exists(image):
        raise ImageError("is a URL, and nothing is fetched; download it and pass the file or its bytes")
    if isinstance(image, (str, os.PathLike)):
        return Path(os.fsdecode(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, Image.Image):
        return image
    if hasattr(image, "read"):
        return _read_whole(image)
    if _is_tensor(image):
        return _pixels(_from_tensor(image), max_pixels, is_tensor=True)
    if hasattr(image, "__array__"):
        return _pixels(_from_anybody(image), max_pixels, is_tensor=False)
    raise ImageError(f"an image must be {_ACCEPTED}, got {type(image).__name__}")


def _is_tensor(image: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)


def _is_array(image: Any) -> bool:
    return isinstance(image, np.ndarray) or _is_tensor(image)


def _is_one(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or hasattr(image, "read")


def _read_whole(file: Any) -> bytes:
    parts: list[bytes] = []
    left = _MAX_FILE_BYTES + 1
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)  # like Pillow: whoever has just written or read the file stands at its end
        while left and (part := file.read(left)):
            if not isinstance(part, (bytes, bytearray, memoryview)):
                close = getattr(part, "close", None)  # of a coroutine, which would complain that nobody awaited it
                if close is not None:
                    close()
                raise ImageError(f"the file gives {type(part).__name__} instead of bytes; open it in binary mode, or pass its bytes")
            parts.append(bytes(part))
            left -= len(part)
    except ImageError:
        raise
    except Exception as error:  # a file object of anybody's raises anything
        raise ImageError(f"cannot be read: {' '.join(str(error).split())[:120] or type(error).__name__}") from error
    if not left:
        raise TooLargeError(f"the file has more than {_MAX_FILE_BYTES} bytes")
    return b"".join(parts)


def _from_tensor(tensor: Any) -> np.ndarray:
    try:
        values = tensor.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    except Exception as error:  # sparse, quantised, on a device that holds no values, ...
        raise ImageError(f"the tensor cannot be read ({' '.join(str(error).split())[:120]}); pass a dense one on the CPU") from error


def _from_anybody(image: Any) -> np.ndarray:
    if isinstance(image, np.ma.MaskedArray) and np.ma.is_masked(image):
        raise ImageError("the array hides pixels behind a mask; pass array.filled(value), as it is to be seen")
    try:
        return np.asarray(image)
    except Exception as error:  # an object of anybody's raises anything
        raise ImageError(f"the array cannot be read ({' '.join(str(error).split())[:120] or type(error).__name__})") from error


def _pixels(array: np.ndarray, max_pixels: int, *, is_tensor: bool) -> ImageLike:
    """Rows, columns and channels of uint8; with four channels as a PIL image, whose transparency the reader knows."""
    is_float = array.dtype.kind == "f"
    if array.dtype != np.uint8 and not is_float:
        raise ImageError(
            f"pixels must be uint8 in 0 to 255 or floating-point in 0 to 1, got {array.dtype}; convert them, as in x.astype('uint8')"
        )
    array = _channels_last(array, is_tensor=is_tensor)
    height, width = array.shape[:2]
    if not array.size:
        raise ImageError("image has no pixels")
    if height * width > max_pixels:
        raise TooLargeError(f"{width}x{height} is more than {max_pixels} pixels")
    if is_float:
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"floating-point pixels must lie in 0 to 1, got {low:g} to {high:g}; divide by 255, or pass the image as it was before it was standardised"
            )
        array = np.rint(array * np.float32(255)).astype(np.uint8)
    if array.shape[2] == 4:
        return Image.fromarray(np.ascontiguousarray(array))
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def _channels_last(array: np.ndarray, *, is_tensor: bool) -> np.ndarray:
    """(h, w), (h, w, c) or (c, h, w) -> (h, w, c)."""
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ImageError(
            f"an image must have the shape (h, w), (h, w, c) or (c, h, w), got {array.shape}; a batch has four dimensions and is no image within a list"
        )
    first, last = array.shape[0] in _CHANNELS, array.shape[2] in _CHANNELS
    if first and last and is_tensor:
        raise ImageError(
            f"a tensor of shape {tuple(array.shape)} may be (c, h, w) or (h, w, c); pass a NumPy array, which is read as (h, w, c)"
        )
    if last:
        return array
    if first:
        return np.moveaxis(array, 0, 2)
    raise ImageError(
        f"an image of shape {tuple(array.shape)} has no dimension of 1, 3 or 4 channels; a batch has four dimensions, (n, h, w, c) or (n, c, h, w)"
    )
