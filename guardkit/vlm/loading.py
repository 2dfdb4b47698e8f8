"""Loading an image-text-to-text model of transformers with its processor, from a folder; for asking it and for looking inside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guardkit.artifacts import weights_variant
from guardkit.progress import bars_on_terminals_only
from guardkit.schema import InputError
from guardkit.vlm.base import one_line

DTYPES = ("auto", "float32", "bfloat16", "float16")
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")  # no code and no pickles


def load_model(folder: Path, *, what: str, device: str, dtype: str, device_setting: str) -> tuple[Any, Any]:
    """The processor and the frozen model. Code that lies beside them is never run, and pickled weights are not read.

    Args:
        folder: that `save_pretrained` wrote for both.
        what: for messages, such as "vlm.model NAME".
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: one of `DTYPES`; "auto": as saved.
        device_setting: what the setting of the device is called, for messages.
    Raises:
        InputError: it cannot be loaded, lacks weights, or has no chat template.
    """
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if (folder / ADAPTER_CONFIG).is_file():  # transformers would load another folder in its place, which that file names
        raise InputError(f"{what} holds an adapter of a model; give the model itself, whole and without {ADAPTER_CONFIG} beside it")
    on = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # what is missing is told below, in one line
        with bars_on_terminals_only(transformers.utils.logging), _quiet("transformers"):
            processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,  # the files may name other models, which nobody asked for
                output_loading_info=True,
                variant=weights_variant(os.listdir(folder)),
            )
        model, report = loaded
        model.to(on).eval().requires_grad_(False)
    except Exception as error:
        raise InputError(
            f"{what} could not be loaded on {on} ({type(error).__name__}: {one_line(str(error))}); it must be an "
            f"image-text-to-text model of transformers with safetensors weights, and {device_setting} auto, cpu or the name of a GPU"
        ) from error
    if report["missing_keys"]:  # by itself transformers would only warn, and go on with random ones
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise InputError(f"{what} lacks {len(report['missing_keys'])} weights, for instance {some}; get its files anew")
    if not getattr(processor, "chat_template", None):
        raise InputError(f"{what} has no chat template; choose a model that was tuned to follow instructions")
    return processor, model


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keeps a library's warnings to itself: by its handlers, because transformers decides by the levels of its logs what it checks."""
    handlers = list(logging.getLogger(library).handlers)
    for handler in handlers:
        handler.addFilter(_is_error)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def disarmed(text: str, tokenizer: Any) -> str:
    """The text with the model's special tokens taken apart, so that it can neither end its turn nor announce an image."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and len(token.content) > 1:
            text = text.replace(token.content, f"{token.content[0]} {token.content[1:]}")
    return text
