"""From an image that Pillow has opened to what a viewer shows: first frame, sRGB, upright, on white.

It works in strips: what the decoder gave and the result are all that is there as a whole. Usual JPEG files need not even that.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import cv2
import numpy as np
from PIL import ExifTags, Image

from guardkit import jpeg
from guardkit.colour import Conversion, as_rgb, conversion_to_srgb
from guardkit.limits import check_scans, check_size, decoding
from guardkit.schema import ImageError, TooLargeError

T = TypeVar("T")

_STRIP_PX = 1 << 20  # pixels that are converted at once
# from the upright pixels to the stored ones, by EXIF orientation: views, so that what is written to them stands upright
_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
_ANIMATED = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def as_shown(image: Image.Image, max_pixels: int, at_least: int | None = None) -> np.ndarray:
    """(h, w, 3) uint8 RGB of an image that Pillow has opened.

    Args:
        image: opened.
        max_pixels: more are not decoded.
        at_least: pixels of a side that are enough, see `guardkit.images.read_image`.
    Raises:
        ImageError: it cannot be worked on, or has colours that nobody can show; damaged files raise all that decoders raise.
    """
    check_size(*image.size, max_pixels)
    with decoding(*image.size), _first_frame(image) as data:
        if data is not None and at_least is not None:
            image.draft(None, (at_least, at_least))  # the decoder leaves out what the smaller image does not show
        # a colour profile is judged by a loaded image
        if data is not None and image.mode == "RGB" and "icc_profile" not in image.info:
            stored = jpeg.decode(data, *image.size)
            if stored is not None:
                return _turned(stored, _orientation(image))
        image.load()
        return _upright(image)


def each_frame(image: Image.Image, max_pixels: int, most: int, take: Callable[[np.ndarray], T], at_least: int | None = None) -> list[T]:
    """What `take` makes of every frame of an animation, or page, of an image that Pillow has opened; of a still image, of the one there is.

    The first is that of `as_shown`. A default image that an animated PNG keeps for those who know no animations comes last.

    Args:
        image: opened.
        max_pixels: of a frame; all frames together may have ten times as many.
        most: frames.
        take: is given (h, w, 3) uint8 RGB, which it need not keep.
        at_least: as for `as_shown`.
    Raises:
        ImageError: more frames, or more pixels; damaged files raise all that decoders raise.
    """
    n = int(getattr(image, "n_frames", 1)) if image.format in _ANIMATED else 1
    if n > most:
        raise TooLargeError(f"an animation of {n} frames is more than {most}")
    if n > 1 and n * image.width * image.height > 10 * max_pixels:
        raise TooLargeError(f"an animation of {n} frames of {image.width}x{image.height} is more than {10 * max_pixels} pixels")
    if not (n > 1 and getattr(image, "default_image", False)):
        return [take(as_shown(image, max_pixels, at_least)), *(_frame(image, i, max_pixels, take) for i in range(1, n))]
    default = _frame(image, 0, max_pixels, take)
    image.paste(_empty(image), (0, 0, *image.size))  # it is not the canvas of the animation, see `_first_frame`
    return [*(_frame(image, i, max_pixels, take) for i in range(1, n)), default]


def _frame(image: Image.Image, number: int, max_pixels: int, take: Callable[[np.ndarray], T]) -> T:
    image.seek(number)
    check_size(*image.size, max_pixels)
    with decoding(*image.size):
        image.load()
        return take(_upright(image))


@contextmanager
def _first_frame(image: Image.Image) -> Iterator[bytes | None]:
    """The frame that a viewer shows first, where Pillow does not come to it by itself. Gives the bytes of a JPEG."""
    if image.format == "AVIF":
        _check_avif(image)
    data = _encoded(image) if image.format in ("JPEG", "MPO") else None
    if data is not None:
        check_scans(data, *image.size)
    if image.format != "PNG" or image.tell() or not getattr(image, "default_image", False) or not _goes_on(image):
        yield data
        return
    # the default image of such an animation is for those who know no animations; the first frame lies on an empty canvas
    image.paste(_empty(image), (0, 0, *image.size))
    image.seek(1)
    try:
        yield None
    finally:
        image.seek(0)


def _goes_on(image: Image.Image) -> bool:
    try:
        image.seek(1)
    except ValueError:  # a closed file: what was loaded is all there is
        return False
    image.seek(0)
    return True


def _empty(image: Image.Image) -> int | tuple[int, ...]:
    """A colour that is seen as white where nothing lies on it."""
    if image.mode == "P":
        clear = image.info.get("transparency", 0)
        return clear.index(min(clear)) if isinstance(clear, bytes) else clear
    if image.mode.startswith("I"):
        return 65535
    by_bands: dict[int, int | tuple[int, ...]] = {1: 255, 2: (255, 0), 3: (255, 255, 255), 4: (255, 255, 255, 0)}
    return by_bands[len(image.getbands())]


def _check_avif(image: Image.Image) -> None:
    """Pillow's decoder makes something of many a damaged payload; OpenCV's is strict.

    Raises:
        ImageError: OpenCV reads AVIF, but not this one.
    """
    data = _encoded(image) if _opencv_reads_avif() else None
    if data is not None and cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is None:
        raise ImageError("damaged image: AVIF that does not decode without errors")


def _encoded(image: Image.Image) -> bytes | None:
    """The bytes of an image that is not decoded yet; None where they are gone."""
    file = getattr(image, "fp", None)
    if not getattr(image, "tile", None) or file is None:
        return None
    file.seek(0)
    return bytes(file.read())


@cache
def _opencv_reads_avif() -> bool:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "AVIF")
    return cv2.imdecode(np.frombuffer(buffer.getvalue(), np.uint8), cv2.IMREAD_COLOR) is not None


def _turned(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels, upright."""
    if orientation not in _STORED:
        return stored
    height, width = stored.shape[:2]
    upright = np.empty((width, height, 3) if orientation in (5, 6, 7, 8) else stored.shape, np.uint8)
    _STORED[orientation](upright)[:] = stored
    return upright


