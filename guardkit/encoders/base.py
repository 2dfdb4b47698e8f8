"""What an encoder is: frozen, images to unit vectors; what some can do beside that; and what all do alike."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np

from guardkit.checks import is_whole
from guardkit.schema import InputError, shortened

if TYPE_CHECKING:
    import torch

    from guardkit.policy import Policy
log = logging.getLogger(__name__)

# At other batch sizes (5, 6, 7, 9, ...; which ones depends on the number of threads) the CPU's matrix product rounds the
# last rows differently, so that a vector depends on its place in the batch; multiples of 4 were never seen to.
_FIXED_MULTIPLE = 8
PREPROCESS_FIELDS = ("size", "mean", "std", "interpolation", "resize_mode")
_N_SHOWN = 3  # texts in a warning
FULL, REDUCED = DECODES = ("full", "reduced")  # how JPEG files are decoded
PIL, TORCHVISION = BACKENDS = ("pil", "torchvision")  # what resizes images
FLOAT32, BFLOAT16 = DTYPES = ("float32", "bfloat16")  # what an image tower computes in
_INTERPOLATIONS, _RESIZE_MODES = ("bicubic", "bilinear"), ("shortest", "longest", "squash")


def _one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


# OpenMP's threads do not survive a fork: a child that asked for more than its own would wait for them for ever
os.register_at_fork(after_in_child=_one_thread)


class Encoder(Protocol):
    """A frozen encoder of images. Some also encode texts (`EncodesTexts`) or have gradients (`Differentiable`).

    Images become unit vectors, or with `normalize=False` vectors as the model gives them: some published heads were
    trained on these. A unit vector is such a vector divided by its length.

    Attributes:
        name: for people, such as "ViT-B-32 (openai)".
        dim: d, width of the embeddings.
        fingerprint: a hash over weights, architecture and preprocessing, 64 hex digits.
        config: constructor arguments that build it again, in plain JSON types.
        preprocessing: what `preprocess` does, in plain JSON types: size (height and width that the model sees), mean and std
            (of red, green and blue in [0, 1]), interpolation, resize_mode, and whatever else changes a bit.
        batch_size: images encoded at once.
    """

    name: str
    batch_size: int

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def preprocessing(self) -> dict[str, Any]: ...

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """(h, w, 3) uint8 RGB -> (3, height, width) float32, resized and normalised as the model expects."""
        ...

    def encode_preprocessed(self, images: Sequence[torch.Tensor], *, fixed_batch: bool = False, normalize: bool = True) -> np.ndarray:
        """What `preprocess` gave -> (n, d) float32; see `encode_images`."""
        ...

    def encode_images(self, images: Sequence[np.ndarray], *, fixed_batch: bool = False, normalize: bool = True) -> np.ndarray:
        """(h, w, 3) uint8 RGB images -> (n, d) float32.

        Args:
            images: of any sizes.
            fixed_batch: always run the model on equally many images, so that a vector does not depend, to the last
                bit, on which and how many others were encoded with it.
            normalize: whether to unit length.
        """
        ...


class EncodesTexts(Protocol):
    """An encoder whose texts and images are vectors of one space. One without texts has no such method; see `require_texts`."""

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32 unit vectors. Texts that are longer than the model reads are named in a warning.

        An encoder that has them also has a method `cut_off`: texts -> a sentence that names them, or None.
        """
        ...


@runtime_checkable
class Differentiable(Protocol):
    """An encoder with gradients."""

    def encode_pixels(self, pixels: torch.Tensor, *, normalize: bool = True, prepared: bool = False) -> torch.Tensor:
        """(n, 3, h, w) float in [0, 1] -> (n, d), differentiable with respect to the pixels.

        Args:
            pixels: of any size.
            normalize: to unit length.
            prepared: they are of the model's own size: neither resized nor cropped, only standardised. Any number is a
                pixel then.
        """
        ...


@runtime_checkable
class Portable(Protocol):
    """An encoder that writes all it is built from into a folder, from which it is built without a network."""

    def save(self, folder: Path) -> Encoder:
        """Writes weights, configuration and tokenizer, and gives the encoder that reads them there.

        Args:
            folder: is there; files of the same names are replaced.
        Raises:
            InputError: a part of it cannot be written, or not be had.
        """
        ...

    def reads(self, folder: Path) -> bool:
        """Whether its files lie in that folder."""
        ...


@runtime_checkable
class Traceable(Encoder, Protocol):
    """An encoder whose model is one of torch, so that torch can export it."""

    def image_module(self) -> torch.nn.Module:
        """A module on the processor: (n, 3, height, width) float32 of `preprocess` -> (n, d) vectors as the model gives them."""
        ...


