"""Asking a local model: any image-text-to-text model of transformers, from a folder or the Hub."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from guardkit.artifacts import fingerprint, hash_file
from guardkit.checks import check_choice, check_whole
from guardkit.hub import hub_folder
from guardkit.limits import shrink
from guardkit.schema import InputError
from guardkit.vlm.base import CUT_OFF, VERSION, Answer, Question, check_model, one_line, reply
from guardkit.vlm.loading import DTYPES, MODEL_FILES, disarmed, load_model

log = logging.getLogger(__name__)

# the sampling settings that a model brings along have no effect then, and are warned about unless unset
_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


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
        check_choice("vlm.dtype", dtype, DTYPES)
        self.model, self.revision, self.device, self.dtype = model, revision, device, dtype
        self.max_new_tokens, self.max_image_px = max_new_tokens, max_image_px
        self.name = Path(model).expanduser().name if Path(model).expanduser().is_dir() else model
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which a copy reads again; what it said of the weights stays."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_folder", "_loaded")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything the answers depend on. A folder is known by the hashes of its files, a Hub id by its commit."""
        from transformers import __version__

        folder = self._folder
        if Path(self.model).expanduser().is_dir():
            files = {path for pattern in MODEL_FILES for path in folder.rglob(pattern)}
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
        return disarmed(text, self._loaded[0].tokenizer)

    @cached_property
    def _folder(self) -> Path:
        folder = Path(self.model).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise InputError(f"{folder} holds no config.json; give a folder that save_pretrained wrote for model and processor")
            return folder
        return hub_folder(
            self.model,
            MODEL_FILES,
            refusal=f"vlm.model {self.model} is no folder and cannot be had from the Hub",
            remedy="without a network, save the model's files in a folder and give that",
            revision=self.revision,
        )

    @property
    def n_parameters(self) -> int | None:
        """Of the model; None before it was asked anything, and so loaded."""
        return sum(value.numel() for value in self._loaded[1].parameters()) if "_loaded" in self.__dict__ else None

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The processor and the model."""
        processor, model = load_model(
            self._folder, what=f"vlm.model {self.model}", device=self.device, dtype=self.dtype, device_setting="vlm.device"
        )
        if model.generation_config.pad_token_id is None:  # else it would be warned about with every question
            model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return processor, model
