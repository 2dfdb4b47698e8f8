"""CLIP, SigLIP and DINO models through transformers, from the files that it writes: a folder, or a repository on the Hub.

Weights are safetensors, and code that lies beside them is never run.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guardkit.artifacts import read_json, weights_variant, written
from guardkit.encoders.base import BACKENDS, TORCHVISION, CutTexts
from guardkit.encoders.frozen import Built, FrozenEncoder, checked_device, hash_state, image_tower_cast, trial
from guardkit.encoders.places import LOCAL, encoder_folder, named_folder, named_weights, offline
from guardkit.progress import bars_on_terminals_only
from guardkit.schema import InputError, shortened

if TYPE_CHECKING:
    import torch

_CONFIG, _SUFFIX = "config.json", ".safetensors"
_PATTERNS = ("*.json", "*.safetensors", "merges.txt", "*.model")
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# what decides an image's embedding and cannot be told from names and shapes of weights
_DECIDES = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "rope_theta")


@dataclass(frozen=True)
class _Texts:
    """How a family reads texts.

    Attributes:
        lower_case: it was trained on lower-case texts, and not every tokenizer of it sees to that.
        masks_padding: padding is hidden from the model. SigLIP was trained with padding to its full context in plain sight.
    """

    lower_case: bool
    masks_padding: bool


@dataclass(frozen=True)
class _Family:
    """Models of one kind.

    Attributes:
        backends: of its image processor, the one that is taken by default first.
        texts: how it reads them; None: it does not.
    """

    backends: tuple[str, ...]
    texts: _Texts | None = None


_FAMILIES = {  # by the `model_type` of config.json
    "clip": _Family(BACKENDS, _Texts(lower_case=False, masks_padding=True)),
    "siglip": _Family(BACKENDS, _Texts(lower_case=True, masks_padding=False)),  # SigLIP 2 with images of one size as well
    "dinov2": _Family(BACKENDS),
    "dinov2_with_registers": _Family(BACKENDS),
    "dinov3_vit": _Family((TORCHVISION,)),
    "dinov3_convnext": _Family((TORCHVISION,)),
}


class TransformersEncoder(FrozenEncoder):
    """A frozen model of transformers.

    An image's vector is what the family means by it: the projected image embedding of CLIP, the pooled one of SigLIP, the
    class token of DINOv2 and DINOv3 after the last norm (of their ConvNeXt the pooled map). CLIP and SigLIP also encode
    texts, padded to the full context; DINO has none. All have gradients.

    Args:
        weights: "hf-hub:ORG/NAME", "local-dir:FOLDER" or a folder, with config.json, safetensors and the image processor's
            preprocessor_config.json or processor_config.json.
        backend: of the image processor, "pil" or "torchvision": they differ by up to two of 255 levels. None: pil, and
            torchvision for DINOv3, which has no other.
        decode: of JPEG files: "full", or "reduced": one whose sides are at least four times what the model sees is decoded at a half, a quarter or an
            eighth, never below twice what it sees. Several times as quick on photographs of a camera, and further from "full" than the backends.
        dtype: of the image tower: "float32", or "bfloat16": quicker where the machine computes in it, with half as much memory beside the
            float32 model, which texts and gradients keep. Vectors move a little, so that it is another encoder.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        batch_size: images encoded at once.
    Raises:
        InputError: a folder that is not there or incomplete, a model of another family, or an unknown backend.
    """

    casts = True
    _names_pil = True

    def __init__(
        self,
        weights: str,
        *,
        backend: str | None = None,
        decode: str = "full",
        dtype: str = "float32",
        device: str = "auto",
        batch_size: int = 32,
    ) -> None:
        self.weights = weights
        super().__init__(weights, device=device, batch_size=batch_size, backend=backend, decode=decode, dtype=dtype)
        self._cut = CutTexts(weights)
        named_folder(weights, holds=_CONFIG)  # what is wrong with it is told at once

    # --- where it is, and may have moved: see `guardkit.encoders.lookup` ------------------------------------------------

    @classmethod
    def named(cls, recorded: Mapping[str, Any], text: str) -> dict[str, Any] | None:
        """See `Movable`."""
        return named_weights(recorded, text, holds=_CONFIG)

    @classmethod
    def candidates(cls, recorded: Mapping[str, Any], place: Path, files: Sequence[str]) -> list[dict[str, Any]]:
        """See `Movable`."""
        if _CONFIG not in files or not any(name.endswith(_SUFFIX) for name in files):
            return []
        if _width(place / _CONFIG) not in (None, recorded["dim"]):
            return []
        return [dict(recorded["config"]) | {"weights": f"{LOCAL}{place}"}]

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this encoder again."""
        return {"weights": self.weights, "backend": self._backend, "decode": self.decode, "dtype": self.dtype}

    @property
    def backend(self) -> str:
        """Of the image processor, "pil" or "torchvision"."""
        return self._backend or self._family.backends[0]

    # --- carried elsewhere: see `Portable` ------------------------------------------------------------------------------

    def save(self, folder: Path) -> TransformersEncoder:
        """See `Portable`. The files are copied as they are."""
        for name in sorted(os.listdir(self._folder)):
            if any(fnmatch(name, pattern) for pattern in _PATTERNS):
                with written(folder / name) as temporary:
                    shutil.copyfile(self._folder / name, temporary)
        return TransformersEncoder(f"{LOCAL}{folder}", **self._settings)

    def reads(self, folder: Path) -> bool:
        """See `Portable`."""
        place = named_folder(self.weights, holds=_CONFIG)
        return place is not None and place.resolve() == folder.resolve()

    @cached_property
    def _folder(self) -> Path:
        return named_folder(self.weights, holds=_CONFIG) or encoder_folder(self.weights, _PATTERNS, remedy=offline("transformers"))

    @cached_property
    def _family(self) -> _Family:
        mend = "give a model's folder as save_pretrained writes it"
        kind = read_json(self._folder / _CONFIG, "a model's configuration", mend).get("model_type")
        if not isinstance(kind, str) or kind not in _FAMILIES:
            what = "SigLIP 2 for images of any shape (NaFlex)" if kind == "siglip2" else f"a model of type {shortened(repr(kind))}"
            raise InputError(
                f"{self._folder / _CONFIG} describes {what}, and encoder=transformers takes {', '.join(_FAMILIES)} (SigLIP 2 is siglip); "
                "code that comes with a model is never run: take another, encoder=open_clip, or its image tower in ONNX as encoder=onnx"
            )
        family = _FAMILIES[kind]
        if self._backend is not None and self._backend not in family.backends:
            raise InputError(f"encoder.backend of {kind} must be {' or '.join(family.backends)}, got {self._backend!r}")
        return family

    # --- the model, built once ----------------------------------------------------------------------------------------

    def _build(self) -> Built:
        import torch
        import transformers
        from PIL import Image

        family, folder, device = self._family, self._folder, checked_device(self.device)
        files = os.listdir(folder)
        if not any(name.endswith(_SUFFIX) for name in files):
            raise InputError(f"{folder} holds no weights in safetensors; save the model anew, as save_pretrained does by default")
        ours = {"local_files_only": True, "trust_remote_code": False}
        try:
            with bars_on_terminals_only(transformers.utils.logging):
                processors = {
                    backend: transformers.AutoImageProcessor.from_pretrained(folder, backend=backend, **ours) for backend in family.backends
                }
                loaded: Any = transformers.AutoModel.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, variant=weights_variant(files), **ours
                )
            model, report = loaded
            if report["missing_keys"]:  # by itself it would only warn, and go on with random ones
                raise ValueError(f"the weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
            model.eval().requires_grad_(False).to(device)
            said = _preprocessing(processors[self.backend])

            forward = self._images_of(model)
            dim = trial(lambda batch: forward(pixel_values=batch.to(device)).pooler_output, said["size"])
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"encoder {self.name} could not be loaded ({type(error).__name__}: {reason}); its files may be damaged, incomplete, or of "
                f"different models: get {folder} anew"
            ) from error
        vision = getattr(model.config, "vision_config", model.config)

        def cast() -> Callable[[torch.Tensor], torch.Tensor]:
            tower = self._images_of(image_tower_cast(model, seeing=lambda name: not name.startswith("text")))
            return lambda batch: tower(pixel_values=batch.to(self._device, torch.bfloat16)).pooler_output

        return Built(
            model,
            preprocess=lambda image, how: processors[how["backend"]](images=Image.fromarray(image), return_tensors="pt")["pixel_values"][0],
            encode=lambda batch: forward(pixel_values=batch.to(self._device)).pooler_output,
            cast=cast,
            dim=dim,
            preprocessing=said,
            architecture={name: getattr(vision, name, None) for name in _DECIDES},
            hash_weights=lambda: hash_state(model),
        )

    # --- pixels and texts ---------------------------------------------------------------------------------------------

    def encode_pixels(self, pixels: torch.Tensor, *, normalize: bool = True, prepared: bool = False) -> torch.Tensor:
        """(n, 3, h, w) float in [0, 1] -> (n, d), differentiable with respect to the pixels; see `Differentiable`."""
        return self._encode_pixels(pixels, normalize=normalize, prepared=prepared, crop_rounds_down=True)

    def image_module(self) -> torch.nn.Module:
        """See `Traceable`."""
        from guardkit.encoders.tracing import ImageTower

        return ImageTower(self.model, lambda model, pixels: self._images_of(model)(pixel_values=pixels).pooler_output)

    def _images_of(self, model: Any) -> Callable[..., Any]:
        """What a model of this family is asked for the vectors of images."""
        forward: Callable[..., Any] = model if self._family.texts is None else model.get_image_features
        return forward

    @property
    def encode_texts(self) -> Callable[[list[str]], np.ndarray]:
        """See `EncodesTexts`. DINO's encoders have no such attribute.

        Raises:
            AttributeError: the model has no texts.
        """
        texts = self._family.texts
        if texts is None:
            raise AttributeError(f"encoder {self.name} has no texts")
        return partial(self._encode_texts, texts)

    def _encode_texts(self, how: _Texts, texts: list[str]) -> np.ndarray:
        import torch
        from torch.nn import functional

        if not texts:
            return np.zeros((0, self.dim), np.float32)
        length = self._context_length
        read = _as_read(texts, how)
        self._cut.warn(read, self._token_ids, length)
        # to the full context, as SigLIP was trained; to CLIP it makes no difference
        tokens = self._tokens(read, length)
        given = {name: tokens[name].to(self._device) for name in ("input_ids", *(["attention_mask"] if how.masks_padding else []))}
        with torch.inference_mode():
            vectors = self.model.get_text_features(**given).pooler_output
            return functional.normalize(vectors, dim=-1).float().cpu().numpy()

    def cut_off(self, texts: list[str]) -> str | None:
        """See `EncodesTexts`."""
        how = self._family.texts
        return None if how is None else self._cut.sentence(_as_read(texts, how), self._token_ids, self._context_length)

    @property
    def _context_length(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    def _token_ids(self, texts: list[str], length: int) -> torch.Tensor:
        ids: torch.Tensor = self._tokens(texts, length)["input_ids"]
        return ids

    def _tokens(self, texts: Sequence[str], length: int) -> Any:
        return self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_attention_mask=True, return_tensors="pt"
        )

    @cached_property
    def _tokenizer(self) -> Any:
        import transformers

        # without it transformers would take a tokenizer that keeps punctuation, on which SigLIP was not trained
        if (self._folder / "spiece.model").is_file() and not find_spec("sentencepiece"):
            raise InputError(f"the texts of encoder {self.name} need SentencePiece; install it with: pip install sentencepiece")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
            tokenizer.padding_side = "right"  # as all of them were trained, whatever the class's default
            tokenizer(["a"], padding="max_length", max_length=8)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the tokenizer of encoder {self.name} could not be loaded ({reason}); put its files beside the weights"
            ) from error
        return tokenizer


