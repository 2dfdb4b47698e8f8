"""Fitting a map from a head's logits to logits of probabilities, on labelled images that the head was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from guardkit.score_maps import MAX_KNOTS, ScoreMap

N_FOLDS, MIN_IMAGES = 5, 10  # of each class
_OF_PLATT = 0.05  # beside isotonic steps, so that scores on one step keep their order
_SEED = 0


@dataclass(frozen=True)
class Fitted:
    """A map, and how it was chosen.

    Attributes:
        map: of logits.
        log_losses: kind -> mean log loss on held-out folds, at the images' own prevalence; empty where nothing was compared.
        reason: why nothing was fitted; "" where something was.
    """

    map: ScoreMap
    log_losses: Mapping[str, float]
    reason: str = ""


def fit_score_map(logits: np.ndarray, labels: np.ndarray, *, trained_for: float, prevalence: float) -> Fitted:
    """The map that wins by cross-validation, restated at another prevalence.

    Compared are the logits as they are, temperature scaling (Guo et al., 2017, "On calibration of modern neural networks"), Platt's sigmoid
    with his smoothed targets (1999) and isotonic regression (Zadrozny and Elkan, 2002; 5 % of Platt's is mixed in, so that the order of
    images stays). Which is best does not depend on the prevalence; the winner is moved to it by the difference of the log odds (Saerens et
    al., 2002).

    Args:
        logits: (n,) of a head.
        labels: (n,) int, 1 = unsafe (or the category), 0 = not.
        trained_for: prevalence that the head's logits are for, in (0, 1).
        prevalence: to state probabilities for, in (0, 1).
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, int)
    n_positive, n_negative = int(labels.sum()), int((1 - labels).sum())
    least = min(n_positive, n_negative)
    if least < MIN_IMAGES:
        reason = f"scores are not calibrated: that takes {MIN_IMAGES} images of each kind, and there are {n_positive} and {n_negative}"
        return Fitted(ScoreMap.line("none", 1.0, _odds(prevalence) - _odds(trained_for)), {}, reason)
    own = n_positive / len(labels)
    offset = _odds(own) - _odds(trained_for)
    kinds = _kinds(offset)
    losses = {name: _held_out_loss(fit, logits, labels) for name, fit in kinds.items()}
    losses = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    for name in sorted(losses, key=losses.__getitem__):
        made = kinds[name](logits, labels)
        if made is not None:
            return Fitted(made.shifted(_odds(prevalence) - _odds(own)), losses)
    raise AssertionError("the logits as they are can always be had")


_Fit = Callable[[np.ndarray, np.ndarray], ScoreMap | None]


def _kinds(offset: float) -> dict[str, _Fit]:
    """Simplest first; None where one cannot be had."""

    def unchanged(logits: np.ndarray, labels: np.ndarray) -> ScoreMap:
        del logits, labels
        return ScoreMap.line("none", 1.0, offset)

    def temperature(logits: np.ndarray, labels: np.ndarray) -> ScoreMap:
        targets = _smoothed(labels)

        def loss(log_slope: float) -> float:
            return _log_loss(math.exp(log_slope) * logits + offset, targets)

        found = minimize_scalar(loss, bounds=(-5, 5), method="bounded")
        return ScoreMap.line("temperature", math.exp(found.x), offset)

    return {"none": unchanged, "temperature": temperature, "platt": _platt, "isotonic": _isotonic}


def _platt(logits: np.ndarray, labels: np.ndarray) -> ScoreMap | None:
    from sklearn.linear_model import LogisticRegression

    # soft targets, as weights of both labels
    targets = _smoothed(labels)
    rows = np.concatenate([logits, logits])[:, None]
    both = np.concatenate([np.ones(len(logits), int), np.zeros(len(logits), int)])
    found = LogisticRegression(C=np.inf, max_iter=1000).fit(rows, both, sample_weight=np.concatenate([targets, 1 - targets]))
    slope, shift = float(found.coef_[0, 0]), float(found.intercept_[0])
    # a guard that ranks images the wrong way round is not turned around behind its user's back
    return ScoreMap.line("platt", slope, shift) if slope > 1e-3 else None


def _isotonic(logits: np.ndarray, labels: np.ndarray) -> ScoreMap | None:
    from sklearn.isotonic import IsotonicRegression

    base = _platt(logits, labels)
    if base is None:
        return None
    targets = _smoothed(labels)  # no step at 0 or 1
    found = IsotonicRegression(out_of_bounds="clip").fit(logits, targets)
    knots = np.unique(found.X_thresholds_)
    if len(knots) > MAX_KNOTS:
        knots = knots[np.linspace(0, len(knots) - 1, MAX_KNOTS).round().astype(int)]
    # knots too close to each other for a slope between them
    knots = knots[np.r_[True, np.diff(knots) > 1e-6]]
    shares = (1 - _OF_PLATT) * found.predict(knots) + _OF_PLATT * torch.sigmoid(base(torch.from_numpy(knots))).numpy()
    values = np.log(shares) - np.log1p(-shares)
    rising = np.r_[True, np.diff(values) > 0]
    knots, values = knots[rising], values[rising]
    if (np.diff(values) <= 0).any():
        return None
    return ScoreMap("isotonic", tuple(map(float, knots)), tuple(map(float, values)), base.slopes)


def _held_out_loss(fit: _Fit, logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean log loss over folds; infinite where a fold gives no map."""
    from sklearn.model_selection import StratifiedKFold

    total = 0.0
    for train, test in StratifiedKFold(N_FOLDS, shuffle=True, random_state=_SEED).split(logits, labels):
        made = fit(logits[train], labels[train])
        if made is None:
            return math.inf
        total += _log_loss(made(torch.from_numpy(logits[test])).numpy(), labels[test]) * len(test)
    return total / len(labels)


def _log_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    return float((np.logaddexp(0, logits) - targets * logits).mean())


def _smoothed(labels: np.ndarray) -> np.ndarray:
    """Platt's targets: what Laplace's rule expects of each class."""
    n_positive, n_negative = labels.sum(), (1 - labels).sum()
    return np.where(labels == 1, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))


def _odds(share: float) -> float:
    """Log odds."""
    return math.log(share) - math.log1p(-share)