@runtime_checkable
class ReadsPolicy(Protocol):
    """An encoder that is told the policy, so that its vectors depend on it.

    Attributes:
        rules: the policy's text; None: it was told none yet.
        reads_policy: whether it does; one whose prompt was written without a place for a policy does not.
    """

    rules: str | None

    @property
    def reads_policy(self) -> bool: ...

    def for_policy(self, policy: Policy) -> Encoder:
        """The encoder that is told this policy."""
        ...


def enough(encoder: object) -> int | None:
    """Pixels of a side that an encoder wants of an encoded image, see `guardkit.images.read_image`; None: all there are."""
    found: int | None = getattr(encoder, "at_least", None)
    return found


def told(encoder: Encoder, policy: Policy) -> Encoder:
    """The encoder as it is under a policy: told it, where it reads one and was told none."""
    return encoder.for_policy(policy) if isinstance(encoder, ReadsPolicy) and encoder.rules is None else encoder


def reads_texts(encoder: object) -> bool:
    """Whether an encoder is an `EncodesTexts`."""
    # not isinstance: where the weights decide, a class has a property that is there or not
    return callable(getattr(encoder, "encode_texts", None))


def require_texts(encoder: object, *, needed_by: str, instead: str) -> EncodesTexts:
    """The encoder, as one that encodes texts.

    Args:
        encoder: any.
        needed_by: what needs texts, such as "head=prompt".
        instead: what to choose without them, such as "head=linear".
    Raises:
        InputError: it does not.
    """
    if reads_texts(encoder):
        return cast(EncodesTexts, encoder)
    name = getattr(encoder, "name", type(encoder).__name__)
    raise InputError(f"{needed_by} needs an encoder that reads texts, and {name} does not; choose {instead} or another encoder")


def cut_texts(texts: Sequence[str], tokenize: Callable[[list[str], int], torch.Tensor], context_length: int) -> list[str]:
    """The texts of which a model reads only the beginning.

    It asks the tokenizer for one token more than the model reads, whatever kind of tokenizer it is. A text that fits has
    padding there, and is the same before it.

    Args:
        texts: any.
        tokenize: (n texts, length) -> (n, length) tokens, cut or padded.
        context_length: tokens that the model reads, marks of beginning and end included.
    """
    wanted = ["", *texts]
    here, longer = tokenize(wanted, context_length), tokenize(wanted, context_length + 1)
    # some tokenizers put a mark at the very end, some pad on the left
    for short, long in ((here, longer), (here[:, :-1], longer[:, :-1]), (here.flip(1), longer.flip(1))):
        fits = (long[:, :-1] == short).all(dim=1) & (long[:, -1] == long[0, -1])
        if fits[0]:
            return [text for text, one in zip(wanted, fits.tolist(), strict=True) if not one]
    return []


