"""What published classifiers have in common: a head on somebody's encoder, or a model that looks at images itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import nn

from guardkit.artifacts import fingerprint
from guardkit.checks import check_number, is_list
from guardkit.encoders.base import Encoder
from guardkit.policy import Policy
from guardkit.schema import InputError


class HeadGuard:
    """A classifier that is a head on an encoder's embeddings. Meets the `EmbeddingGuard` protocol.

    Args:
        name: for tables.
        head: (n, d) -> (n,) logits, the logarithm of the odds of unsafe; it stays on the CPU.
        encoder: whose embeddings it takes.
        dim: d, the width it takes.
        covers: the policy's categories it was made to find (see `covered`); None: all.
        threshold: flag when score >= threshold, in [0, 1].
        is_normalized: whether it takes unit vectors, or embeddings as the model gives them.
        notes: what a reader of its figures should know, in sentences.
        reads_policy: whether its scores follow from the policy's words.
        n_labels: labelled images that it was trained on; None: not known.
    Raises:
        InputError: the encoder's embeddings have another width, or an argument is out of range.
    """

    def __init__(
        self,
        name: str,
        head: nn.Module,
        encoder: Encoder,
        *,
        dim: int,
        covers: frozenset[str] | None,
        threshold: float,
        is_normalized: bool = True,
        notes: Sequence[str] = (),
        reads_policy: bool = False,
        n_labels: int | None = None,
    ) -> None:
        if encoder.dim != dim:
            raise InputError(
                f"baseline {name} takes {dim}-d embeddings, but encoder {encoder.name} gives {encoder.dim}-d ones; "
                "choose the encoder that its weights were made for"
            )
        self.name, self.encoder, self.covers, self.is_normalized = name, encoder, covers, is_normalized
        self.threshold = checked_share(name, "threshold", threshold)
        self.notes, self.reads_policy, self.n_labels = tuple(notes), reads_policy, n_labels
        self.head = head.eval().requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """A hash over the head's kind and weights, and the encoder's fingerprint."""
        return fingerprint({"head": type(self.head).__name__, "weights": hash_weights(self.head), "encoder": self.encoder.fingerprint})

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(n, d) embeddings, on any device -> (n,) float32 logits on the CPU, differentiable."""
        return self.head(embeddings.to("cpu", torch.float32))


def hash_weights(module: nn.Module) -> str:
    """Over names, types, shapes and values, 64 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def covered(baseline: str, covers: Sequence[str] | None, policy: Policy) -> frozenset[str] | None:
    """The categories of the policy that a classifier was made to find.

    Args:
        baseline: for messages.
        covers: category names; those that the policy lacks do not matter, so that one list serves many policies. None: all.
        policy: of the evaluation.
    Raises:
        InputError: not a list of names.
    """
    if covers is None:
        return None
    if not is_list(covers) or not covers or not all(isinstance(one, str) for one in covers):
        raise InputError(f"baseline.{baseline}.covers must be a list of category names, or null for all, got {covers!r}")
    return frozenset(covers) & frozenset(policy.category_names)


def checked_share(name: str, argument: str, value: float) -> float:
    """Raises InputError unless it is a number in [0, 1]."""
    check_number(f"baseline.{name}.{argument}", value, "[0, 1]")
    return float(value)
