"""Everyday edits of images, each in five strengths, and Gaussian noise: what a picture goes through on the way to a guard.

Nobody needs to know the guard for these. An edit of the same image with the same seed always gives the same pixels:
what is drawn at random (where a crop lies, the colour of a border) comes from the seed and the image's own bytes, and is
the same at all strengths. Knows no guard and no encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from guardkit.images import ArrayContent
from guardkit.limits import shrink
from guardkit.schema import InputError

STRENGTHS = (1, 2, 3, 4, 5)
_VERSION = 1  # part of the key of an edited image: raise it when an edit changes
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class Edit:
    """One kind of edit.

    Attributes:
        apply: ((h, w, 3) uint8 RGB image, value of the parameter, generator) -> (h', w', 3) uint8 RGB.
        parameter: what the values mean.
        values: of strengths 1 to 5.
    """

    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    parameter: str
    values: tuple[float, float, float, float, float]


def perturb(image: np.ndarray, edit: str, strength: int, *, seed: int = 0) -> np.ndarray:
    """An everyday edit of an image.

    Args:
        image: (h, w, 3) uint8 RGB, of any size.
        edit: a name in `EDITS`.
        strength: 1 (slight) to 5 (strong); for "flip" five kinds, and not a scale.
        seed: of what is drawn at random.
    Returns:
        (h', w', 3) uint8 RGB; crop, border, flip and screenshot change the size. Images above the working size are brought to
        it first.
    Raises:
        InputError: unknown edit or strength.
    """
    check_edit(edit, strength)
    chosen = EDITS[edit]
    return chosen.apply(shrink(image), chosen.values[strength - 1], _generator(image, edit, seed))


def gaussian_noise(image: np.ndarray, std: float, *, seed: int = 0) -> np.ndarray:
    """Adds independent normal noise to every value of an image, rounds and clips.

    Args:
        image: (h, w, 3) uint8 RGB.
        std: standard deviation in 8-bit levels, at least 0.
        seed: of the noise; the same noise, scaled, at every std.
    Returns:
        (h, w, 3) uint8 RGB.
    Raises:
        InputError: a negative std.
    """
    if not std >= 0:
        raise InputError(f"the standard deviation of noise must be at least 0 of 255 levels, got {std}")
    rng, image = _generator(image, "noise", seed), shrink(image)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    return _to_bytes(image + std * noise)


def check_edit(edit: str, strength: int) -> None:
    """Raises InputError for an unknown edit or strength."""
    if edit not in EDITS:
        raise InputError(f"there is no edit {edit!r}; there are {', '.join(EDITS)}")
    if strength not in STRENGTHS:
        raise InputError(f"the strength of an edit must be one of {', '.join(map(str, STRENGTHS))}, got {strength!r}")


@dataclass(frozen=True, eq=False)
class PerturbedContent:
    """A content after an edit, or after noise.

    Attributes:
        original: what is edited.
        edit: a name in `EDITS`, or "noise".
        strength: of the edit; of noise the standard deviation in 8-bit levels.
        seed: of what is drawn at random.
    """

    original: ArrayContent
    edit: str
    strength: float
    seed: int

    def __str__(self) -> str:
        return str(self.original)

    @property
    def key(self) -> str:
        """Of the original and everything the edit depends on."""
        return f"edit-{_VERSION}:{self.edit}:{self.strength}:{self.seed}:{self.original.key}"

    def load(self) -> np.ndarray:
        """(h', w', 3) uint8 RGB."""
        if self.edit == "noise":
            return gaussian_noise(self.original.array, self.strength, seed=self.seed)
        return perturb(self.original.array, self.edit, int(self.strength), seed=self.seed)


# --- the edits --------------------------------------------------------------------------------------------------------


def _jpeg(image: np.ndarray, quality: float, _: np.random.Generator) -> np.ndarray:
    # OpenCV's channels are blue, green, red, and JPEG treats them unequally
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(image[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR) if done else None
    if decoded is None:
        raise ValueError(f"an image of shape {image.shape} cannot be written as JPEG")
    return np.ascontiguousarray(decoded[:, :, ::-1])


def _crop(image: np.ndarray, kept: float, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    new_h, new_w = max(1, round(kept * height)), max(1, round(kept * width))
    top, left = round(rng.random() * (height - new_h)), round(rng.random() * (width - new_w))
    return image[top : top + new_h, left : left + new_w].copy()


def _resize(image: np.ndarray, scale: float, _: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    small = cv2.resize(image, (max(1, round(scale * width)), max(1, round(scale * height))), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def _blur(image: np.ndarray, share: float, _: np.random.Generator) -> np.ndarray:
    sigma = share * min(image.shape[:2])
    size = 2 * max(1, round(3 * sigma)) + 1
    return cv2.GaussianBlur(image, (size, size), sigma, borderType=cv2.BORDER_REPLICATE)


def _grey(image: np.ndarray, share: float, _: np.random.Generator) -> np.ndarray:
    grey = image @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
    return _to_bytes((1 - share) * image + share * grey[:, :, None])


def _border(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    width = max(1, round(share * min(image.shape[:2])))
    colours = (_WHITE, _BLACK, tuple(int(value) for value in rng.integers(0, 256, 3)))
    return cv2.copyMakeBorder(image, width, width, width, width, cv2.BORDER_CONSTANT, value=colours[int(rng.integers(3))])


def _watermark(image: np.ndarray, opacity: float, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    scale = (height * width) ** 0.5 / 320  # a letter is about a fourteenth of a side high
    (text_w, text_h), _ = cv2.getTextSize("stock photo", cv2.FONT_HERSHEY_DUPLEX, scale, 1)
    step_x, step_y = text_w + 3 * text_h + 2, 4 * text_h + 2
    side = 2 * max(height, width)  # room to turn it
    mask = np.zeros((side, side), np.uint8)
    start_x, start_y = round(rng.random() * step_x), round(rng.random() * step_y)
    for row, y in enumerate(range(start_y, side + step_y, step_y)):
        for x in range(start_x - step_x - row % 2 * step_x // 2, side, step_x):
            cv2.putText(mask, "stock photo", (x, y), cv2.FONT_HERSHEY_DUPLEX, scale, 255, max(1, round(2 * scale)), cv2.LINE_AA)
    mask = cv2.warpAffine(mask, cv2.getRotationMatrix2D((side / 2, side / 2), 30, 1), (side, side))
    top, left = (side - height) // 2, (side - width) // 2
    cover = opacity / 255 * mask[top : top + height, left : left + width, None]
    return _to_bytes(image * (1 - cover) + 255 * cover)


def _mosaic(image: np.ndarray, share: float, _: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    block = max(2, round(share * min(height, width)))
    small = cv2.resize(image, (max(1, round(width / block)), max(1, round(height / block))), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


def _flip(image: np.ndarray, kind: float, _: np.random.Generator) -> np.ndarray:
    turned = {
        1: lambda: image[:, ::-1],
        2: lambda: np.rot90(image, -1),
        3: lambda: image[::-1],
        4: lambda: image[::-1, ::-1],
        5: lambda: image.transpose(1, 0, 2),
    }
    return np.ascontiguousarray(turned[int(kind)]())


def _screenshot(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The image as a post on a phone: bars, an avatar, lines of text, margins."""
    height, width = image.shape[:2]
    screen_w = max(width + 2, round(width / share))
    unit = max(1, screen_w // 24)
    above, below = 5 * unit, 8 * unit
    screen_h = max(2 * screen_w, above + height + below)
    is_dark = rng.random() < 0.5
    page, soft, ink = ((18, 18, 18), (70, 70, 70), (235, 235, 235)) if is_dark else ((255, 255, 255), (205, 205, 205), (30, 30, 30))
    canvas = np.full((screen_h, screen_w, 3), page, np.uint8)
    top, left = above + (screen_h - above - below - height) // 2, (screen_w - width) // 2
    _bar(canvas, unit // 3, unit, 2 * unit, ink, height=unit // 2)  # the clock
    _bar(canvas, unit // 3, screen_w - 3 * unit, 2 * unit, ink, height=unit // 2)  # signal and battery
    cv2.circle(canvas, (2 * unit, top - 2 * unit), unit, soft, -1, cv2.LINE_AA)
    _bar(canvas, top - 2 * unit - unit // 2, 4 * unit, 9 * unit, ink, height=unit // 2)  # who posted it
    _bar(canvas, top - unit, 4 * unit, 5 * unit, soft, height=unit // 3)
    canvas[top : top + height, left : left + width] = image
    for i in range(3):  # buttons
        cv2.circle(canvas, ((2 + 3 * i) * unit, top + height + 2 * unit), max(1, 2 * unit // 3), ink, max(1, unit // 6), cv2.LINE_AA)
    for i in range(3):  # what people say of it
        _bar(canvas, top + height + (4 + i) * unit, unit, round(unit * (8 + 13 * rng.random())), soft, height=unit // 2)
    cv2.rectangle(canvas, (0, screen_h - unit), (screen_w, screen_h), soft, -1)
    return canvas


def _bar(canvas: np.ndarray, top: int, left: int, width: int, colour: tuple[int, int, int], *, height: int) -> None:
    cv2.rectangle(canvas, (left, top), (left + width, top + max(1, height)), colour, -1)


EDITS: dict[str, Edit] = {
    "jpeg": Edit(_jpeg, "quality of the JPEG file", (80, 50, 30, 15, 8)),
    "crop": Edit(_crop, "share of each side that is kept, at a random place", (0.95, 0.9, 0.8, 0.7, 0.6)),
    "resize": Edit(_resize, "scale it is made smaller by, and enlarged again", (0.75, 0.5, 0.35, 0.25, 0.15)),
    "blur": Edit(_blur, "standard deviation of the Gaussian as a share of the shorter side", (0.005, 0.01, 0.015, 0.025, 0.04)),
    "grey": Edit(_grey, "share of the colour that is taken out", (0.25, 0.5, 0.75, 0.9, 1.0)),
    "border": Edit(_border, "width of a border of one colour as a share of the shorter side", (0.05, 0.1, 0.2, 0.3, 0.45)),
    "watermark": Edit(_watermark, "opacity of white text all over it", (0.2, 0.35, 0.5, 0.65, 0.8)),
    "mosaic": Edit(_mosaic, "side of a block as a share of the shorter side", (0.015, 0.02, 0.03, 0.045, 0.065)),
    "flip": Edit(_flip, "kind: 1 left-right, 2 quarter turn clockwise, 3 upside-down, 4 half turn, 5 transposed", (1, 2, 3, 4, 5)),
    "screenshot": Edit(_screenshot, "share of the width of a phone's screen that it fills", (0.95, 0.8, 0.65, 0.5, 0.35)),
}


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _digest(image: np.ndarray) -> bytes:
    digest = hashlib.sha256(str(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def _generator(image: np.ndarray, name: str, seed: int) -> np.random.Generator:
    # an array of integers of any size is a valid seed
    return np.random.default_rng([seed, int.from_bytes(name.encode()), int.from_bytes(_digest(image)[:16])])