def _upright(image: Image.Image) -> np.ndarray:
    """(h, w, 3) uint8 RGB of a loaded image, converted strip by strip, and upright."""
    width, height = image.size
    orientation = _orientation(image)
    upright = np.empty((width, height, 3) if orientation in (5, 6, 7, 8) else (height, width, 3), np.uint8)
    stored = _STORED[orientation](upright) if orientation in _STORED else upright
    to_rgb = _converter(image)
    for top, strip in _strips(image):
        stored[top : top + strip.height] = np.asarray(to_rgb(strip))
    if image.format == "GIF" and not image.tell():
        # Pillow fills what a first frame leaves bare with a colour of the palette; viewers leave it transparent
        left, top, right, bottom = getattr(image, "dispose_extent", None) or (0, 0, width, height)
        stored[:top] = stored[bottom:] = stored[:, :left] = stored[:, right:] = 255
    return upright


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image in parts of about `_STRIP_PX`, each with its topmost row."""
    rows = max(1, _STRIP_PX // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation. To be asked after loading: Pillow turns TIFF files itself, and clears the tag."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data raise anything, and do not make the pixels worthless: a viewer shows them unturned
        return 1


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB of a strip of a loaded image; decided once, over the whole of it."""
    mode = image.mode
    if mode == "F":
        raise ImageError("floating-point pixels, which have no defined white")
    if mode == "LAB":
        raise ImageError("Lab colours, which are not supported")
    convert = conversion_to_srgb(image)
    if mode == "CMYK":
        return convert or as_rgb
    if mode.startswith("I"):
        return _grey_converter(image, convert)
    is_transparent = mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if image.format == "BMP" and mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        is_transparent = False  # all of it clear: the writer knew of no transparency, and viewers show the colours

    def to_rgb(strip: Image.Image) -> Image.Image:
        if not is_transparent:
            return convert(as_rgb(strip)) if convert else as_rgb(strip)
        rgba = (strip.convert("LA") if mode == "La" else strip).convert("RGBA")
        return _on_white(convert(rgba.convert("RGB")) if convert else rgba, rgba.getchannel("A"))

    return to_rgb


def _on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _grey_converter(image: Image.Image, convert: Conversion | None) -> Callable[[Image.Image], Image.Image]:
    """Scales, where Pillow would clip at 255, and sees to what Pillow does for 8-bit greyscale only."""
    tags = getattr(image, "tag_v2", {})
    extremes = [(int(values.min()), int(values.max())) for values in (np.asarray(strip) for _, strip in _strips(image))]
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    white = 4095 if tags.get(_TIFF_BITS) == (12,) else 65535
    if image.mode == "I" and image.format != "PPM" and high <= 255:
        white = 255  # 32 bits that hold bytes
    if low < 0 or high > white:
        raise ImageError(f"greyscale values outside 0 to {white}, which have no defined white")

    def to_rgb(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip)
        grey = np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)
        if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        rgb = as_rgb(Image.fromarray(grey))
        rgb = convert(rgb) if convert else rgb
        if "transparency" not in image.info:
            return rgb
        return Image.composite(Image.new("RGB", rgb.size, "white"), rgb, Image.fromarray(values == image.info["transparency"]))

    return to_rgb
