"""What guardkit's own encoders have in common: a model that is built once, when it is first needed, and is never changed."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from guardkit.artifacts import fingerprint
from guardkit.checks import check_choice, check_whole
from guardkit.encoders.base import BACKENDS, BFLOAT16, DECODES, DTYPES, FLOAT32, FULL, PIL, encode_in_batches, prepare_pixels
from guardkit.kinds import MAX_WIDTH
from guardkit.schema import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Built:
    """A loaded model.

    Attributes:
        model: as its library gives it.
        preprocess: (h, w, 3) uint8 RGB, and what is to be done to it, as in `FrozenEncoder.preprocessing` -> (3, height, width) float32.
        encode: (b, 3, height, width) -> (b, d), each on any device, as the model gives them.
        dim: d.
        preprocessing: what `preprocess` does whichever way images are read, in plain JSON types.
        architecture: what decides an embedding and cannot be told from names and shapes of weights.
        hash_weights: a hash over the weights; asked once.
        cast: gives what encodes in bfloat16, by a copy of what sees images; asked once. None: there is no such thing.
    """

    model: Any
    preprocess: Callable[[np.ndarray, Mapping[str, Any]], torch.Tensor]
    encode: Callable[[torch.Tensor], torch.Tensor]
    dim: int
    preprocessing: dict[str, Any]
    architecture: Mapping[str, Any]
    hash_weights: Callable[[], str]
    cast: Callable[[], Callable[[torch.Tensor], torch.Tensor]] | None = None

    @cached_property
    def weights_hash(self) -> str:
        """Over the weights, 64 hex digits."""
        return self.hash_weights()

    @cached_property
    def encode_cast(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """As `encode`, in bfloat16.

        Raises:
            InputError: the model does not compute in it.
        """
        import torch

        assert self.cast is not None
        try:
            with torch.inference_mode(False):
                encode = self.cast()
            trial(encode, self.preprocessing["size"])
        except InputError:
            raise  # of a device that this process cannot use
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the model does not compute in bfloat16 ({type(error).__name__}: {reason}); take encoder.dtype=float32"
            ) from error
        return encode


class FrozenEncoder(ABC):
    """A frozen model. It is built when it is first needed, once, whichever thread asks.

    Args:
        name: for people.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        batch_size: images encoded at once.
        backend: what resizes images, "pil" or "torchvision"; None: as the kind of encoder decides.
        decode: "full", or "reduced": a JPEG whose sides are at least four times what the model sees is decoded at a fraction.
        dtype: what the image tower computes in; texts, gradients and the hash of weights are of the model as it was loaded.
    """

    casts = False  # whether images may be encoded in bfloat16, see `Built.cast`
    _names_pil = False  # whether its preprocessing says so, which that of most kinds did not when there was no other

    def __init__(
        self, name: str, *, device: str, batch_size: int, backend: str | None = None, decode: str = FULL, dtype: str = FLOAT32
    ) -> None:
        check_whole("encoder.batch_size", batch_size, 1)
        check_choice("encoder.backend", backend, (None, *BACKENDS))
        check_choice("encoder.decode", decode, DECODES)
        if self.casts:
            check_choice("encoder.dtype", dtype, DTYPES)
        self.name, self.device, self.batch_size = name, device, batch_size
        self._backend, self.decode, self.dtype = backend, decode, dtype
        self._lock = threading.Lock()
        self._pickled: str | None = None

    @abstractmethod
    def _build(self) -> Built:
        """Loads the model. Raises InputError, in one line, whatever is wrong."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Arguments that build this encoder again."""

    @property
    def _settings(self) -> dict[str, Any]:
        """Arguments beside those that say which model it is."""
        way = {"backend": self._backend, "decode": self.decode} | ({"dtype": self.dtype} if self.casts else {})
        return way | {"device": self.device, "batch_size": self.batch_size}

    # --- copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What builds it again. The weights stay where they are; the copy reads them, and they must still be the same."""
        # what is cached is made again, the places of files that were fetched among it
        cached = {name for one in type(self).__mro__ for name, value in vars(one).items() if isinstance(value, cached_property)}
        state = {key: value for key, value in self.__dict__.items() if key not in {"_lock", "_built", *cached}}
        return state | {"_pickled": self.fingerprint if "_built" in self.__dict__ else self._pickled}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The model is frozen, so that copies within a process share it."""
        new = object.__new__(type(self))
        new.__setstate__(self.__dict__)
        return new

    # --- the model, built once ----------------------------------------------------------------------------------------

    @cached_property
    def _loaded(self) -> Built:
        import torch

        with self._lock:
            if "_built" not in self.__dict__:
                self._builder = os.getpid()
                # whoever asks first may be in inference mode, and weights that are made there take no gradients ever after
                with torch.inference_mode(False):
                    built = self._build()
                if self._pickled is not None and self._fingerprint_of(built) != self._pickled:
                    raise InputError(
                        f"the weights of encoder {self.name} changed after it was pickled; pickle it anew, or put the old ones back"
                    )
                self._built = built
            return self._built

    @property
    def model(self) -> Any:
        """The library's own model, frozen."""
        return self._loaded.model

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to an image first, in plain JSON types; see `Encoder`."""
        return self._loaded.preprocessing | self._reading

    @property
    def backend(self) -> str:
        """What resizes images, "pil" or "torchvision"."""
        return self._backend or PIL

    @property
    def way(self) -> dict[str, str]:
        """The settings that may differ between two encoders of one model; see `guardkit.encoders.ways`."""
        return {"backend": self.backend, "decode": self.decode} | ({"dtype": self.dtype} if self.casts else {})

    @property
    def _reading(self) -> dict[str, Any]:
        """What the preprocessing says of how images are read."""
        backend = {"backend": self.backend} if self.backend != PIL or self._names_pil else {}
        return backend | ({"decode": self.decode} if self.decode != FULL else {})

    @property
    def at_least(self) -> int | None:
        """Pixels of a side that are enough of an encoded image: twice what is resized to, so that resizing has something to average."""
        said = self._loaded.preprocessing
        return None if self.decode == FULL else 2 * max(said.get("resize", said["size"]))

    def going(self, way: Mapping[str, str]) -> Self:
        """This encoder, its model shared, going another `way`; what that does not say stays."""
        self._loaded  # noqa: B018 - the copy has it too
        new = copy.deepcopy(self)
        new.__dict__.pop("fingerprint", None)
        asked = self.way | dict(way)
        new._backend, new.decode, new._pickled = asked["backend"], asked["decode"], None
        new.dtype = asked.get("dtype", self.dtype)
        return new

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._loaded.dim

    @cached_property
    def fingerprint(self) -> str:
        """Over the weights' names, types, shapes and values, the architecture's settings, and the preprocessing."""
        return self._fingerprint_of(self._loaded)

    def _fingerprint_of(self, built: Built) -> str:
        preprocessing = built.preprocessing | self._reading
        architecture = dict(built.architecture) | ({"dtype": self.dtype} if self._is_cast else {})
        return fingerprint({"weights": built.weights_hash, "architecture": architecture, "preprocessing": preprocessing})

    @property
    def _is_cast(self) -> bool:
        return self.casts and self.dtype == BFLOAT16

    @property
    def _device(self) -> torch.device:
        """Of a model of torch. Raises InputError where this process cannot use it."""
        device: torch.device = next(self.model.parameters()).device
        if device.type == "cuda" and self._builder != os.getpid():
            raise InputError(
                f"encoder {self.name} is on {device}, which a forked process cannot use; start workers by spawn "
                '(multiprocessing.get_context("spawn")), or take encoder.device=cpu'
            )
        return device

    # --- encoding -----------------------------------------------------------------------------------------------------

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """(h, w, 3) uint8 RGB -> (3, height, width) float32, resized and standardised as `preprocessing` says."""
        return self._loaded.preprocess(image, self.preprocessing)

    def encode_images(self, images: Sequence[np.ndarray], *, fixed_batch: bool = False, normalize: bool = True) -> np.ndarray:
        """(h, w, 3) uint8 RGB images -> (n, d) float32; see `Encoder` and `encode_in_batches`."""
        size = self.batch_size
        parts = [
            self.encode_preprocessed(
                [self.preprocess(image) for image in images[start : start + size]], fixed_batch=fixed_batch, normalize=normalize
            )
            for start in range(0, len(images), size)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def encode_preprocessed(self, images: Sequence[torch.Tensor], *, fixed_batch: bool = False, normalize: bool = True) -> np.ndarray:
        """(3, height, width) images from `preprocess` -> (n, d) float32."""
        return encode_in_batches(
            lambda batch: self._encode(batch, normalize), images, batch_size=self.batch_size, dim=self.dim, fixed_batch=fixed_batch
        )

    def _encode(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
        return self._scaled(self._loaded.encode_cast(images) if self._is_cast else self._loaded.encode(images), normalize)

    @staticmethod
    def _scaled(vectors: torch.Tensor, normalize: bool) -> torch.Tensor:
        from torch.nn import functional

        return functional.normalize(vectors.float(), dim=-1) if normalize else vectors

    def _encode_pixels(self, pixels: torch.Tensor, *, normalize: bool, prepared: bool, crop_rounds_down: bool = False) -> torch.Tensor:
        """What `Differentiable` asks for, of a model of torch; never cast, as gradients would be coarse."""
        import torch

        standardised = prepare_pixels(
            pixels.to(self._device, torch.float32), self.preprocessing, prepared=prepared, crop_rounds_down=crop_rounds_down
        )
        return self._scaled(self._loaded.encode(standardised), normalize)


def checked_device(name: str) -> torch.device:
    """The device that a setting means.

    Raises:
        InputError: there is none such here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"encoder.device {name!r} cannot be used ({reason}); give auto, cpu or the name of a GPU") from error
    return device


