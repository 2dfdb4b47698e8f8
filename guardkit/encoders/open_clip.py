"""CLIP and SigLIP models through open_clip: any architecture and any weights it knows."""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guardkit.artifacts import SHIPPED, read_json, shipped, write_json, written
from guardkit.encoders.base import PREPROCESS_FIELDS, CutTexts, checked_preprocess, prepare_image
from guardkit.encoders.frozen import Built, FrozenEncoder, checked_device, hash_state, image_tower_cast, trial
from guardkit.encoders.known import KnownImages
from guardkit.encoders.places import HUB, LOCAL, offline
from guardkit.hub import hub_folder
from guardkit.local_copies import local
from guardkit.schema import InputError
from guardkit.storage import is_url

if TYPE_CHECKING:
    import torch

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")  # what open_clip looks for in a folder
_MODEL, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class OpenClipEncoder(FrozenEncoder):
    """A frozen open_clip model: images, texts and gradients.

    Args:
        architecture: open_clip's name, such as "ViT-B-32"; null with a folder or a Hub id, which name their own.
        weights: a pretrained tag of that architecture ("openai"), "hf-hub:ORG/NAME", "local-dir:FOLDER", a weights
            file, the URL of a folder or file in object storage, or "guardkit:NAME" for a model that comes with guardkit.
        preprocess: size (pixels), mean, std (3 numbers each), interpolation and resize_mode; required with a bare
            weights file, whose right values cannot be guessed, and refused otherwise.
        backend: what resizes images: "torchvision", or "pil" as open_clip's own transform; they differ by up to two of 255 levels. None: pil.
        decode: of JPEG files: "full", or "reduced": one whose sides are at least four times what the model sees is decoded at a half, a quarter or an
            eighth, never below twice what it sees. Several times as quick on photographs of a camera, and further from "full" than the backends.
        dtype: of the image tower: "float32", or "bfloat16": quicker where the machine computes in it, with half as much memory beside the
            float32 model, which texts and gradients keep. Vectors move a little, so that it is another encoder.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        batch_size: images encoded at once.
    Raises:
        InputError: unknown or unreachable architecture or weights, or missing preprocessing.
    """

    casts = True

    def __init__(
        self,
        architecture: str | None,
        weights: str,
        *,
        preprocess: Mapping[str, Any] | None = None,
        backend: str | None = None,
        decode: str = "full",
        dtype: str = "float32",
        device: str = "auto",
        batch_size: int = 32,
    ) -> None:
        if not isinstance(weights, str) or not weights:
            raise InputError(
                f"encoder.weights must be a pretrained tag, {HUB}ORG/NAME, {LOCAL}FOLDER, guardkit:NAME or a file, got {weights!r}"
            )
        self.architecture, self.weights = architecture, weights
        self._preprocess = None if preprocess is None else checked_preprocess(preprocess)
        self._path = _path(weights)
        self._folder = self._find_folder()
        self._is_file = self._folder is None and not weights.startswith(HUB) and self._path.suffix in _FILE_SUFFIXES
        if (self._folder or weights.startswith(HUB)) and architecture is not None:
            raise InputError(f"encoder.architecture must be null with weights={weights}, which name their own, got {architecture!r}")
        if architecture is None and not (self._folder or weights.startswith(HUB)):
            raise InputError(
                f"encoder.architecture is needed with weights={weights}, for instance ViT-B-32; a folder is written {LOCAL}FOLDER and a Hub id "
                f"{HUB}ORG/NAME"
            )
        if not self._is_file and preprocess is not None:
            raise InputError(f"encoder.preprocess belongs to a bare weights file only; weights={weights} bring their own")
        if self._is_file:
            self._check_file()
        name = weights if architecture is None else f"{architecture} ({Path(weights).name if self._is_file else weights})"
        super().__init__(name, device=device, batch_size=batch_size, backend=backend, decode=decode, dtype=dtype)
        self._cut = CutTexts(name)

    @cached_property
    def known_images(self) -> KnownImages | None:
        """What the model's folder says of the images that it knows; None: nothing."""
        return None if self._folder is None else KnownImages.read(self._folder)

    # --- where it may have moved: see `guardkit.encoders.lookup` --------------------------------------------------------

    @classmethod
    def named(cls, recorded: Mapping[str, Any], text: str) -> dict[str, Any] | None:
        """See `Movable`."""
        architecture, path = recorded["config"].get("architecture"), Path(text).expanduser()
        if text.startswith((LOCAL, HUB, SHIPPED)):
            return {"architecture": None, "weights": text}
        if is_url(text):
            return {"architecture": None, "weights": text} if _path(text).is_dir() else _of_file(recorded, text)
        if path.is_dir():
            return {"architecture": None, "weights": f"{LOCAL}{path}"} if (path / _MODEL).is_file() else None
        if path.is_file():
            if (path.parent / _MODEL).is_file():
                return {"architecture": None, "weights": f"{LOCAL}{path.parent}"}
            return _of_file(recorded, path)
        if text.count("/") == 1 and all(text.split("/")):
            first, second = text.split("/")
            if is_architecture(first):
                return {"architecture": first, "weights": second}
            return {"architecture": None, "weights": f"{HUB}{text}"}
        if "/" in text or architecture is None:
            raise InputError(f"{text!r} is no folder and no file here")
        return {"architecture": architecture, "weights": text}

    @classmethod
    def candidates(cls, recorded: Mapping[str, Any], place: Path, files: Sequence[str]) -> list[dict[str, Any]]:
        """See `Movable`."""
        if _MODEL in files:
            fits = _width(place / _MODEL) in (None, recorded["dim"])
            return [{"architecture": None, "weights": f"{LOCAL}{place}"}] if fits else []
        if recorded["config"].get("architecture") is None:
            return []
        return [_of_file(recorded, place / name) for name in files if name.endswith(_FILE_SUFFIXES)]

    # --- carried elsewhere: see `Portable` ------------------------------------------------------------------------------

    def save(self, folder: Path) -> OpenClipEncoder:
        """See `Portable`. The layout is that of an open_clip model on the Hub; weights become safetensors, as wide as they are used."""
        import open_clip
        from safetensors.torch import save_file

        with _quiet():
            settings = open_clip.get_model_config(self._source)
        if settings.get("text_cfg", {}).get("hf_model_name"):
            raise InputError(
                f"the text tower of encoder {self.name} is of another library and cannot be written into a folder; take another model, or "
                "encoder=transformers"
            )
        with written(folder / _WEIGHTS) as temporary:
            save_file({name: value.cpu().contiguous() for name, value in self.model.state_dict().items()}, temporary)
        if isinstance(self._tokenizer, open_clip.tokenizer.HFTokenizer):  # open_clip brings the other kind along
            self._tokenizer.save_pretrained(folder)
        write_json(folder / _MODEL, {"model_cfg": settings, "preprocess_cfg": self._loaded.preprocessing})
        return OpenClipEncoder(None, f"{LOCAL}{folder}", **self._settings)

    def reads(self, folder: Path) -> bool:
        """See `Portable`."""
        return self._folder is not None and self._folder.resolve() == folder.resolve()

    def _find_folder(self) -> Path | None:
        if (folder := shipped(self.weights)) is not None:
            return folder
        folder = self._path
        if not self.weights.startswith(LOCAL) and not (is_url(self.weights) and folder.is_dir()):
            return None
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; python -m guardkit.fetch encoder=PRESET brings a model, and says where it lies")
        if not (folder / _MODEL).is_file():
            raise InputError(f"{folder} holds no open_clip_config.json; give a folder in the layout of an open_clip model on the Hub")
        if not any(path.suffix in _WEIGHT_SUFFIXES for path in folder.iterdir()):
            raise InputError(f"{folder} holds no weights; a file that ends in {', '.join(_WEIGHT_SUFFIXES)} is expected")
        return folder

    def _check_file(self) -> None:
        if not self._path.is_file():
            raise InputError(
                f"weights file {self.weights} does not exist; give a file, a folder as {LOCAL}FOLDER or a Hub id as {HUB}ORG/NAME"
            )
        if self._preprocess is None:
            raise InputError(
                f"encoder.preprocess is needed with the weights file {self.weights}: size, mean, std, interpolation and resize_mode as the model was "
                "trained (OpenAI CLIP: mean 0.4815,0.4578,0.4082, std 0.2686,0.2613,0.2758, bicubic, shortest; SigLIP: mean and std 0.5, bicubic, squash); "
                "a file does not say, and a wrong guess goes unnoticed"
            )

    def _build(self) -> Built:
        import open_clip
        import torch
        from PIL import Image

        device = checked_device(self.device)
        options: dict[str, Any] = {"device": device}
        name = self._source
        if self.architecture is not None:
            self._check_architecture(open_clip)
            options["pretrained"] = str(self._path) if self._is_file else self._checked_tag(open_clip, name)
            if self._preprocess is not None:
                options["force_preprocess_cfg"] = self._preprocess
        self._ask_the_hub(open_clip)
        try:
            with _quiet():
                # by itself it would only warn of missing weights, and go on with random ones; and unlike
                # create_model_from_pretrained it takes a preprocessing
                model = open_clip.create_model(name, require_pretrained=True, **options)
                preprocess = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
                transform = open_clip.transform.image_transform_v2(preprocess, is_train=False)
                settings = _settings(open_clip.get_model_config(name), asdict(open_clip.model.CLIPVisionCfg()))
            model.eval().requires_grad_(False)

            said = _preprocessing(model)
            dim = trial(lambda batch: model.encode_image(batch.to(device)), said["size"])
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            if self._folder or self._is_file:
                remedy = "the file may be damaged, or of another architecture or image size"
            else:
                remedy = offline("open_clip")
            raise InputError(f"encoder {self.name} could not be loaded ({type(error).__name__}: {reason}); {remedy}") from error

        def cast() -> Callable[[torch.Tensor], torch.Tensor]:
            tower: Any = image_tower_cast(model, seeing=lambda name: name == "visual")
            return lambda batch: tower.encode_image(batch.to(self._device, torch.bfloat16))

        return Built(
            model,
            # by hand only what open_clip's own does not do
            preprocess=lambda image, how: prepare_image(image, how) if how.get("backend") else transform(Image.fromarray(image)),
            encode=lambda batch: model.encode_image(batch.to(self._device)),
            cast=cast,
            dim=dim,
            preprocessing=said,
            architecture=settings,
            hash_weights=lambda: hash_state(model),
        )

    def _ask_the_hub(self, open_clip: Any) -> None:
        """Before open_clip does, which without a network tries for a minute and complains of every attempt."""
        if self.weights.startswith(HUB):
            place = self.weights.removeprefix(HUB)
        elif self._folder is None and not self._is_file:
            place = (open_clip.get_pretrained_cfg(self.architecture, self.weights) or {}).get("hf_hub", "")
        else:
            place = ""
        if place:
            repository = "/".join(place.split("/")[:2])  # a file of it may follow
            hub_folder(repository, [_MODEL], refusal=f"encoder {self.name} could not be loaded from the Hub", remedy=offline("open_clip"))

    @property
    def _source(self) -> str:
        """What open_clip calls the model."""
        return str(self.architecture or self.weights) if self._folder is None else f"{LOCAL}{self._folder}"

    def _check_architecture(self, open_clip: Any) -> None:
        known = open_clip.list_models()
        if self.architecture not in known:
            close = difflib.get_close_matches(str(self.architecture), known, n=3, cutoff=0.4)
            raise InputError(f"open_clip knows no architecture {self.architecture!r}; close: {', '.join(close) or 'none'}")

    def _checked_tag(self, open_clip: Any, architecture: str) -> str:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if self.weights not in tags:
            raise InputError(
                f"open_clip knows no weights {self.weights!r} of {architecture}; it knows {', '.join(tags) or 'none'}, a file, {LOCAL} or {HUB}"
            )
        return self.weights

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this encoder again."""
        return {
            "architecture": self.architecture,
            "weights": self.weights,
            "preprocess": self._preprocess,
            "backend": self._backend,
            "decode": self.decode,
            "dtype": self.dtype,
        }

    def encode_pixels(self, pixels: torch.Tensor, *, normalize: bool = True, prepared: bool = False) -> torch.Tensor:
        """(n, 3, h, w) float in [0, 1] -> (n, d), differentiable with respect to the pixels; see `Differentiable`."""
        return self._encode_pixels(pixels, normalize=normalize, prepared=prepared)

    def image_module(self) -> torch.nn.Module:
        """See `Traceable`."""
        from guardkit.encoders.tracing import ImageTower

        return ImageTower(self.model, lambda model, pixels: model.encode_image(pixels))  # type: ignore[operator]

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32 unit vectors. A warning names, once, texts that are longer than the model reads.

        Raises:
            InputError: the model has no text encoder, or its tokenizer is not at hand.
        """
        import torch

        if not texts:
            return np.zeros((0, self.dim), np.float32)
        self._cut.warn(texts, self._tokenizer, self._tokenizer.context_length)
        tokens = self._tokenizer(list(texts))
        with torch.inference_mode():
            return self.model.encode_text(tokens.to(self._device), normalize=True).float().cpu().numpy()

    def cut_off(self, texts: list[str]) -> str | None:
        """See `EncodesTexts`."""
        return self._cut.sentence(texts, self._tokenizer, self._tokenizer.context_length)

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        try:
            with _quiet():
                return open_clip.get_tokenizer(self._source)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the tokenizer of encoder {self.name} could not be loaded ({reason}); put its files beside the weights and give weights={LOCAL}FOLDER"
            ) from error


def is_architecture(name: str) -> bool:
    """Whether open_clip has an architecture of that name."""
    import open_clip

    return name in open_clip.list_models()


def _path(weights: str) -> Path:
    """What `weights` is if it is a path, or a URL, of which there is a copy here then."""
    place = weights.removeprefix(LOCAL)
    return local("encoder.weights", place) if is_url(place) else Path(place).expanduser()


def _of_file(recorded: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """A bare file says neither architecture nor preprocessing, but the guard does."""
    stated = {key: value for key, value in recorded["preprocessing"].items() if key in PREPROCESS_FIELDS}
    return {"architecture": recorded["config"].get("architecture"), "weights": str(path), "preprocess": stated}


def _width(path: Path) -> Any:
    """The width that a model's configuration states, None where it states none: cheaper than building the model."""
    try:
        return read_json(path, "a model's configuration")["model_cfg"]["embed_dim"]
    except (InputError, LookupError, TypeError):
        return None


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
