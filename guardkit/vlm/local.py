"""Asking a local model: any image-text-to-text model of transformers, from a folder or the Hub."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from guardkit.artifacts import fingerprint, hash_file, weights_variant
from guardkit.checks import check_choice, check_whole
from guardkit.hub import hub_folder
from guardkit.limits import shrink
from guardkit.progress import bars_on_terminals_only
from guardkit.schema import InputError
from guardkit.vlm.base import CUT_OFF, VERSION, Answer, Question, check_model, one_line, reply

log = logging.getLogger(__name__)

_DTYPES = ("auto", "float32", "bfloat16", "float16")
# the sampling settings that a model brings along have no effect then, and are warned about unless unset
_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
_MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")  # no code and no pickles


class TransformersVLM:
    """A local image-text-to-text model, asked one question at a time and greedily, so that answers are repeatable.

    It is loaded when it is first needed. Code that comes with a model is neither downloaded nor run, pickled weights
    are not read. A question's schema and seed have no effect.

    Args:
        model: a folder that `save_pretrained` wrote for model and processor, or a Hub id.
        revision: branch, tag or commit of a Hub id; None for its main branch.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        max_new_tokens: of a reply, at least 1.
        max_image_px: the longer side of an image in pixels; larger ones are scaled down before the model's own preprocessing.
    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_new_tokens: int = 512,
        max_image_px: int = 1024,
    ) -> None:
        check_model(model)
        check_whole("vlm.max_new_tokens", max_new_tokens, 1)
        check_whole("vlm.max_image_px", max_image_px, 1)
        check_choice("vlm.dtype", dtype, _DTYPES)
        self.model, self.revision, self.device, self.dtype = model, revision, device, dtype
        self.max_new_tokens, self.max_image_px = max_new_tokens, max_image_px
        self.name = Path(model).expanduser().name if Path(model).expanduser().is_dir() else model
        self._lock = threading.Lock()

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything the answers depend on. A folder is known by the hashes of its files, a Hub id by its commit."""
        from transformers import __version__

        folder = self._folder
        if Path(self.model).expanduser().is_dir():
            files = {path for pattern in _MODEL_FILES for path in folder.rglob(pattern)}
            weights = {"files": fingerprint({path.relative_to(folder).as_posix(): hash_file(path) for path in files})}
        else:
            weights = {"model": self.model, "commit": folder.name}
        settings = {name: getattr(self, name) for name in ("dtype", "max_new_tokens", "max_image_px")}
        return {"vlm": "transformers", "version": VERSION, **weights, **settings, "transformers": __version__}

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, in order.

        Raises:
            InputError: the model cannot be found or loaded.
        """
        with self._lock:
            return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Answer:
        import torch

        processor, model = self._loaded
        try:
            inputs = processor.apply_chat_template(
                self._messages(question), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(model.device, dtype=model.dtype)
            with torch.inference_mode():
                output = model.generate(**inputs, **_GREEDY, max_new_tokens=self.max_new_tokens)
            tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
            ends = model.generation_config.eos_token_id
            if len(tokens) >= self.max_new_tokens and tokens[-1] not in (ends if isinstance(ends, list) else [ends]):
                return replace(CUT_OFF, n_calls=1)
            return replace(reply(processor.tokenizer.decode(tokens, skip_special_tokens=True)), n_calls=1)
        except Exception as error:  # a template without system messages, too many images, no memory: each model has its own
            log.warning("%s could not be asked: %s: %s", self.name, type(error).__name__, one_line(str(error)))
            return Answer(None, f"model could not be asked ({type(error).__name__})", one_line(str(error)), transient=True, n_calls=1)

    def _messages(self, question: Question) -> list[dict[str, Any]]:
        from PIL import Image

        content: list[dict[str, Any]] = [
            {"type": "image", "image": Image.fromarray(shrink(image, self.max_image_px))} for image in question.images
        ]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": self._disarmed(question.prompt)}]}]
        if question.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self._disarmed(question.system)}]})
        return messages

    def _disarmed(self, text: str) -> str:
        """Takes the model's special tokens apart, so that a caption can neither end its turn nor announce an image."""
        processor, _ = self._loaded
        for token in processor.tokenizer.added_tokens_decoder.values():
            if token.special and len(token.content) > 1:
                text = text.replace(token.content, f"{token.content[0]} {token.content[1:]}")
        return text

    @cached_property
    def _folder(self) -> Path:
        folder = Path(self.model).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise InputError(f"{folder} holds no config.json; give a folder that save_pretrained wrote for model and processor")
            return folder
        return hub_folder(
            self.model,
            _MODEL_FILES,
            refusal=f"vlm.model {self.model} is no folder and cannot be had from the Hub",
            remedy="without a network, save the model's files in a folder and give that",
            revision=self.revision,
        )

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The processor and the model."""
        import torch
        import transformers
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        folder = self._folder
        try:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            with bars_on_terminals_only(transformers.utils.logging):
                loaded: Any = AutoModelForImageTextToText.from_pretrained(
                    folder,
                    dtype=self.dtype,
                    trust_remote_code=False,
                    use_safetensors=True,
                    local_files_only=True,  # the files may name other models, which nobody asked for
                    output_loading_info=True,
                    variant=weights_variant(os.listdir(folder)),
                )
            model, report = loaded
            model.to(device).eval().requires_grad_(False)
        except Exception as error:
            raise InputError(
                f"vlm.model {self.model} could not be loaded on {device} ({type(error).__name__}: {one_line(str(error))}); it must be an "
                "image-text-to-text model of transformers with safetensors weights, and vlm.device auto, cpu or the name of a GPU"
            ) from error
        if report["missing_keys"]:  # by itself transformers would only warn, and go on with random ones
            some = ", ".join(sorted(report["missing_keys"])[:3])
            raise InputError(f"vlm.model {self.model} lacks {len(report['missing_keys'])} weights, for instance {some}; get its files anew")
        if not getattr(processor, "chat_template", None):
            raise InputError(f"vlm.model {self.model} has no chat template; choose a model that was tuned to follow instructions")
        if model.generation_config.pad_token_id is None:  # else it would be warned about with every question
            model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return processor, model
