"""Thresholds with a promise that holds whatever the scores are distributed like, for images drawn like those they were chosen on.

A threshold is chosen by its rank among the scores of n images: the rule of the Neyman-Pearson umbrella algorithm (Tong, Feng and Li,
2018, "Neyman-Pearson classification algorithms and NP receiver operating characteristics", proposition 1). How often the promise is broken,
over all draws of the n images, is then known exactly, and at most 1 - confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from guardkit.metrics.intervals import clopper_pearson

Kind = Literal["max_fpr", "max_fpr_of_others", "min_recall", "queue_per_day"]


@dataclass(frozen=True)
class Promise:
    """What a threshold promises, or why none can.

    Attributes:
        kind: "max_fpr" (at most this share of safe images is flagged; "max_fpr_of_others": of unsafe ones of other categories), "min_recall" (at least this share of unsafe images is), or
            "queue_per_day" (at most so many images a day lie between review and block).
        target: that share, or number.
        confidence: that it holds, in (0, 1).
        n: images that it was chosen on: safe ones, unsafe ones, or both.
        threshold: flag when score >= threshold; None: there is none.
        reason: why there is none; "" where there is one.
    """

    kind: Kind
    target: float
    confidence: float
    n: int
    threshold: float | None
    reason: str = ""


def images_needed(share: float, confidence: float) -> int:
    """The fewest safe images with which a false-positive rate of at most `share` can be promised; unsafe ones, a recall of 1 - share."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-share))


def lowest_share(n: int, confidence: float) -> float:
    """The lowest false-positive rate that n safe images can promise; 1 minus the highest recall that n unsafe ones can. 1 without images."""
    return 1 - (1 - confidence) ** (1 / n) if n else 1.0


def promise_fpr(safe: np.ndarray, max_fpr: float, confidence: float) -> Promise:
    """The lowest threshold that flags at most a share of safe images.

    Args:
        safe: (n,) scores in [0, 1] of safe images, each drawn by itself.
        max_fpr: the share, in (0, 1).
        confidence: in (0, 1).
    """
    n, rank = len(safe), _rank(len(safe), max_fpr, confidence)
    if rank is None:
        reason = (
            f"a false-positive rate of at most {_percent(max_fpr)} with {_percent(confidence)} confidence needs {images_needed(max_fpr, confidence)} safe "
            f"images; with {n} the lowest that can be promised is {_percent(lowest_share(n, confidence), math.ceil)}"
        )
        return Promise("max_fpr", max_fpr, confidence, n, None, reason)
    at = float(np.sort(np.asarray(safe, np.float64))[rank - 1])
    if at >= 1:
        reason = f"{int((np.asarray(safe) >= 1).sum())} of {n} safe images have the highest score there is, 1: no threshold leaves them out"
        return Promise("max_fpr", max_fpr, confidence, n, None, reason)
    # the image at that rank is not flagged itself
    return Promise("max_fpr", max_fpr, confidence, n, math.nextafter(at, 2.0))


def promise_recall(unsafe: np.ndarray, min_recall: float, confidence: float) -> Promise:
    """The highest threshold that flags at least a share of unsafe images.

    Args:
        unsafe: (n,) scores in [0, 1] of unsafe images, each drawn by itself.
        min_recall: the share, in (0, 1).
        confidence: in (0, 1).
    """
    n, rank = len(unsafe), _rank(len(unsafe), 1 - min_recall, confidence)
    if rank is None:
        reason = (
            f"a recall of at least {_percent(min_recall)} with {_percent(confidence)} confidence needs {images_needed(1 - min_recall, confidence)} unsafe "
            f"images; with {n} the highest that can be promised is {_percent(1 - lowest_share(n, confidence), math.floor)}"
        )
        return Promise("min_recall", min_recall, confidence, n, None, reason)
    return Promise("min_recall", min_recall, confidence, n, float(np.sort(-np.asarray(unsafe, np.float64))[rank - 1] * -1))


