"""What training, sweeping and making pairs have in common: a policy, an encoder with its store, an editor with its pipeline, data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.data.arms import Arm
from guardkit.data.datamodule import GuardDataModule
from guardkit.data.sources.base import Source, check_source
from guardkit.data.unlabelled import Unlabelled
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.guard_parts import check_encoder, check_head
from guardkit.heads import AnchoredHead, Head, LinearHead, MLPHead, PromptHead, automatic
from guardkit.policy import Policy
from guardkit.schema import InputError, shortened

HeadFactory = Callable[..., Head]
"""Called with `encoder` and `policy`, makes a new head for them."""

HEADS: dict[str, HeadFactory] = {
    "auto": automatic,
    "linear": LinearHead.build,
    "linear_whitened": LinearHead.whitened,
    "linear_texts": LinearHead.from_texts,
    "anchored": AnchoredHead.build,
    "mlp": MLPHead.build,
    "prompt": PromptHead.build,
}


@dataclass(frozen=True)
class Parts:
    """What is built before anything is trained, and shared by everything that trains many times."""

    policy: Policy
    encoder: Encoder
    store: EmbeddingStore
    pipeline: CounterfactualPipeline
    data: GuardDataModule
    unlabelled: Unlabelled

    def rebuilt(self, arm: Arm, **data: Any) -> Parts:
        """The same with another arm, label budget or seed: `data` are further settings of `GuardDataModule`."""
        return replace(self, data=data_module(self.data.source, self.policy, self.store, self.pipeline, arm, **data))


def make_parts(source: Source, policy: Policy, store: EmbeddingStore, pipeline: CounterfactualPipeline, arm: Arm, **data: Any) -> Parts:
    """All parts of a training. `data` are further settings of `GuardDataModule`."""
    module = data_module(source, policy, store, pipeline, arm, **data)
    return Parts(policy, store.encoder, store, pipeline, module, Unlabelled(module))


def data_module(
    source: Source, policy: Policy, store: EmbeddingStore, pipeline: CounterfactualPipeline, arm: Arm, **settings: Any
) -> GuardDataModule:
    """The data module of an arm. Views of each image are the arm's where it says how many."""
    check_source(source)
    if arm.variants_per_image is not None:
        settings["variants_per_image"] = arm.variants_per_image
    return GuardDataModule(
        source, policy, store, pipeline, negatives=arm.negatives, positives=arm.positives, transform=arm.transform, **settings
    )


def head_factory(head: str | type[Head] | HeadFactory) -> HeadFactory:
    """What makes heads: the name of one of guardkit's, a class with a class method `build`, or a function.

    Raises:
        InputError: an unknown name, or a class that is no head.
    """
    if isinstance(head, str):
        if head not in HEADS:
            raise InputError(
                f"there is no head {head!r}; there are {', '.join(HEADS)}, or give a function of encoder and policy that makes one"
            )
        return HEADS[head]
    if not callable(head):
        raise InputError(f"head must be a name, a class, or a function of encoder and policy, got {shortened(repr(head))}")
    kind = getattr(head, "func", head)  # within a partial, as a configuration makes them
    if isinstance(kind, type) and not issubclass(kind, Head):
        raise InputError(
            f"head must be a subclass of guardkit.heads.Head, or a function that makes one, got {kind.__module__}.{kind.__name__}"
        )
    build = getattr(head, "build", None)
    return build if isinstance(head, type) and build is not None else head


def new_head(make_head: HeadFactory, parts: Parts, seed: int) -> Head:
    """A new head; its first weights follow from the seed."""
    torch.manual_seed(seed)
    head = make_head(encoder=parts.encoder, policy=parts.policy)
    head.prepare(parts.unlabelled)
    return head


def check_parts(encoder: Encoder, pipeline: CounterfactualPipeline | None, policy: Policy, heads: Iterable[HeadFactory] = ()) -> None:
    """Loads the encoder, and builds what editor, verifier and heads need of it and of their weights.

    Heads, and an encoder of another package, are also built again as a saved guard would be.

    Args:
        encoder: of the run.
        pipeline: with editor and verifier; None: nothing is edited.
        policy: whose texts are encoded.
        heads: that are going to be trained.
    Raises:
        InputError: weights that cannot be found or loaded, an encoder that reads no texts where they are needed, settings out
            of range, texts that are the same to the encoder, or a head or an encoder that could not be loaded again.
    """
    _ = encoder.dim
    if pipeline is not None:
        _ = pipeline.editor.config, pipeline.verifier.config
        prepare = getattr(pipeline.verifier, "prepare", None)
        if prepare is not None:
            prepare()
    tried = list(heads)
    if tried:
        check_encoder(encoder)
    for make_head in tried:
        # a head to try: the run's own starts from its own seed
        with torch.random.fork_rng(devices=[]):
            check_head(make_head(encoder=encoder, policy=policy), encoder, len(policy.categories))
