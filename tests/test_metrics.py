"""Metrics against a second implementation (scikit-learn, SciPy) and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from guardkit.metrics import (
    always_unsafe_f1,
    by_category,
    classification_metrics,
    edited_vs_original_auroc,
    operating_points,
    pair_metrics,
    precision_at_prevalence,
    recall_at_fpr,
)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random(300) < 0.3).astype(int)
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1).round(2)
    found = classification_metrics(labels, scores, 0.5)
    flagged = scores >= 0.5
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-6)
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-6)
    assert found["f1"] == pytest.approx(sk.f1_score(labels, flagged))
    assert found["precision"] == pytest.approx(sk.precision_score(labels, flagged))
    assert found["recall"] == pytest.approx(sk.recall_score(labels, flagged))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, flagged))
    fpr, tpr, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    for limit in (0.01, 0.05, 0.3):
        assert recall_at_fpr(labels, scores, max_fpr=limit)[0] == pytest.approx(tpr[fpr <= limit].max())


def test_five_rows_by_hand():
    labels, scores = np.array([1, 1, 0, 0, 0]), np.array([0.9, 0.4, 0.6, 0.2, 0.1])
    found = classification_metrics(labels, scores, 0.5)
    assert found["auroc"] == pytest.approx(5 / 6)
    assert found["precision"] == found["recall"] == found["f1"] == 0.5
    assert found["fpr"] == pytest.approx(1 / 3)
    # each score is a bin of its own: gaps .1 .6 .6 .2 .1
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.6 + 0.2 + 0.1) / 5, abs=1e-6)
    assert recall_at_fpr(labels, scores, max_fpr=0.01) == (0.5, 0.9)


def test_undefined_figures_are_none():
    found = classification_metrics(np.zeros(3, int), np.full(3, 0.2), 0.5)
    assert found["auroc"] is None
    assert found["recall"] is None
    assert found["f1"] is None
    assert classification_metrics(np.array([], int), np.array([]), 0.5)["n"] == 0
    assert pair_metrics(np.array([]), np.array([]), 0.5) == {"pair_accuracy": None, "ranking_accuracy": None, "mean_margin": None, "n": 0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification_metrics(np.ones(2), np.array([0.1, 1.4]), 0.5), r"scores must lie in \[0, 1\].*sigmoid"),
        (lambda: classification_metrics(np.ones(2), np.ones(3), 0.5), "arrays of one length"),
        (lambda: recall_at_fpr(np.ones(2), np.ones(2), max_fpr=0.1), "needs both classes, got 2 unsafe and 0 safe"),
        (lambda: recall_at_fpr(np.array([0, 1]), np.array([0.0, 1.0]), max_fpr=0), r"max_fpr must lie in \(0, 1\]"),
        (lambda: pair_metrics(np.ones(2), np.ones(3), 0.5), "two score arrays of one length"),
        (lambda: precision_at_prevalence(0.5, 0.5, 1.5), r"prevalence must lie in \[0, 1\]"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pairs_by_hand():
    found = pair_metrics(np.array([0.9, 0.6, 0.3, 0.7]), np.array([0.1, 0.55, 0.4, 0.2]), 0.5)
    assert found["pair_accuracy"] == 0.5
    assert found["ranking_accuracy"] == 0.75
    assert found["mean_margin"] == pytest.approx((0.8 + 0.05 - 0.1 + 0.5) / 4)


def test_precision_at_prevalence_is_bayes_rule():
    labels = np.repeat([1, 0], [100, 900])
    flagged = np.concatenate([np.arange(100) < 80, np.arange(900) < 45])
    assert precision_at_prevalence(0.8, 0.05, 0.1) == pytest.approx(sk.precision_score(labels, flagged))
    assert precision_at_prevalence(0.0, 0.0, 0.1) is None


def test_all_unsafe_baseline():
    # UnsafeBench, test set: 777 of 2,037 images unsafe gives the published 0.552
    labels = np.repeat([1, 0], [777, 1260])
    assert always_unsafe_f1(labels) == pytest.approx(sk.f1_score(labels, np.ones_like(labels)))
    assert always_unsafe_f1(labels) == pytest.approx(0.552, abs=5e-4)


def test_operating_points_keep_their_promise_and_say_how_sure_they_are():
    from scipy.stats import binomtest

    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [50, 200])
    scores = np.clip(rng.normal(0.3 + 0.3 * labels, 0.15), 0, 1)
    points = operating_points(labels, scores)
    assert points["fpr_0.01"]["fpr"] <= 0.01
    assert points["fpr_0.05"]["fpr"] <= 0.05
    assert points["fpr_0.01"]["recall"] <= points["fpr_0.05"]["recall"]
    n_flagged = round(points["fpr_0.05"]["fpr"] * 200)
    assert points["fpr_0.05"]["fpr_ci_high"] == pytest.approx(binomtest(n_flagged, 200).proportion_ci(0.95, "exact").high)
    assert operating_points(np.ones(3, int), np.ones(3)) == {}


def test_by_category_sets_each_against_all_safe_images():
    labels, scores = np.array([1, 1, 0, 0]), np.array([0.9, 0.1, 0.5, 0.2])
    found = by_category(labels, scores, ["a", "b", None, "a"], 0.5)
    assert found["a"]["auroc"] == 1.0
    assert found["b"]["auroc"] == 0.0
    assert found["a"]["n"] == 3


def test_probe_finds_a_trace_and_only_then():
    rng = np.random.default_rng(0)
    original = rng.normal(size=(80, 16))
    trace = np.zeros(16)
    trace[3] = 3.0
    assert edited_vs_original_auroc(original, original + trace) > 0.9
    noise = edited_vs_original_auroc(original, original + rng.normal(size=original.shape) * 0.1)
    assert 0.3 < noise < 0.7
    assert edited_vs_original_auroc(original[:5], original[:5]) is None
