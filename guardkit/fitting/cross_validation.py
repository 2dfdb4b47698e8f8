"""The same training several times, each time without another part of the labelled images, which that guard then scores.

Where few images are labelled, the test images of a single split are a handful. Scores out of fold are of every image, by a guard that
did not see it, nor a near-duplicate of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from guardkit.classifier import GuardClassifier
from guardkit.data.arms import Arm
from guardkit.data.sources.base import Loaded
from guardkit.data.splits import folds
from guardkit.fitting.module import Fitted, GuardModule, quiet
from guardkit.fitting.parts import HeadFactory, Parts, data_module, new_head
from guardkit.fitting.recipe import TRAINER, Recipe
from guardkit.heads import Head
from guardkit.schema import InputError, Record

N_FOLDS = 5
MAX_IMAGES = 200  # with as many labelled images a single split says enough, and five more trainings would take their time


@dataclass(frozen=True)
class OutOfFold:
    """Labelled images, scored by guards that did not see them.

    Attributes:
        records: all that the source has, training, validation and test images alike.
        scores: (n, 1 + k) probabilities.
    """

    records: list[Record]
    scores: np.ndarray


def cross_validate(make_head: HeadFactory, parts: Parts, recipe: Recipe, arm: Arm, fitted: Fitted, seed: int, **data: Any) -> OutOfFold:
    """Trains a head for each of `N_FOLDS` folds of whole groups, on the other folds.

    Each is trained as `fitted` was, and for as many epochs as that one was kept after, so that nothing has to be validated. It
    is stepped by hand: settings of Lightning's trainer other than the number of epochs do not apply.

    Args:
        make_head: makes new heads.
        parts: of the training; what was edited and embedded for it is found again.
        recipe: of it.
        arm: of it.
        fitted: what came of it.
        seed: of it.
        data: further settings of its data module.
    Raises:
        InputError: too many images, or a fold leaves too few to train on.
    """
    n = len(parts.data.load()) + len(parts.data.test)
    if n >= MAX_IMAGES:
        raise InputError(f"done where a source has fewer than {MAX_IMAGES} labelled images, and source={parts.data.source.name} has {n}")
    records = [*parts.data.load(), *parts.data.test]
    fold = folds(records, N_FOLDS, data["split_seed"])
    scores = np.zeros((len(records), 1 + len(parts.policy.categories)))
    n_epochs = fitted.best_epoch + 1 if fitted.best_epoch >= 0 else {**TRAINER, **recipe.trainer}["max_epochs"]
    try:
        for number in range(N_FOLDS):
            left_out = np.flatnonzero(fold == number)
            if not len(left_out):
                continue
            source = _Without(parts.data.loaded, parts.data.source.name, records, set(left_out.tolist()))
            # what a source is short of was said of the training itself
            with quiet("guardkit.data"), torch.random.fork_rng(devices=[]):
                mine = replace(parts, data=data_module(source, parts.policy, parts.store, parts.pipeline, arm, seed=seed, **data))
                head = _trained(make_head, mine, recipe, n_epochs, seed)
            guard = GuardClassifier(head, parts.encoder, parts.policy, threshold=fitted.guard.threshold)
            scores[left_out] = guard.probabilities(mine.data.views.embed(mine.data.test))
    finally:
        parts.pipeline.supply(parts.data.load())  # each fold gave the editor its own photographs
    if not np.isfinite(scores).all():
        raise InputError("the training of a fold diverged")
    return OutOfFold(records, scores)


class _Without:
    """A source whose test images are some of another one's."""

    def __init__(self, loaded: Loaded, name: str, records: list[Record], left_out: set[int]) -> None:
        self.name = name
        self.asked: dict[str, Any] = {}
        train, test = ([one for row, one in enumerate(records) if (row in left_out) == is_out] for is_out in (False, True))
        self._loaded = replace(loaded, train=train, test=test, test_pairs=None, rejected=[])

    def load(self) -> Loaded:
        """See `Source`."""
        return self._loaded


def _trained(make_head: HeadFactory, parts: Parts, recipe: Recipe, n_epochs: int, seed: int) -> Head:
    head = new_head(make_head, parts, seed)
    module = GuardModule(head, recipe.optimizer, recipe.objective)
    optimizer = module.configure_optimizers()
    for epoch in range(1, n_epochs + 1):
        for batch in parts.data.batches(epoch):
            optimizer.step(_closure(module, optimizer, batch))
    parts.data.check_both_sides()
    return head.eval()


def _closure(module: GuardModule, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any]) -> Any:
    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = module.penalised_loss(dict(batch))
        value.backward()
        return value

    return loss
