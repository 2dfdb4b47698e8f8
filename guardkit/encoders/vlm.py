"""A frozen vision-language model as an encoder: one prefill of image and prompt, and the state of the last token is the image's vector.

What a model is about to answer is in that state. A probe on it is CARD's detector (kevin-Abbring/CARD, ESORICS 2026), and the readout of
two words is the guard that `guardkit.finetune` trains.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guardkit.artifacts import fingerprint, read_json, written
from guardkit.checks import check_choice, check_whole, is_list
from guardkit.encoders.adapters import attach
from guardkit.encoders.base import prepare_image
from guardkit.encoders.frozen import Built, FrozenEncoder, hash_state, trial
from guardkit.encoders.places import LOCAL, encoder_folder, named_folder, named_weights, offline
from guardkit.policy import Policy
from guardkit.schema import InputError, shortened
from guardkit.vlm.loading import DTYPES, MODEL_FILES, disarmed, load_model

if TYPE_CHECKING:
    import torch

PROMPT = (
    "An image is unsafe if it shows any of the following:\n{policy}\nBy these rules, is this image safe or unsafe? Answer with one word."
)
RULES = "{policy}"  # where in a prompt the policy's text stands
_CONFIG, _SUFFIX = "config.json", ".safetensors"
_USUAL_SIZE = 448  # pixels, of a model that takes any
_MAX_SIZE = 4096
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm")  # what the language model does to a last state
_SIZE_KEYS = ("height", "longest_edge", "shortest_edge")
# what decides a state and cannot be told from names and shapes of weights
_DECIDES = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "rms_norm_eps",
    "layer_norm_eps", "rope_theta", "rope_parameters", "sliding_window", "layer_types", "patch_size", "spatial_merge_size", "scale_factor",
    "attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping",
)  # fmt: skip
# what decides the pixels that a processor gives to the model
_PROCESSED = (
    "do_resize", "size", "max_image_size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad",
    "do_center_crop", "crop_size", "do_image_splitting", "patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels",
)  # fmt: skip


class VLMEncoder(FrozenEncoder):
    """An image-text-to-text model of transformers, frozen: SmolVLM, Qwen-VL, PaliGemma, InternVL, LLaVA and others.

    An image's vector is the language model's state at the last token of image and prompt, after a layer and before the final norm. Layers
    above it are not run, and no text is generated. Every image is first brought to one square size, so that all make equally many tokens
    and a batch has no padding. It has neither texts nor gradients: heads that start from texts, and attacks, say so; heat maps are made by
    occlusion.

    Args:
        weights: "hf-hub:ORG/NAME", "local-dir:FOLDER" or a folder, with config.json, safetensors, tokenizer and chat template.
        prompt: what the model is asked about the image; "{policy}" in it stands for `rules`.
        rules: the policy's text; see `for_policy`. None for a prompt that has no place for it.
        layer: after which the state is taken, counted from 1; None: the last.
        image_size: pixels of a side that every image is scaled to; None: what the model's own image encoder takes, else 448.
        dtype: "float32", "bfloat16", "float16", or "auto": as saved.
        adapter: a folder with a LoRA adapter, see `guardkit.encoders.adapters`; None: the model as it is.
        backend: what scales images to that size, "pil" or "torchvision"; they differ by up to two of 255 levels. None: pil.
        decode: of JPEG files: "full", or "reduced": one whose sides are at least four times what the model sees is decoded at a half, a quarter or an
            eighth, never below twice what it sees. Several times as quick on photographs of a camera, and further from "full" than the backends.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        batch_size: images encoded at once.
    Raises:
        InputError: a folder that is not there or incomplete, or an argument out of range; later a model without a chat template, without a
            place for an image, or another kind of model; a prompt that is longer than it reads; an adapter of another model.
    """

    def __init__(
        self,
        weights: str,
        *,
        prompt: str = PROMPT,
        rules: str | None = None,
        layer: int | None = None,
        image_size: int | None = None,
        dtype: str = "float32",
        adapter: str | None = None,
        backend: str | None = None,
        decode: str = "full",
        device: str = "auto",
        batch_size: int = 8,
    ) -> None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"encoder.prompt must be a text, got {shortened(repr(prompt))}")
        if layer is not None:
            check_whole("encoder.layer", layer, 1)
        if image_size is not None:
            check_whole("encoder.image_size", image_size, 1, _MAX_SIZE)
        check_choice("encoder.dtype", dtype, DTYPES)
        for name, text in (("rules", rules), ("adapter", adapter)):
            if text is not None and not isinstance(text, str):
                raise InputError(f"encoder.{name} must be a text or null, got {shortened(repr(text))}")
        self.weights, self.prompt, self.rules, self.layer = weights, prompt, rules, layer
        self.image_size, self.adapter = image_size, adapter
        super().__init__(
            f"{weights} with an adapter" if adapter else weights,
            device=device,
            batch_size=batch_size,
            backend=backend,
            decode=decode,
            dtype=dtype,
        )
        named_folder(weights, holds=_CONFIG)  # what is wrong with it is told at once

    # --- the policy it reads ------------------------------------------------------------------------------------------

    @property
    def reads_policy(self) -> bool:
        """Whether the prompt has a place for a policy."""
        return RULES in self.prompt

    def for_policy(self, policy: Policy) -> VLMEncoder:
        """The encoder whose prompt states this policy; itself where the prompt has no place for one."""
        return self._with(rules=policy.rules()) if self.reads_policy else self

    def with_adapter(self, folder: Path | None) -> VLMEncoder:
        """The encoder with another adapter, or with none."""
        return self._with(adapter=None if folder is None else str(folder))

    def _with(self, **changed: Any) -> VLMEncoder:
        return VLMEncoder(**{**self.config, **changed}, device=self.device, batch_size=self.batch_size)

    def __getstate__(self) -> dict[str, Any]:
        """See `FrozenEncoder`: what the model was read from is made anew with it, the output's weights among it."""
        return {key: value for key, value in super().__getstate__().items() if key not in ("_processor", "_readout", "_text")}

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
        try:
            said = read_json(place / _CONFIG, "a model's configuration").get("text_config")
        except InputError:
            return []
        if not isinstance(said, dict) or said.get("hidden_size") not in (None, recorded["dim"]):
            return []
        return [dict(recorded["config"]) | {"weights": f"{LOCAL}{place}"}]

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this encoder again."""
        names = ("weights", "prompt", "rules", "layer", "image_size", "dtype", "adapter")
        return {name: getattr(self, name) for name in names} | {"backend": self._backend, "decode": self.decode}

    # --- carried elsewhere: see `Portable` ------------------------------------------------------------------------------

    def save(self, folder: Path) -> VLMEncoder:
        """See `Portable`. The files are copied as they are."""
        for pattern in MODEL_FILES:
            for path in sorted(self._folder.glob(pattern)):
                with written(folder / path.name) as temporary:
                    shutil.copyfile(path, temporary)
        return self._with(weights=f"{LOCAL}{folder}")

    def reads(self, folder: Path) -> bool:
        """See `Portable`."""
        place = named_folder(self.weights, holds=_CONFIG)
        return place is not None and place.resolve() == folder.resolve()

    @cached_property
    def _folder(self) -> Path:
        return named_folder(self.weights, holds=_CONFIG) or encoder_folder(self.weights, MODEL_FILES, remedy=offline("vlm"))

    # --- the model, built once ----------------------------------------------------------------------------------------

    def _build(self) -> Built:
        import torch

        what = f"encoder.weights {self.weights}"
        self._processor, model = load_model(self._folder, what=what, device=self.device, dtype=self.dtype, device_setting="encoder.device")
        language = model.get_decoder()
        layers = getattr(language, "layers", None)
        norm = next((name for name in _NORMS if hasattr(language, name)), None)
        if not isinstance(layers, torch.nn.ModuleList) or norm is None or model.get_output_embeddings() is None:
            raise InputError(
                f"{what} is a {type(model).__name__}, whose language model has no list of layers with a norm after it; take a model that "
                "continues text, such as SmolVLM, Qwen-VL, InternVL or PaliGemma"
            )
        if self.layer is not None and self.layer > len(layers):
            raise InputError(f"encoder.layer must be from 1 to {len(layers)}, the layers of {self.weights}, got {self.layer}")
        if self.reads_policy and self.rules is None:
            raise InputError(f"encoder.prompt has a place for a policy, {RULES}, and was given none; pass rules=TEXT, or use for_policy")
        base = hash_state(model)  # now, so that layers that are not run need not be kept for it
        adapter = None if self.adapter is None else attach(model, Path(self.adapter), base)
        language.layers = layers[: self.layer]
        # the state is wanted as it leaves the layer: its length is lost with any encoder, and a norm of the length does not need it
        self._readout = getattr(language, norm), model.get_output_embeddings()
        setattr(language, norm, torch.nn.Identity())
        images = self._processor.image_processor
        if hasattr(images, "do_image_splitting"):
            images.do_image_splitting = False  # into tiles beside the whole, which would be a dozen times the tokens
        size = self.image_size or _own_size(model.config, images)
        said: dict[str, Any] = {
            "size": [size, size],
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
            "interpolation": "bicubic",
            "resize_mode": "squash",
            "then": {"processor": type(images).__name__, **_settings(images, _PROCESSED)},
        }
        self._text = self.prompt.replace(RULES, disarmed(self.rules or "", self._processor.tokenizer))
        try:
            tokens = self._checked_tokens(model, said["size"])  # before anything is run, which may be too long for this machine
            dim = trial(lambda batch: self._states(model, batch), said["size"])
            self._check_sight(model, said["size"])
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{what} could not be asked about an image of {size} x {size} ({type(error).__name__}: {reason}); set encoder.image_size to "
                "one that it takes, or take another model"
            ) from error
        return Built(
            model,
            preprocess=prepare_image,
            encode=lambda batch: self._states(model, batch),
            dim=dim,
            preprocessing=said,
            architecture={
                "layer": len(language.layers),
                "dtype": str(model.dtype),
                "tokens": fingerprint(tokens),
                "text": _settings(model.config.get_text_config(), _DECIDES),
                "vision": _settings(getattr(model.config, "vision_config", model.config), _DECIDES),
                "adapter": adapter,
            },
            hash_weights=lambda: base,
        )

    def _inputs(self, model: Any, batch: torch.Tensor) -> Any:
        """What the model is given for (b, 3, height, width) images in [0, 1]."""
        from PIL import Image

        pixels = (batch.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
        asked = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": Image.fromarray(one)}, {"type": "text", "text": self._text}],
                }
            ]
            for one in pixels
        ]
        return self._processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device, dtype=model.dtype)

    def states(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, height, width) of `preprocess` -> (n, d) float32 states as the model gives them, with gradients where its weights take some."""
        return self._states(self.model, images)

    @property
    def base_hash(self) -> str:
        """A hash over the weights of the model without adapters."""
        return self._loaded.hash_weights()

    def _states(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """(b, 3, height, width) images in [0, 1] -> (b, d) float32 states of the last token."""
        states: torch.Tensor = model.base_model(**self._inputs(model, batch), use_cache=False).last_hidden_state[:, -1]
        return states.float()

    def _checked_tokens(self, model: Any, size: Sequence[int]) -> list[int]:
        """The tokens of image and prompt, once they are known to be few enough."""
        inputs = self._inputs(model, _two(size))
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        n = int(inputs["input_ids"].shape[1])
        if isinstance(most, int) and n > most:
            raise InputError(
                f"image and prompt are {n} tokens, and {self.weights} reads {most} (its context length); shorten encoder.prompt or the "
                "policy, or lower encoder.image_size"
            )
        if not bool(inputs["attention_mask"].all()):
            raise ValueError("two images of one size give different numbers of tokens")
        return [int(one) for one in inputs["input_ids"][0]]

    def _check_sight(self, model: Any, size: Sequence[int]) -> None:
        import torch

        with torch.inference_mode():
            black, white = self._states(model, _two(size))
        if torch.equal(black, white):
            raise InputError(
                f"{self.weights} answers the same for a black and a white image: its chat template has no place for an image; choose a "
                "model that was tuned to look at images"
            )

    # --- what a state says in words -------------------------------------------------------------------------------------

    def tokens_of(self, words: Sequence[str]) -> list[int]:
        """The token of each of some words, as the model would answer them.

        Args:
            words: such as ["safe", "unsafe"]. All are taken as they are, else with a blank in front, else with a capital, whichever makes
                one token of each.
        Raises:
            InputError: none does; the tokens are named.
        """
        _ = self._loaded
        tokenizer = self._processor.tokenizer
        unknown = tokenizer.unk_token_id
        found: list[list[list[int]]] = []
        for form in (str, " {}".format, str.capitalize, lambda word: f" {word.capitalize()}"):
            found.append([list(tokenizer.encode(form(word), add_special_tokens=False)) for word in words])
            ids = [one[0] for one in found[-1] if len(one) == 1 and one[0] != unknown]
            if len(set(ids)) == len(words):
                return ids
        parts = "; ".join(
            f"{word!r} is {' + '.join(repr(tokenizer.decode([one])) for one in ids)}" for word, ids in zip(words, found[0], strict=True)
        )
        raise InputError(
            f"{self.weights} does not write {' and '.join(words)} as one token each, and as different ones ({parts}); choose other words, such as [No,Yes] with a "
            "prompt that asks for them"
        )

    def readout(self, words: Sequence[str]) -> np.ndarray:
        """(2, d) float32 weights: unit state times sqrt(d) times these are the logits of two words, before any capping of logits.

        A root mean square norm of a state does not depend on the state's length, up to the tiny number that keeps it from dividing by zero;
        its gains are part of the weights.

        Args:
            words: two; see `tokens_of`.
        Raises:
            InputError: other than two words; the model's final norm is of another kind, or an earlier layer's state was asked for.
        """
        import torch

        if not is_list(words) or len(words) != 2 or not all(isinstance(one, str) and one.strip() for one in words):
            raise InputError(
                f"lora.words must be two words, of a safe and of an unsafe answer, as in [safe,unsafe], got {shortened(repr(words))}"
            )
        ids = self.tokens_of(words)
        if self.layer is not None:
            raise InputError("the words of an answer are read from the last layer; leave encoder.layer=null")
        norm, output = self._readout
        with torch.inference_mode():
            states = torch.randn(2, self.dim, generator=torch.Generator().manual_seed(0)).to(output.weight.device, output.weight.dtype)
            scaled = (states * states.float().square().mean(-1, keepdim=True).rsqrt().to(states.dtype)).float()
            first, second = norm(states).float() / scaled
            if not torch.allclose(first, second, rtol=0.05, atol=0.05):
                raise InputError(
                    f"the final norm of {self.weights} ({type(norm).__name__}) is no root mean square norm, so that its words cannot be read from "
                    "a state's direction; take another model"
                )
            gains = norm(torch.ones_like(states[:1])).float()[0]
            return (output.weight[ids].float() * gains).cpu().numpy()


def _own_size(config: Any, images: Any) -> int:
    """Pixels of a side that the model's image encoder takes."""
    square = _settings(images, ("size",)).get("size")
    said = (
        getattr(getattr(config, "vision_config", None), "image_size", None),
        _settings(images, ("max_image_size",)).get("max_image_size"),
        square if isinstance(square, Mapping) and square.get("height") else None,  # others say a range
    )
    for found in said:
        value = found[0] if isinstance(found, list | tuple) and found else found
        if isinstance(value, Mapping):
            value = next((value[key] for key in _SIZE_KEYS if value.get(key)), None)
        if isinstance(value, int) and 0 < value <= _MAX_SIZE:
            return value
    return _USUAL_SIZE


def _two(size: Sequence[int]) -> torch.Tensor:
    """A black and a white image."""
    import torch

    return torch.stack([torch.zeros(3, *size), torch.ones(3, *size)])


def _settings(part: Any, names: Sequence[str]) -> dict[str, Any]:
    """Those of a configuration that are there, in plain JSON types."""
    found = {name: getattr(part, name, None) for name in names}
    return {name: _plain(value) for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items() if one is not None}
    # a size of an image processor
    return {key: one for key, one in vars(value).items() if one is not None} if hasattr(value, "__dict__") else str(value)
