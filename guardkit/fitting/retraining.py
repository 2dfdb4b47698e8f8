"""A head trained anew for a policy, on embeddings that are stored: what a new policy costs a guard that cannot read it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from guardkit.checks import MAX_SEED, check_whole
from guardkit.classifier import GuardClassifier
from guardkit.counterfactual.edits import Edits
from guardkit.data.arms import arm_named
from guardkit.data.columns import sources_of
from guardkit.data.sources.base import Source
from guardkit.data.training_images import training_images
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.fitting.module import DEFAULT_THRESHOLD
from guardkit.fitting.parts import HeadFactory, head_factory, make_parts, new_head
from guardkit.fitting.recipe import Recipe, check_threshold
from guardkit.heads import Head
from guardkit.policy import Policy

_ARM = "unpaired"  # natural images alone: a new policy has no pairs yet


@dataclass(frozen=True)
class Retrained:
    """A head that is trained for each policy, on the same encoder, with as many labels for each.

    Attributes:
        name: for tables.
        encoder: frozen; its embeddings are made once for all policies.
        head: as of `guardkit.train_guard`.
        n_unsafe: labelled unsafe images of each policy, validation included.
        safe_per_unsafe: safe images for each unsafe one, or "all"; what the policy allows is among them.
        threshold: a number in [0, 1], or an operating point.
        seed: of the labelled subset, the order of batches and the first weights.
    Raises:
        InputError: a value out of range, or no such head.
    """

    name: str
    encoder: Encoder
    head: str | type[Head] | HeadFactory = "linear"
    n_unsafe: int = 64
    safe_per_unsafe: int | str = 1
    threshold: float | str = DEFAULT_THRESHOLD
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(f"retrain.{self.name}.n_unsafe", self.n_unsafe, 2)
        check_whole("seed", self.seed, 0, MAX_SEED)
        check_threshold(self.threshold)
        head_factory(self.head)


@dataclass(frozen=True)
class Retraining:
    """What came of it under one policy.

    Attributes:
        guard: with its threshold, and a list of what it was trained on.
        seconds: from the policy to the guard, on embeddings that are stored: finding them is counted, making them is not.
        embedding_seconds: of images that no earlier policy had embedded yet, reading included.
        n_labels: of images, unsafe and safe.
        notes: what the source could not give, in sentences.
    """

    guard: GuardClassifier
    seconds: float
    embedding_seconds: float
    n_labels: int
    notes: list[str] = field(default_factory=list)


def retrain(asked: Retrained, source: Source, policy: Policy, store: EmbeddingStore) -> Retraining:
    """Trains one head for one policy.

    Args:
        asked: what is trained.
        source: of images labelled under the policy.
        policy: the new one.
        store: of the encoder's embeddings.
    Raises:
        InputError: too few images of a class.
    """
    started = time.perf_counter()
    torch.manual_seed(asked.seed)
    parts = make_parts(
        source,
        policy,
        store,
        Edits().pipeline(policy, store, None),
        arm_named(_ARM),
        n_unsafe=asked.n_unsafe,
        safe_per_unsafe=asked.safe_per_unsafe,
        seed=asked.seed,
    )
    try:
        chosen = parts.data.choice
        # beforehand: training would do it beside its own work, and nobody could tell the two apart
        images = [one for kind in ("unsafe", "natural") for one in chosen.of(kind) if one.content is not None]
        stored, n = store.seconds, store.n_encoded
        store.embed_readable(images)
        head = new_head(head_factory(asked.head), parts, asked.seed)  # some look at images without their labels
        embedding = store.seconds - stored if store.n_encoded > n else 0.0
        guard = Recipe().fit(head, parts, threshold=asked.threshold).guard
        guard.training |= {"experiment": _ARM, "seed": asked.seed, "n_unsafe": len(chosen.of("unsafe")), "n_safe": chosen.n_safe}
        guard.training["sources"] = sorted(sources_of(chosen.train["unsafe"]))
        guard.training_images = training_images(parts.data, parts.unlabelled)
    finally:
        parts.data.close()
    seconds = time.perf_counter() - started - embedding
    return Retraining(guard, seconds, embedding, guard.training["n_unsafe"] + guard.training["n_safe"], list(parts.data.notes))
