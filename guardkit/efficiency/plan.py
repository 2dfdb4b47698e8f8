"""What a sweep compares, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guardkit.data.datamodule import TestSet
from guardkit.efficiency.cells import Cell
from guardkit.efficiency.curves import SWEPT, Yardstick
from guardkit.fitting.module import choose_threshold
from guardkit.schema import InputError


@dataclass(frozen=True)
class Plan:
    """What is compared, and how it is measured.

    Attributes:
        arms, heads, sizes, seeds: the axes of the sweep.
        baseline: the arm that others are compared with.
        metric: one of `guardkit.efficiency.curves.SWEPT`.
        target_sizes: targets are the baseline's scores at these sizes.
        target_scores: and these.
        table_size: size of the tables by category.
        threshold: a number in [0, 1], or the name of an operating point of each cell's validation images.
        n_resamples, draw_seed: of the redraws behind the intervals.
    """

    arms: tuple[str, ...]
    heads: tuple[str, ...]
    baseline: str
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    metric: str
    target_sizes: tuple[int, ...]
    target_scores: tuple[float, ...]
    table_size: int
    threshold: float | str
    n_resamples: int
    draw_seed: int

    def check(self, test: TestSet) -> None:
        """Raises InputError where the metric is undefined on the test set, or the threshold is no number in [0, 1]."""
        if not isinstance(self.threshold, str):
            choose_threshold(self.threshold, {})
        reason = Yardstick(self.metric, test).reason_against()
        if reason:
            fits = [name for name in SWEPT if Yardstick(name, test).reason_against() is None]
            instead = f"choose sweep.metric from {', '.join(fits)}" if fits else "give a source with test images of both labels"
            raise InputError(f"sweep.metric={self.metric} is undefined: {reason} (pairs made by {test.pairs_made_by}); {instead}")

    def blocks(self, head: str) -> list[list[Cell]]:
        """The cells of a head: those of one arm and size together, sizes rising."""
        return [[Cell(arm, head, size, seed) for seed in self.seeds] for size in self.sizes for arm in self.arms]

    def curve(self, arm: str, head: str) -> str:
        """The name of a curve."""
        return arm if len(self.heads) == 1 else f"{arm}/{head}"

    def curves(self, head: str) -> list[str]:
        """The names of all curves of a head, in the order of the arms."""
        return [self.curve(arm, head) for arm in self.arms]

    def left_out(self, failed: Mapping[Cell, str]) -> list[dict[str, Any]]:
        """Cells without a result: arm, size, seeds and reason of those that have them in common."""
        rows: dict[tuple[str, int, str], list[int]] = {}
        for cell, reason in failed.items():
            rows.setdefault((self.curve(cell.arm, cell.head), cell.n_unsafe, reason), []).append(cell.seed)
        return [{"arm": arm, "size": size, "seeds": seeds, "reason": reason} for (arm, size, reason), seeds in rows.items()]


def in_sentences(rows: Sequence[Mapping[str, Any]], arms: Sequence[str], sizes: Sequence[int], n_seeds: int) -> list[str]:
    """What was left out, one sentence a reason where arms share their sizes.

    Args:
        rows: see `Plan.left_out`.
        arms: names of all curves.
        sizes: all of them, rising.
        n_seeds: of the sweep.
    """
    found: dict[str, dict[str, dict[int, int]]] = {}
    for row in rows:
        found.setdefault(row["reason"], {}).setdefault(row["arm"], {})[row["size"]] = len(row["seeds"])
    sentences = []
    for reason, by_arm in found.items():
        alike: dict[tuple[tuple[int, int], ...], list[str]] = {}
        for arm, counts in by_arm.items():
            alike.setdefault(tuple(sorted(counts.items())), []).append(arm)
        for counted, mine in alike.items():
            which = [size for size, _ in counted]
            first, last = sizes.index(which[0]), sizes.index(which[-1])
            if len(which) == 1:
                what = f"size {which[0]} is"
            elif len(which) == last - first + 1:
                what = f"sizes {which[0]} to {which[-1]} are"
            else:
                what = f"sizes {', '.join(map(str, which))} are"
            partly = "" if all(n == n_seeds for _, n in counted) else " for some seeds"
            who = "every arm" if len(mine) == len(arms) else ", ".join(mine)
            sentences.append(f"{what} left out for {who}{partly}: {reason}")
    return sentences