class CutTexts:
    """Which texts a model reads only the beginning of.

    Args:
        name: of the encoder, for the message.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_cut: dict[str, bool] = {}

    def sentence(self, texts: Sequence[str], tokenize: Callable[[list[str], int], torch.Tensor], context_length: int) -> str | None:
        """Names those of the texts, see `cut_texts`; None where there is none."""
        new = [text for text in dict.fromkeys(texts) if text not in self._is_cut]
        if new:
            cut = set(cut_texts(new, tokenize, context_length))
            self._is_cut |= {text: text in cut for text in new}
        named = [text for text in dict.fromkeys(texts) if self._is_cut[text]]
        if not named:
            return None
        more = f"; and {len(named) - _N_SHOWN} more" if named[_N_SHOWN:] else ""
        shown = "; ".join(repr(shortened(text)) for text in named[:_N_SHOWN])
        return (
            f"encoder {self._name} reads the first {context_length} tokens of a text (its context length); of {len(named)} text(s) what is "
            f"beyond is cut off: {shown}{more}; shorten them"
        )

    def warn(self, texts: Sequence[str], tokenize: Callable[[list[str], int], torch.Tensor], context_length: int) -> None:
        """Says it, once of each text."""
        said = self.sentence([text for text in texts if text not in self._is_cut], tokenize, context_length)
        if said is not None:
            log.warning("%s", said)


def cut_off(encoder: object, texts: Sequence[str]) -> tuple[str, ...]:
    """Which texts an encoder reads only the beginning of: one sentence; none where it reads all, or does not say (`cut_off`)."""
    say = getattr(encoder, "cut_off", None)
    said = say(list(texts)) if callable(say) else None
    return () if said is None else (said,)


def encode_in_batches(
    encode: Callable[[torch.Tensor], torch.Tensor], images: Sequence[torch.Tensor], *, batch_size: int, dim: int, fixed_batch: bool
) -> np.ndarray:
    """Runs a model over preprocessed images, without gradients.

    Args:
        encode: (b, 3, height, width) -> (b, d).
        images: (3, height, width) each.
        batch_size: images encoded at once.
        dim: d.
        fixed_batch: fill every batch up to `batch_size` rounded up to a multiple of 8: a vector then is the same to
            the last bit whatever it was encoded with. It still depends on the device and on the number of threads.
    Returns:
        (n, d) float32.
    """
    import torch

    parts = []
    for start in range(0, len(images), batch_size):
        chunk = list(images[start : start + batch_size])
        n = len(chunk)
        if fixed_batch:
            chunk += [chunk[-1]] * (math.ceil(batch_size / _FIXED_MULTIPLE) * _FIXED_MULTIPLE - n)
        with torch.inference_mode():
            vectors = encode(torch.stack(chunk))
        parts.append(vectors[:n].float().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, dim), np.float32)


def prepare_pixels(
    pixels: torch.Tensor, preprocessing: Mapping[str, Any], *, prepared: bool = False, crop_rounds_down: bool = False
) -> torch.Tensor:
    """An encoder's preprocessing, differentiable: resizes, crops or pads to the model's size, and standardises.

    Resizing is torch's with antialiasing; it differs from Pillow's on 8-bit values by rounding.

    Args:
        pixels: (n, 3, h, w) float in [0, 1].
        preprocessing: size (height, width), mean, std, interpolation, resize_mode; also resize (height, width), where what is
            resized to is larger than what is then cropped from it.
        prepared: see `Differentiable`.
        crop_rounds_down: where an odd number of rows or columns is cropped: transformers leaves out the smaller half at
            the top and left, torchvision and open_clip round to the nearest even number.
    Returns:
        (n, 3, height, width).
    """
    import torch

    if not prepared:
        pixels = _fitted(pixels, preprocessing, crop_rounds_down)
    mean = torch.tensor(preprocessing["mean"], device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing["std"], device=pixels.device).view(1, 3, 1, 1)
    return (pixels - mean) / std


def prepare_image(image: np.ndarray, preprocessing: Mapping[str, Any]) -> torch.Tensor:
    """The same of one image, with resizing on 8-bit values by `backend`.

    Pillow's is that of open_clip's transform, to the last bit. torchvision's is several times as quick, and seldom more than one of 255
    levels from it, never more than two.

    Args:
        image: (h, w, 3) uint8 RGB.
        preprocessing: see `prepare_pixels`; also backend, "pil" (or left out) or "torchvision".
    Returns:
        (3, height, width) float32.
    """
    import torch

    height, width = preprocessing["size"]
    new, top, left = placement(image.shape[0], image.shape[1], preprocessing)
    if new != image.shape[:2]:
        resize = _resized_by_torch if preprocessing.get("backend") == TORCHVISION else _resized_by_pillow
        image = resize(image, new, preprocessing["interpolation"])
    seen = image[max(0, top) : top + height, max(0, left) : left + width]
    pixels = np.empty((3, height, width), np.float32)
    if seen.shape[:2] != (height, width):
        pixels.fill(0)  # beyond the edge, where the picture is smaller, it is black
    y, x = max(0, -top), max(0, -left)
    pixels[:, y : y + seen.shape[0], x : x + seen.shape[1]] = seen.transpose(2, 0, 1)
    # by NumPy, in one thread: torch would start a team of its own in every thread that prepares images
    pixels /= np.float32(255)
    for channel, mean, std in zip(pixels, preprocessing["mean"], preprocessing["std"], strict=True):
        channel -= np.float32(mean)
        channel /= np.float32(std)
    return torch.from_numpy(pixels)


def _resized_by_pillow(image: np.ndarray, new: tuple[int, int], interpolation: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((new[1], new[0]), Image.Resampling[interpolation.upper()]))


def _resized_by_torch(image: np.ndarray, new: tuple[int, int], interpolation: str) -> np.ndarray:
    import torch
    from torch.nn import functional

    writeable = image if image.flags.writeable else image.copy()  # torch knows no others
    # a view with the colours of a pixel side by side, which is how torch resizes quickest
    pixels = torch.from_numpy(writeable).permute(2, 0, 1)[None]
    return functional.interpolate(pixels, new, mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()


def _fitted(pixels: torch.Tensor, preprocessing: Mapping[str, Any], crop_rounds_down: bool) -> torch.Tensor:
    from torch.nn import functional

    rows, columns = pixels.shape[2:]
    height, width = preprocessing["size"]
    new = resized(rows, columns, preprocessing.get("resize", preprocessing["size"]), preprocessing["resize_mode"])
    if new != (rows, columns):
        pixels = functional.interpolate(pixels, new, mode=preprocessing["interpolation"], antialias=True).clamp(0, 1)
    spare_y, spare_x = new[0] - height, new[1] - width
    if spare_y < 0 or spare_x < 0:
        left, top = max(0, -spare_x) // 2, max(0, -spare_y) // 2
        pixels = functional.pad(pixels, (left, max(0, -spare_x) - left, top, max(0, -spare_y) - top))
    half = math.floor if crop_rounds_down else round
    top, left = half(max(0, spare_y) / 2), half(max(0, spare_x) / 2)
    return pixels[:, :, top : top + height, left : left + width]


def placement(rows: int, columns: int, preprocessing: Mapping[str, Any]) -> tuple[tuple[int, int], int, int]:
    """Where an image lies in what a model sees: what it is resized to, and what is cropped from that.

    Args:
        rows, columns: of the image.
        preprocessing: see `prepare_pixels`.
    Returns:
        Height and width after resizing; the row and the column of it where the model's view begins, below 0 where it is padded.
    """
    height, width = preprocessing["size"]
    new = resized(rows, columns, preprocessing.get("resize", preprocessing["size"]), preprocessing["resize_mode"])
    top, left = (-(-spare // 2) if spare < 0 else round(spare / 2) for spare in (new[0] - height, new[1] - width))
    return new, top, left


def resized(rows: int, columns: int, size: Sequence[int], resize_mode: str) -> tuple[int, int]:
    """Height and width after open_clip's resizing, before its crop.

    Source: open_clip.transform.image_transform. For a square crop of the shortest side it uses torchvision's Resize,
    which rounds down, otherwise its own ResizeKeepRatio, which rounds to nearest.
    """
    height, width = size
    if resize_mode == "squash":
        return height, width
    if resize_mode == "shortest" and height == width:
        short, long = height, int(height * max(rows, columns) / min(rows, columns))
        return (short, long) if rows <= columns else (long, short)
    pick = min if resize_mode == "shortest" else max
    ratio = pick(rows / height, columns / width)
    return max(1, round(rows / ratio)), max(1, round(columns / ratio))


def checked_preprocess(given: Mapping[str, Any], *, resizes: bool = False) -> dict[str, Any]:
    """A stated preprocessing in plain JSON types.

    Args:
        given: size, mean, std, interpolation and resize_mode.
        resizes: may also say `resize`, what images are resized to before `size` is cropped from their middle; null: size.
    Raises:
        InputError: a field is missing, unknown or out of range.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"encoder.preprocess must be {{{', '.join(PREPROCESS_FIELDS)}}}, each with its value, got {given!r}")
    unknown, missing = set(given) - {*PREPROCESS_FIELDS, *(["resize"] if resizes else [])}, set(PREPROCESS_FIELDS) - set(given)
    if unknown or missing:
        raise InputError(
            f"encoder.preprocess must have {', '.join(PREPROCESS_FIELDS)}; missing: {', '.join(sorted(missing)) or 'none'}, unknown: {', '.join(sorted(unknown)) or 'none'}"
        )
    plain: dict[str, Any] = {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in given.items()}
    if plain.get("resize", 0) is None:
        del plain["resize"]
    for key in {"size", "resize"} & set(plain):
        sides = plain[key] if isinstance(plain[key], list) else [plain[key]] * 2
        if len(sides) != 2 or not all(is_whole(side) and side >= 1 for side in sides):
            raise InputError(f"encoder.preprocess.{key} must be pixels, or height and width in pixels, got {plain[key]!r}")
    for key in ("mean", "std"):
        values = plain[key]
        if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, (int, float)) for v in values)):
            raise InputError(f"encoder.preprocess.{key} must be 3 numbers, for red, green and blue in [0, 1], got {values!r}")
    if min(plain["std"]) <= 0:
        raise InputError(f"encoder.preprocess.std must be above 0, got {plain['std']!r}")
    for key, allowed in (("interpolation", _INTERPOLATIONS), ("resize_mode", _RESIZE_MODES)):
        if plain[key] not in allowed:
            raise InputError(f"encoder.preprocess.{key} must be one of {', '.join(allowed)}, got {plain[key]!r}")
    return plain
