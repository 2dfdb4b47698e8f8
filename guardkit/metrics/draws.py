"""Redrawn test sets: whole groups at a time, because a pair, or near-duplicates, are no independent images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

_CHUNK_BYTES = 32 << 20


class GroupDraws:
    """The test units as they are, and redraws of them: as many groups as there are, with replacement.

    Args:
        groups: (n,) the group of each unit.
        n_resamples: how many redraws.
        seed: the same seed and groups give the same redraws, so what is measured on them may be compared draw by draw.

    The length is 1 + n_resamples: the first draw has every unit once, and what is measured on it is the estimate itself.
    """

    def __init__(self, groups: Sequence[object], *, n_resamples: int, seed: int = 0) -> None:
        number: dict[object, int] = {}
        self._group_of = np.array([number.setdefault(group, len(number)) for group in groups], int)
        n_groups = len(number)
        rng = np.random.default_rng([seed, 31])
        # small whole numbers: a quarter of the memory of floats
        self._drawn = np.ones((n_groups, 1 + n_resamples), np.uint16)
        for draw in range(1, 1 + n_resamples if n_groups else 0):
            self._drawn[:, draw] = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)

    @classmethod
    def as_is(cls, n: int) -> GroupDraws:
        """n units, each once, and no redraw."""
        return cls([0] * n, n_resamples=0)

    def __len__(self) -> int:
        return self._drawn.shape[1]

    def parts(self, n: int) -> Iterator[GroupDraws]:
        """The same draws, a few at a time, so that n numbers a draw take bounded memory."""
        step = max(1, _CHUNK_BYTES // (8 * max(1, n, len(self._drawn))))
        for start in range(0, len(self), step):
            part = object.__new__(GroupDraws)
            part._group_of, part._drawn = self._group_of, self._drawn[:, start : start + step]
            yield part

    def weights(self, units: np.ndarray) -> np.ndarray:
        """(m,) units -> (m, draws) float64: how often each is drawn."""
        return self._drawn[self._group_of[units]].astype(float)

    def totals(self, values: np.ndarray, units: np.ndarray) -> np.ndarray:
        """Sums of values in every draw.

        Args:
            values: (k, m).
            units: (m,) the unit that each column belongs to.
        Returns:
            (k, draws).
        """
        group_of = self._group_of[units]
        # units of one group are drawn together: their sum is all that counts
        by_group = np.array([np.bincount(group_of, weights=row, minlength=len(self._drawn)) for row in values])
        return by_group @ self._drawn.astype(float)
