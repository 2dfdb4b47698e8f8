"""What a classifier costs: parameters, time, labels, and whether a new policy needs a new one. What is not known is None, with a reason."""

from __future__ import annotations

from typing import Any

import torch

from guardkit.evaluation.scoring import Contender
from guardkit.schema import takes_embeddings

_STORED = "all of them were found in the store, so nothing was timed"


def cost(contender: Contender, own: tuple[float, int], encoder: tuple[float, int] | None) -> dict[str, Any]:
    """The costs of one classifier, in plain JSON types.

    Args:
        contender: was measured.
        own: seconds that it took beside the encoder, and for how many images.
        encoder: seconds of its encoder, and for how many images; None: it looks at images itself.
    Returns:
        `parameters` and `encoder_parameters` (numbers in its weights), `ms_per_image` (beside the encoder) and `encoder_ms_per_image` as timed
        in this run, `reads_policy`, `n_labels` (labelled images it was trained on, unsafe and safe), and `reasons` of what is None.
    """
    guard = contender.guard
    reasons: dict[str, str] = {}

    def known(name: str, value: Any, reason: str) -> Any:
        if value is None:
            reasons[name] = reason
        return value

    head = getattr(guard, "head", None)
    parameters = getattr(guard, "n_parameters", None)
    if parameters is None and isinstance(head, torch.nn.Module):
        parameters = sum(value.numel() for value in head.state_dict().values() if value.is_floating_point())
    found: dict[str, Any] = {"parameters": known("parameters", parameters, "it does not say")}
    if takes_embeddings(guard):
        of_encoder = _parameters(guard.encoder)
        found["encoder_parameters"] = known("encoder_parameters", of_encoder, "the encoder's model does not list its weights")
    else:
        found["encoder_parameters"] = known("encoder_parameters", None, "it looks at images itself")
    found["ms_per_image"] = known("ms_per_image", _milliseconds(own), _STORED)
    if encoder is None:
        found["encoder_ms_per_image"] = known("encoder_ms_per_image", None, "it looks at images itself")
    else:
        found["encoder_ms_per_image"] = known("encoder_ms_per_image", _milliseconds(encoder), _STORED)
    found["reads_policy"] = known("reads_policy", getattr(guard, "reads_policy", None), "it does not say")
    found["n_labels"] = known("n_labels", _n_labels(guard), "it does not say what it was trained on")
    return found | {"reasons": reasons}


def _milliseconds(timed: tuple[float, int]) -> float | None:
    seconds, n = timed
    return 1000 * seconds / n if n else None


def _parameters(encoder: Any) -> int | None:
    """Of its model, the part for texts included where it has one."""
    model = getattr(encoder, "model", None)
    return sum(value.numel() for value in model.parameters()) if isinstance(model, torch.nn.Module) else None


def _n_labels(guard: Any) -> int | None:
    said = getattr(guard, "training", None) or {}
    if "n_unsafe" in said and "n_safe" in said:
        return int(said["n_unsafe"]) + int(said["n_safe"])
    declared = getattr(guard, "n_labels", None)
    return None if declared is None else int(declared)
