"""CLIP and SigLIP models through open_clip: any architecture and any weights it knows."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guardkit.artifacts import fingerprint, shipped
from guardkit.checks import check_whole
from guardkit.encoders.base import checked_preprocess, cut_texts, encode_in_batches, prepare_pixels
from guardkit.schema import InputError, shortened

if TYPE_CHECKING:
    import torch

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")  # what open_clip looks for in a folder
_HUB, _LOCAL = "hf-hub:", "local-dir:"
_N_SHOWN = 3  # texts in a warning

log = logging.getLogger(__name__)


class OpenClipEncoder:
    """A frozen open_clip model. It is built when it is first needed, once, whichever thread asks.

    Args:
        architecture: open_clip's name, such as "ViT-B-32"; null with a folder or a Hub id, which name their own.
        weights: a pretrained tag of that architecture ("openai"), "hf-hub:ORG/NAME", "local-dir:FOLDER", a weights
            file, or "guardkit:NAME" for a model that comes with guardkit.
        preprocess: size (pixels), mean, std (3 numbers each), interpolation and resize_mode; required with a bare
            weights file, whose right values cannot be guessed, and refused otherwise.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        batch_size: images encoded at once.
    Raises:
        InputError: unknown or unreachable architecture or weights, or missing preprocessing.
    """

    def __init__(
        self,
        architecture: str | None,
        weights: str,
        *,
        preprocess: Mapping[str, Any] | None = None,
        device: str = "auto",
        batch_size: int = 32,
    ) -> None:
        if not isinstance(weights, str) or not weights:
            raise InputError(
                f"encoder.weights must be a pretrained tag, {_HUB}ORG/NAME, {_LOCAL}FOLDER, guardkit:NAME or a file, got {weights!r}"
            )
        check_whole("encoder.batch_size", batch_size, 1)
        self.architecture, self.weights, self.device, self.batch_size = architecture, weights, device, batch_size
        self._preprocess = None if preprocess is None else checked_preprocess(preprocess)
        self._folder = self._find_folder()
        self._is_file = (
            self._folder is None
            and not weights.startswith(_HUB)
            and Path(weights).expanduser().suffix in (".safetensors", ".bin", ".pt", ".pth")
        )
        if (self._folder or weights.startswith(_HUB)) and architecture is not None:
            raise InputError(f"encoder.architecture must be null with weights={weights}, which name their own, got {architecture!r}")
        if architecture is None and not (self._folder or weights.startswith(_HUB)):
            raise InputError(
                f"encoder.architecture is needed with weights={weights}, for instance ViT-B-32; a folder is written {_LOCAL}FOLDER and a Hub id "
                f"{_HUB}ORG/NAME"
            )
        if not self._is_file and preprocess is not None:
            raise InputError(f"encoder.preprocess belongs to a bare weights file only; weights={weights} bring their own")
        if self._is_file:
            self._check_file()
        self.name = weights if architecture is None else f"{architecture} ({Path(weights).name if self._is_file else weights})"
        self._lock = threading.Lock()
        self._cut_before: set[str] = set()
        self._pickled: str | None = None

    # --- copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What builds it again. The weights stay where they are; the copy reads them, and they must still be the same."""
        left_out = ("_lock", "_loaded", "_built", "_tokenizer", "fingerprint")
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return state | {"_pickled": self.fingerprint if "_built" in self.__dict__ else self._pickled}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenClipEncoder:
        """The model is frozen, so that copies within a process share it."""
        new = object.__new__(type(self))
        new.__setstate__(self.__dict__)
        return new

    def _find_folder(self) -> Path | None:
        if (folder := shipped(self.weights)) is not None:
            return folder
        if not self.weights.startswith(_LOCAL):
            return None
        folder = Path(self.weights.removeprefix(_LOCAL)).expanduser()
        if not (folder / "open_clip_config.json").is_file():
            raise InputError(f"{folder} holds no open_clip_config.json; give a folder in the layout of an open_clip model on the Hub")
        if not any(path.suffix in _WEIGHT_SUFFIXES for path in folder.iterdir()):
            raise InputError(f"{folder} holds no weights; a file that ends in {', '.join(_WEIGHT_SUFFIXES)} is expected")
        return folder

    def _check_file(self) -> None:
        if not Path(self.weights).expanduser().is_file():
            raise InputError(
                f"weights file {self.weights} does not exist; give a file, a folder as {_LOCAL}FOLDER or a Hub id as {_HUB}ORG/NAME"
            )
        if self._preprocess is None:
            raise InputError(
                f"encoder.preprocess is needed with the weights file {self.weights}: size, mean, std, interpolation and resize_mode as the model was "
                "trained (OpenAI CLIP: mean 0.4815,0.4578,0.4082, std 0.2686,0.2613,0.2758, bicubic, shortest; SigLIP: mean and std 0.5, bicubic, squash); "
                "a file does not say, and a wrong guess goes unnoticed"
            )

    # --- the model, built once ----------------------------------------------------------------------------------------

    @cached_property
    def _loaded(self) -> tuple[Any, Any, int, dict[str, Any]]:
        """The model, its preprocessing of PIL images, the width of its embeddings, and its settings."""
        with self._lock:
            if "_built" not in self.__dict__:
                built = self._build()
                if self._pickled is not None and _hashed(*built) != self._pickled:
                    raise InputError(
                        f"the weights of encoder {self.name} changed after it was pickled; pickle it anew, or put the old ones back"
                    )
                self._built, self._builder = built, os.getpid()
            return self._built

    def _build(self) -> tuple[Any, Any, int, dict[str, Any]]:
        import open_clip
        import torch

        device = self._checked_device()
        options: dict[str, Any] = {"device": device}
        if self._folder is not None:
            name = f"{_LOCAL}{self._folder}"
        elif self.weights.startswith(_HUB):
            name = self.weights
        else:
            name = self._checked_architecture(open_clip)
            options["pretrained"] = str(Path(self.weights).expanduser()) if self._is_file else self._checked_tag(open_clip, name)
            if self._preprocess is not None:
                options["force_preprocess_cfg"] = self._preprocess
        try:
            with _quiet():
                # by itself it would only warn of missing weights, and go on with random ones; and unlike
                # create_model_from_pretrained it takes a preprocessing
                model = open_clip.create_model(name, require_pretrained=True, **options)
                preprocess = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
                transform = open_clip.transform.image_transform_v2(preprocess, is_train=False)
                settings = _settings(open_clip.get_model_config(name), asdict(open_clip.model.CLIPVisionCfg()))
            model.eval().requires_grad_(False)
            height, width = _height_width(model.visual.preprocess_cfg["size"])
            with torch.inference_mode():
                vector = model.encode_image(torch.zeros(1, 3, height, width, device=device))
                if not bool(vector.isfinite().all()):
                    raise ValueError("its weights give vectors that are not finite")
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            if self._folder or self._is_file:
                remedy = "the file may be damaged, or of another architecture or image size"
            else:
                remedy = f"without a network, save the model's files in a folder and give weights={_LOCAL}FOLDER"
            raise InputError(f"encoder {self.name} could not be loaded ({type(error).__name__}: {reason}); {remedy}") from error
        return model, transform, int(vector.shape[1]), settings

    def _checked_device(self) -> torch.device:
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise InputError(f"encoder.device {self.device!r} cannot be used ({reason}); give auto, cpu or the name of a GPU") from error
        return device

    def _checked_architecture(self, open_clip: Any) -> str:
        known = open_clip.list_models()
        if self.architecture not in known:
            close = difflib.get_close_matches(str(self.architecture), known, n=3, cutoff=0.4)
            raise InputError(f"open_clip knows no architecture {self.architecture!r}; close: {', '.join(close) or 'none'}")
        return str(self.architecture)

    def _checked_tag(self, open_clip: Any, architecture: str) -> str:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if self.weights not in tags:
            raise InputError(
                f"open_clip knows no weights {self.weights!r} of {architecture}; it knows {', '.join(tags) or 'none'}, a file, {_LOCAL} or {_HUB}"
            )
        return self.weights

    @property
    def model(self) -> Any:
        """The open_clip model itself, frozen."""
        return self._loaded[0]

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """size (h, w), mean, std, interpolation, resize_mode, as open_clip applies them."""
        return _preprocessing(self.model)

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._loaded[2]

    @cached_property
    def fingerprint(self) -> str:
        """Over the weights' names, types, shapes and values, the architecture's settings, and the preprocessing."""
        return _hashed(*self._loaded)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this encoder again."""
        return {"architecture": self.architecture, "weights": self.weights, "preprocess": self._preprocess}

    @property
    def _device(self) -> torch.device:
        device = next(self.model.parameters()).device
        if device.type == "cuda" and self._builder != os.getpid():
            raise InputError(
                f"encoder {self.name} is on {device}, which a forked process cannot use; start workers by spawn "
                '(multiprocessing.get_context("spawn")), or take encoder.device=cpu'
            )
        return device

    # --- encoding -----------------------------------------------------------------------------------------------------

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """(h, w, 3) uint8 RGB -> (3, height, width) float32, by open_clip's own transform."""
        from PIL import Image

        return self._loaded[1](Image.fromarray(image))

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
        model, device = self.model, self._device
        return encode_in_batches(
            lambda batch: model.encode_image(batch.to(device), normalize=normalize),
            images,
            batch_size=self.batch_size,
            dim=self.dim,
            fixed_batch=fixed_batch,
        )

    def encode_pixels(self, pixels: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
        """(n, 3, h, w) float in [0, 1] -> (n, d), differentiable with respect to the pixels; see `prepare_pixels`."""
        import torch

        return self.model.encode_image(prepare_pixels(pixels.to(self._device, torch.float32), self.preprocessing), normalize=normalize)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32 unit vectors. A warning names, once, texts that are longer than the model reads.

        Raises:
            InputError: the model has no text encoder, or its tokenizer is not at hand.
        """
        import torch

        if not texts:
            return np.zeros((0, self.dim), np.float32)
        self._warn_of_cut(texts)
        tokens = self._tokenizer(list(texts))
        with torch.inference_mode():
            return self.model.encode_text(tokens.to(self._device), normalize=True).float().cpu().numpy()

    def _warn_of_cut(self, texts: Sequence[str]) -> None:
        cut = [text for text in cut_texts(texts, self._tokenizer, self._tokenizer.context_length) if text not in self._cut_before]
        self._cut_before.update(cut)
        if cut:
            shown = "; ".join(repr(shortened(text)) for text in cut[:_N_SHOWN]) + (
                f"; and {len(cut) - _N_SHOWN} more" if cut[_N_SHOWN:] else ""
            )
            log.warning(
                "encoder %s reads the first %d tokens of a text (its context length); of %d text(s) what is beyond is cut off: %s; shorten them",
                self.name,
                self._tokenizer.context_length,
                len(cut),
                shown,
            )

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        if self._folder is not None:
            name = f"{_LOCAL}{self._folder}"
        else:
            name = self.weights if self.weights.startswith(_HUB) else str(self.architecture)
        try:
            with _quiet():
                return open_clip.get_tokenizer(name)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the tokenizer of encoder {self.name} could not be loaded ({reason}); put its files beside the weights and give weights={_LOCAL}FOLDER"
            ) from error


def is_architecture(name: str) -> bool:
    """Whether open_clip has an architecture of that name."""
    import open_clip

    return name in open_clip.list_models()


def _height_width(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, (int, float)) else (int(size[0]), int(size[1]))


def _preprocessing(model: Any) -> dict[str, Any]:
    cfg = model.visual.preprocess_cfg
    return {
        "size": list(_height_width(cfg["size"])),
        "mean": [float(v) for v in cfg["mean"]],
        "std": [float(v) for v in cfg["std"]],
        "interpolation": cfg["interpolation"],
        "resize_mode": cfg["resize_mode"],
    }


def _hashed(model: Any, transform: Any, dim: int, settings: Mapping[str, Any]) -> str:  # noqa: ARG001 - what `_loaded` holds
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return fingerprint({"weights": digest.hexdigest(), "architecture": settings, "preprocessing": _preprocessing(model)})


def _settings(model_config: Mapping[str, Any], vision_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What decides an image's embedding and cannot be told from names and shapes of weights: activation, heads, pooling.

    Defaults are left out, so that a file, a folder and a Hub id that differ only in how much they spell out agree.
    """
    vision = model_config["vision_cfg"].items()
    said = {
        key: value
        for key, value in vision
        if key != "timm_model_pretrained" and (key not in vision_defaults or value != vision_defaults[key])
    }
    return {"quick_gelu": bool(model_config.get("quick_gelu", False)), "vision": said}


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what this thread sends straight to the root logger, as open_clip does with its progress.

    Filters only, because the root logger's level belongs to all threads. The handler is there because without any,
    `logging.info` would set one up for good.
    """
    root, here, stand_in = logging.getLogger(), threading.get_ident(), logging.NullHandler()

    def is_from_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    root.addFilter(is_from_elsewhere)
    root.addHandler(stand_in)
    try:
        yield
    finally:
        root.removeHandler(stand_in)
        root.removeFilter(is_from_elsewhere)