def _as_read(texts: Sequence[str], how: _Texts) -> list[str]:
    return [text.lower() for text in texts] if how.lower_case else list(texts)


def _width(path: Path) -> Any:
    """The width that a model's configuration states, None where it states none, -1 for a model of another kind.

    Cheaper than building the model.
    """
    try:
        said = read_json(path, "a model's configuration")
        if said.get("model_type") not in _FAMILIES:
            return -1
        by_kind = {"clip": said.get("projection_dim"), "siglip": said.get("vision_config", {}).get("hidden_size")}
        return by_kind.get(said["model_type"], said.get("hidden_size"))
    except (InputError, AttributeError, TypeError):
        return None


def _preprocessing(processor: Any) -> dict[str, Any]:
    """An image processor in the terms of `prepare_pixels`.

    Raises:
        ValueError: it does something that those cannot say.
    """
    size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
    if not (processor.do_resize and processor.do_rescale and processor.do_normalize) or not math.isclose(
        processor.rescale_factor, 1 / 255, rel_tol=1e-6
    ):
        raise ValueError("the image processor must resize, divide by 255 and standardise")
    if int(processor.resample) not in _INTERPOLATIONS:
        raise ValueError(f"the image processor must resize with bilinear or bicubic interpolation, got {processor.resample!r}")
    to = [size.height or size.shortest_edge, size.width or size.shortest_edge]
    is_squashed = bool(size.height and size.width)
    if not all(to) or size.longest_edge or not (is_squashed or crop):
        raise ValueError(f"the image processor must make images of one size, got size {size} and crop {crop}")
    seen = [crop.height, crop.width] if crop else to
    if seen[0] > to[0] or seen[1] > to[1]:
        raise ValueError(f"the image processor must crop at most what it has resized to, got size {size} and crop {crop}")
    said: dict[str, Any] = {
        "size": seen,
        "mean": [float(value) for value in processor.image_mean],
        "std": [float(value) for value in processor.image_std],
        "interpolation": _INTERPOLATIONS[int(processor.resample)],
        "resize_mode": "squash" if is_squashed else "shortest",
    }
    return said if seen == to else said | {"resize": to}
