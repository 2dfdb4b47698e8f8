"""Head and encoder of a guard, from what a file keeps of them; and whether a file could keep them, before they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from guardkit.artifacts import fingerprint
from guardkit.encoders.base import Encoder
from guardkit.encoders.lookup import ENCODER_KINDS, build_encoder
from guardkit.guard_config import is_hash
from guardkit.heads import HEAD_KINDS, Head
from guardkit.kinds import check_arguments
from guardkit.schema import InputError

_NEARLY = 1e-3  # of a length, for encoders in half precision


def head_class(name: str, given: Head | type[Head] | None, trust: Sequence[str]) -> type[Head]:
    """The class that is given, else the one that is named."""
    kind: type = HEAD_KINDS.load(name, trust) if given is None else given if isinstance(given, type) else type(given)
    if not issubclass(kind, Head):
        raise InputError(f"head must be a subclass of guardkit.heads.Head, or an object of one, got {HEAD_KINDS.name(kind)}")
    # its module may have another name by now, as one that was a script or a notebook has
    if HEAD_KINDS.name(kind).rpartition(":")[2] != name.rpartition(":")[2]:
        raise InputError(f"the guard has a head of kind {name}, got head={HEAD_KINDS.name(kind)}; give the class that it was trained with")
    return kind


def outlines(kind: type[Head], settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Names, shapes and types of a head's weights, without memory: sizes in a file are not believed yet.

    Raises:
        ValueError: it cannot be built of these settings.
    """
    check_arguments(kind, settings, "head.settings")
    try:
        with torch.device("meta"):
            return kind(**settings).state_dict()
    except Exception as error:  # whatever it is, it comes of these settings
        raise ValueError(f"head.settings do not make a head of kind {HEAD_KINDS.name(kind)!r} ({reason_of(error)})") from error


def filled(kind: type[Head], settings: Mapping[str, Any], expected: Mapping[str, torch.Tensor], data: bytes) -> Head:
    """A head with the weights of a file's bytes.

    Raises:
        ValueError, SafetensorError: they are not what is expected.
    """
    found = load(data)
    for name in sorted(expected.keys() | found.keys()):
        said, got = (_outline(values.get(name)) for values in (expected, found))
        if said != got:
            raise ValueError(f"{name} is {got}, expected {said}")
        if not bool(found[name].isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values, which decide nothing")
    head = kind(**settings)
    head.load_state_dict(found)
    return head


def check_logits(head: Head, dim: int, n_categories: int) -> torch.Tensor:
    """(2, 1 + k) logits of two embeddings that are always the same: a head gives as many as its guard needs.

    Raises:
        ValueError: the head gives something else.
    """
    rows, was_training = torch.linspace(-1, 1, 2 * dim).view(2, dim), head.training
    with torch.inference_mode():
        logits = head.eval()(rows)
    head.train(was_training)
    if (tuple(logits.shape), logits.dtype) != ((2, 1 + n_categories), torch.float32):
        raise ValueError(
            f"for embeddings of shape {(2, dim)} the head must give float32 logits of shape {(2, 1 + n_categories)}, a decision and "
            f"{n_categories} categories each, got {_outline(logits)}"
        )
    return logits


def check_head(head: Head, encoder: Encoder, n_categories: int) -> None:
    """Saves a head in memory and loads it again, so that none is trained in vain.

    Args:
        head: as it starts.
        encoder: whose embeddings it takes.
        n_categories: k of the policy.
    Raises:
        InputError: what is loaded would not be what was saved, or it gives something else than (n, 1 + k) logits.
    """
    name = HEAD_KINDS.name(type(head))
    if not isinstance(head, Head):
        raise InputError(f"head {name} must be a subclass of guardkit.heads.Head")
    _, settings = HEAD_KINDS.describe(head)
    try:
        logits = check_logits(head, encoder.dim, n_categories)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"head {name} cannot be used: {reason_of(error)}") from error
    try:
        again = filled(type(head), settings, outlines(type(head), settings), save(tensors(head)))
        if not torch.equal(logits, check_logits(again, encoder.dim, n_categories)):
            raise ValueError("built again from its config and its weights, it gives other logits")
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"head {name} could not be saved and loaded again: {reason_of(error)}") from error


def check_encoder(encoder: Encoder) -> None:
    """Builds an encoder of another package again, so that no guard is trained on one that is not found afterwards.

    Raises:
        InputError: it would be another one, or it does not give unit vectors.
    """
    name, config = ENCODER_KINDS.describe(encoder)
    if name in ENCODER_KINDS.ours:
        return
    try:
        fingerprint(encoder.preprocessing)
        vectors = encoder.encode_images([np.full((8, 8, 3), 128, np.uint8)])
        if (vectors.dtype, vectors.shape) != (np.float32, (1, encoder.dim)) or abs(np.linalg.norm(vectors) - 1) > _NEARLY:
            raise ValueError(f"encode_images must give a float32 unit vector of shape {(1, encoder.dim)} for one image")
        again = build_encoder(type(encoder), config).fingerprint
        if again != encoder.fingerprint or not is_hash(again):
            raise ValueError("built again from its config it must have the same fingerprint, 64 hex digits")
    except Exception as error:  # whatever it is, it comes of this class
        raise InputError(f"encoder {name} cannot be used and found again ({type(error).__name__}: {reason_of(error)})") from error


def tensors(head: Head) -> dict[str, torch.Tensor]:
    """What a file keeps of its weights."""
    return {name: value.contiguous() for name, value in head.state_dict().items()}


def _outline(value: torch.Tensor | None) -> str:
    return "not there" if value is None else f"{value.dtype} of shape {tuple(value.shape)}".removeprefix("torch.")


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
