"""A source: where labelled images come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guardkit import InputError, Loaded, Policy, Record

COLOURS = {1: (210, 40, 40), 0: (40, 90, 210)}  # of unsafe and of safe dots
CATEGORY = "red_dots"


@dataclass(frozen=True)
class Dot:
    """A picture that is drawn when somebody asks for its pixels.

    Attributes:
        label: 1 = a red dot, 0 = a blue one.
        seed: of everything else.
    """

    label: int
    seed: int

    @property
    def key(self) -> str:
        """What its pixels depend on: embeddings and edits are stored under it."""
        return f"dot-1:{self.label}:{self.seed}"

    def load(self) -> np.ndarray:
        """(64, 64, 3) uint8 RGB."""
        rng = np.random.default_rng([self.seed, self.label])
        image = np.repeat(rng.integers(90, 166, (64, 64, 1)), 3, axis=2)
        x, y, radius = *rng.integers(16, 48, 2), rng.integers(6, 14)
        rows, columns = np.mgrid[:64, :64]
        image[(columns - x) ** 2 + (rows - y) ** 2 <= radius**2] = COLOURS[self.label]
        return image.astype(np.uint8)


class DotsSource:
    """Pictures of one dot.

    Args:
        policy: of the run; guardkit gives it to every source.
        n_train: pictures of each label to train on.
        n_test: pictures of each label to test on.
    """

    name = "dots"

    def __init__(self, policy: Policy, *, n_train: int = 200, n_test: int = 50) -> None:
        for setting, value in (("n_train", n_train), ("n_test", n_test)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"source.{setting} must be a whole number of at least 1, got {value!r}")
        policy.check_category(CATEGORY, "source=dots")
        self.n_train, self.n_test = n_train, n_test
        self.asked = {"source": self.name, "n_train": n_train, "n_test": n_test}

    def load(self) -> Loaded:
        """Lists the pictures. None is drawn yet."""
        train, test = (
            [self._record(name, Dot(label, i)) for label in (1, 0) for i in range(first, first + n)]
            for name, first, n in (("train", 0, self.n_train), ("test", self.n_train, self.n_test))
        )
        return Loaded(train=train, test=test, rejected=[], given=len(train) + len(test), is_drawn=True)

    def _record(self, name: str, dot: Dot) -> Record:
        id = f"{name}_{dot.label}_{dot.seed}"
        category = CATEGORY if dot.label else None
        return Record(id=id, label=dot.label, category=category, source=self.name, group=id, content=dot)