def promise_queue(
    safe: np.ndarray, unsafe: np.ndarray, block: float, *, per_day: float, volume: float, prevalence: float, confidence: float
) -> Promise:
    """The lowest review threshold below a block threshold, with at most so many images a day between the two.

    Of the day's images a share is unsafe; how many of each kind lie between the thresholds is bounded by itself, from above, with half of
    the doubt each (Clopper and Pearson), and the queue is shared out between the two beforehand: where all unsafe images
    would fit into half of it, they get as much, and else half. A review threshold that goes down adds images to the queue only, so the lowest
    one whose bound is kept keeps the promise (Bates et al., 2021, "Distribution-free, risk-controlling prediction sets", theorem 1).

    Args:
        safe, unsafe: scores in [0, 1], each image drawn by itself.
        block: blocked from there on; chosen on safe images alone, or beforehand.
        per_day: images that people can look at.
        volume: images in a day.
        prevalence: share of unsafe ones among them, in (0, 1).
        confidence: in (0, 1).
    """
    share = per_day / volume
    n = len(safe) + len(unsafe)
    fits = prevalence <= share / 2
    doubt = (1 - confidence) / (1 if fits else 2)
    for_safe, for_unsafe = (share - prevalence, math.inf) if fits else (share / 2, share / 2)
    limits = [
        _lowest(np.asarray(scores, np.float64), block, room / weight, doubt)
        for scores, room, weight in ((safe, for_safe, 1 - prevalence), (unsafe, for_unsafe, prevalence))
    ]
    if max(limits) >= block:
        kind, weight, room, known = (
            ("safe", 1 - prevalence, for_safe, len(safe)) if limits[0] >= block else ("unsafe", prevalence, for_unsafe, len(unsafe))
        )
        least = volume * weight * clopper_pearson(0, known, 1 - 2 * doubt)[1] if known else volume * weight
        reason = (
            f"{per_day:g} images a day of {volume:g}, {_percent(prevalence)} of them unsafe, leave {volume * room:.0f} for {kind} ones; with {known} {kind} images "
            f"to choose on, no fewer than {math.ceil(least)} can be promised; give more images, or a longer queue"
        )
        return Promise("queue_per_day", per_day, confidence, n, None, reason)
    return Promise("queue_per_day", per_day, confidence, n, max(limits))


def _lowest(scores: np.ndarray, block: float, room: float, doubt: float) -> float:
    """The lowest threshold below `block` with at most a share of such images between the two; `block` where there is none."""
    if room >= 1:
        return 0.0
    below = np.sort(scores[scores < block])[::-1]
    # how many may lie between, by count: the bound grows with it
    low, high = -1, len(below)
    while low < high:
        middle = (low + high + 1) // 2
        if len(scores) and clopper_pearson(middle, len(scores), 1 - 2 * doubt)[1] <= room:
            low = middle
        else:
            high = middle - 1
    if low < 0:
        return block
    return 0.0 if low == len(below) else math.nextafter(float(below[low]), 2.0)


def _rank(n: int, share: float, confidence: float) -> int | None:
    """The smallest k such that at most `share` lies above the k-th of n sorted scores, with `confidence`; None: not even the n-th will do."""
    from scipy.stats import binom

    if not n:
        return None
    broken = binom.sf(np.arange(n), n, 1 - share)  # of k = 1 ... n, and decreasing
    fine = np.flatnonzero(broken <= 1 - confidence)
    return int(fine[0]) + 1 if len(fine) else None


def _percent(share: float, rounded: Callable[[float], int] = round) -> str:
    """With at most three digits; what is the limit of a promise is rounded to the side where it holds."""
    if share in (0.0, 1.0):
        return f"{100 * share:g} %"
    scale = 10.0 ** (2 - math.floor(math.log10(100 * share)))
    return f"{rounded(100 * share * scale) / scale:.10g} %"
