"""From the colours that an image's values stand for to sRGB, as viewers do: embedded profiles, and a PNG's own numbers.

A profile is judged by what it does, not by its name: one that changes no colour by more than rounding is left alone, so
that images tagged as sRGB keep their values, and one that merely calls itself sRGB is converted.

Source: ICC.1:2022 through LittleCMS (perceptual intent); PNG specification, third edition, sections 4.3, 11.3.2 and 13.13.
PNG's cICP chunk and the colour description of AVIF without a profile are not read.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

Conversion = Callable[[Image.Image], Image.Image]
"""An RGB image, or a CMYK one where the pixels are CMYK, to sRGB."""

_ROUNDING = 2  # levels of 255 by which profiles that mean sRGB differ from each other
_CUBE = 17  # steps of each channel on which a conversion is tried
_SAMPLE_PX = 64  # and side of a small version of the image itself, so that no profile hides between the steps
_SCREEN_GAMMA = 2.2
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # Pillow's modes by the ICC's names
_SRGB_CHROMATICITIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # white, red, green, blue
# from XYZ to what the eye's cones see (Bradford), where one white is adapted to another
_CONES = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def conversion_to_srgb(image: Image.Image) -> Conversion | None:
    """What takes the pixels of an image to sRGB; None where they are to be shown as they are.

    A broken profile and one for another kind of pixels are ignored. A PNG without a usable profile may say gamma and
    primaries instead, unless it says that it is sRGB.

    Args:
        image: any mode that can be converted to RGB, loaded, with `info` as Pillow fills it.
    """
    is_cmyk, is_grey = image.mode == "CMYK", image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and profile:
        # a grey PNG must not have a profile of RGB, and readers skip it; grey JPEG files are shown through one
        allowed = ("CMYK",) if is_cmyk else ("L",) if is_grey and image.format == "PNG" else ("L", "RGB") if is_grey else ("RGB",)
        found = _by_profile(profile)
        if found is not None and found[0] in allowed:
            convert = found[1]
            return convert if is_cmyk or _changes(convert, image, is_grey) else None
    if is_cmyk or image.format != "PNG" or "srgb" in image.info:
        return None
    convert_by_numbers = _by_gamma(image.info.get("gamma"), image.info.get("chromaticity"))
    return convert_by_numbers if convert_by_numbers is not None and _changes(convert_by_numbers, image, is_grey) else None


def as_rgb(image: Image.Image) -> Image.Image:
    """The colours of an image, without its transparency and without a conversion."""
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=8)
def _by_profile(profile: bytes) -> tuple[str, Conversion] | None:
    """Mode of the pixels that a profile is for, and the conversion; None when it is broken or for other things than pixels."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[opened.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
        # what cannot be applied is broken too
        ImageCms.applyTransform(Image.new(mode, (1, 1)), transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        return None

    def convert(image: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(image.getchannel(0) if mode == "L" else image, transform)
        assert converted is not None  # only in-place work gives none
        return converted

    return mode, convert


def _by_gamma(gamma: Any, chromaticities: Any) -> Conversion | None:
    """The conversion that a PNG's gAMA and cHRM chunks stand for; None without any or with impossible ones."""
    if gamma is None and chromaticities is None:
        return None
    gamma = 1 / _SCREEN_GAMMA if gamma is None else gamma
    if not gamma > 0:
        return None
    linear = np.linspace(0, 1, 256) ** (1 / gamma)
    matrix = np.eye(3)
    if chromaticities is not None:
        try:
            matrix = np.linalg.inv(_to_xyz(_SRGB_CHROMATICITIES)) @ _adapted(chromaticities) @ _to_xyz(chromaticities)
        except (np.linalg.LinAlgError, ZeroDivisionError, ValueError):
            return None
        if not np.isfinite(matrix).all():
            return None

    def convert(image: Image.Image) -> Image.Image:
        light = linear.astype(np.float32)[np.asarray(image)] @ matrix.T.astype(np.float32)
        return Image.fromarray(np.rint(255 * np.clip(light, 0, 1) ** (1 / _SCREEN_GAMMA)).astype(np.uint8))

    return convert


def _to_xyz(chromaticities: tuple[float, ...]) -> np.ndarray:
    """(3, 3): amounts of red, green and blue light to XYZ, with white at (1, 1, 1)."""
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(chromaticities[::2], chromaticities[1::2], strict=True))
    columns = np.stack(primaries, axis=1)
    return columns * np.linalg.solve(columns, white)


def _adapted(chromaticities: tuple[float, ...]) -> np.ndarray:
    """(3, 3): XYZ under an image's white to XYZ under that of sRGB."""
    here, there = (_CONES @ _to_xyz(one).sum(axis=1) for one in (chromaticities, _SRGB_CHROMATICITIES))
    return np.linalg.inv(_CONES) @ np.diag(there / here) @ _CONES


def _changes(convert: Conversion, image: Image.Image, is_grey: bool) -> bool:
    """Whether a conversion changes colours by more than rounding: of a cube of colours, or of the image."""
    samples = [_greys()]
    if not is_grey:
        width, height = image.size
        samples = [_cube(), as_rgb(image.resize((min(width, _SAMPLE_PX), min(height, _SAMPLE_PX)), Image.Resampling.NEAREST))]
    return any(np.abs(np.asarray(convert(one)).astype(int) - np.asarray(one)).max() > _ROUNDING for one in samples)


@cache
def _greys() -> Image.Image:
    return Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))


@cache
def _cube() -> Image.Image:
    steps = np.rint(np.linspace(0, 255, _CUBE)).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(_CUBE, -1, 3))