def image_tower_cast(model: torch.nn.Module, *, seeing: Callable[[str], bool]) -> torch.nn.Module:
    """A copy of a model whose parts that see images are in bfloat16; all others are shared.

    Weights are cast once, where `torch.autocast` casts them at each call.

    Args:
        model: of float32.
        seeing: whether the part of a name sees images.
    """
    import torch

    shared = {id(part): part for name, part in model.named_children() if not seeing(name)}
    copied: torch.nn.Module = copy.deepcopy(model, shared)
    for name, part in copied.named_children():
        if seeing(name):
            part.to(torch.bfloat16)
    return copied


def hash_state(model: torch.nn.Module) -> str:
    """Over names, types, shapes and values of a model's weights, 64 hex digits."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # as bytes: numpy has no bfloat16
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trial(encode: Callable[[torch.Tensor], torch.Tensor], size: Sequence[int]) -> int:
    """The width of what a model gives for a black image.

    Args:
        encode: (1, 3, height, width) -> (1, d).
        size: height and width.
    Raises:
        ValueError: it gives no vector, or one that is not finite.
    """
    import torch

    with torch.inference_mode():
        vector = encode(torch.zeros(1, 3, *size))
    if vector.ndim != 2 or len(vector) != 1 or vector.shape[1] > MAX_WIDTH:
        raise ValueError(f"for one image it gives values of shape {tuple(vector.shape)} instead of one vector")
    if not bool(vector.isfinite().all()):
        raise ValueError("its weights give vectors that are not finite")
    return int(vector.shape[1])
