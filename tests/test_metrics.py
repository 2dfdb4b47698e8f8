"""Metrics against a second implementation (scikit-learn, SciPy) and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from guardkit.metrics.draws import GroupDraws
from guardkit.metrics.figures import (
    METRICS,
    OF_IMAGES,
    OF_PAIRS,
    Images,
    Pairs,
    always_unsafe_f1,
    classification_metrics,
    pair_metrics,
    weighted,
)
from guardkit.metrics.operating_points import operating_points
from guardkit.metrics.probe import edited_vs_original_auroc


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
    assert found["recall_at_fpr_0.01"] == pytest.approx(tpr[fpr <= 0.01].max())


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_torchmetrics(seed):
    """The second public check; torchmetrics counts in single precision."""
    import torch
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_calibration_error, binary_f1_score

    rng = np.random.default_rng(seed)
    labels = (rng.random(400) < 0.4).astype(int)
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    found = classification_metrics(labels, scores, 0.5)
    target, preds = torch.from_numpy(labels), torch.from_numpy(scores)
    reference = {
        "auroc": binary_auroc(preds, target),
        "average_precision": binary_average_precision(preds, target),
        "ece": binary_calibration_error(preds, target, n_bins=15, norm="l1"),
        "f1": binary_f1_score(preds, target),
    }
    for name, value in reference.items():
        assert found[name] == pytest.approx(float(value), abs=1e-6), name


def test_a_weight_is_as_good_as_that_many_copies():
    """Every figure, of several guards at once, on redraws of groups: the same as of the redrawn images one by one."""
    rng = np.random.default_rng(0)
    n = 40
    labels, groups = np.repeat([1, 0], n // 2), [i % 15 for i in range(n)]
    scores = np.round(np.clip(rng.normal(0.4 + 0.2 * labels, 0.3, (3, n)), 0, 1), 1)  # with ties
    draws, units = GroupDraws(groups, n_resamples=10), np.arange(n)
    images = Images(labels, scores, np.array([0.3, 0.5, 0.9]), draws, units, prevalence=0.02)
    pairs = Pairs(scores[:, :20], scores[:, 20:], images.thresholds, draws, units[:20])
    found = weighted(OF_IMAGES, images) | weighted(OF_PAIRS, pairs)
    counts = draws.weights(units).astype(int).T
    assert (counts[0] == 1).all()
    assert (counts[:, 0] == counts[:, 15]).all()  # a group is drawn together
    for guard, threshold in enumerate(images.thresholds):
        for b, drawn in enumerate(counts):
            chosen, in_pairs = np.repeat(units, drawn), np.repeat(units[:20], drawn[:20])
            expected = classification_metrics(labels[chosen], scores[guard, chosen], threshold)
            expected |= pair_metrics(pairs.unsafe[guard, in_pairs], pairs.safe[guard, in_pairs], threshold)
            for name in set(METRICS) - {"precision_at_prevalence"}:
                assert found[name][guard, b] == pytest.approx(expected[name], abs=1e-12), name


def test_an_abstention_flags_nothing_and_is_not_ranked():
    labels, scores = np.array([1, 1, 0, 0]), np.array([[0.9, np.nan, 0.1, np.nan], [np.nan] * 4])
    images = Images(labels, scores, np.array([0.5, 0.5]), GroupDraws.as_is(4), np.arange(4), prevalence=0.1)
    found = {name: values[:, 0].tolist() for name, values in weighted(OF_IMAGES, images).items()}
    assert found["recall"] == [0.5, 0.0]
    assert found["auroc"][0] == found["average_precision"][0] == found["recall_at_fpr_0.01"][0] == 1
    assert found["ece"][0] == pytest.approx(0.1)
    assert np.isnan([found[name][1] for name in ("auroc", "average_precision", "recall_at_fpr_0.01", "ece", "precision")]).all()


def test_a_new_figure_is_one_entry(monkeypatch):
    from guardkit.metrics.figures import Metric

    accuracy = Metric("accuracy", "accuracy", lambda images: (images.counts[0] + images.counts[3] - images.counts[1]) / len(images.labels))
    monkeypatch.setitem(METRICS, "accuracy", accuracy)
    images = Images(np.array([1, 0, 0]), np.array([[0.9, 0.9, 0.1]]), np.array([0.5]), GroupDraws.as_is(3), np.arange(3))
    assert weighted(["accuracy"], images)["accuracy"] == pytest.approx(2 / 3)


def test_five_rows_by_hand():
    labels, scores = np.array([1, 1, 0, 0, 0]), np.array([0.9, 0.4, 0.6, 0.2, 0.1])
    found = classification_metrics(labels, scores, 0.5)
    assert found["auroc"] == pytest.approx(5 / 6)
    assert found["precision"] == found["recall"] == found["f1"] == 0.5
    assert found["fpr"] == pytest.approx(1 / 3)
    # each score is a bin of its own: gaps .1 .6 .6 .2 .1
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.6 + 0.2 + 0.1) / 5, abs=1e-6)
    assert found["recall_at_fpr_0.01"] == 0.5


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
        (lambda: pair_metrics(np.ones(2), np.ones(3), 0.5), "two score arrays of one length"),
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
    balanced = np.concatenate([np.arange(100), 100 + np.arange(100) * 9])  # the same rates, at another prevalence
    scores = np.zeros((1, 200))
    scores[0, np.r_[:80, 100:105]] = 1
    images = Images(labels[balanced], scores, np.array([0.5]), GroupDraws.as_is(200), np.arange(200), prevalence=0.1)
    (found,) = weighted(["precision_at_prevalence"], images).values()
    assert found[0, 0] == pytest.approx(sk.precision_score(labels, flagged))


def test_all_unsafe_baseline():
    # UnsafeBench, test set: 777 of 2,037 images unsafe gives the published 0.552
    labels = np.repeat([1, 0], [777, 1260])
    assert always_unsafe_f1(labels) == pytest.approx(sk.f1_score(labels, np.ones_like(labels)))
    assert always_unsafe_f1(labels) == pytest.approx(0.552, abs=5e-4)


def test_a_balance_that_is_no_better_than_chance_is_no_operating_point():
    point = operating_points(np.array([1, 1, 0, 0]), np.array([0.1, 0.2, 0.8, 0.9]))["balanced"]
    assert point["threshold"] is None
    assert point["reason"] == "no threshold tells the 2 unsafe validation images from the 2 safe ones better than chance"


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


def test_probe_finds_a_trace_and_only_then():
    rng = np.random.default_rng(0)
    original = rng.normal(size=(80, 16))
    trace = np.zeros(16)
    trace[3] = 3.0
    assert edited_vs_original_auroc(original, original + trace).low > 0.9
    noise = edited_vs_original_auroc(original, original + rng.normal(size=original.shape) * 0.1)
    assert 0.3 < noise.estimate < 0.7
    assert noise.low < 0.5 < noise.high
    few = edited_vs_original_auroc(original[:20], original[:20] + trace / 4)
    many = edited_vs_original_auroc(original, original + trace / 4)
    assert few.high - few.low > many.high - many.low
    assert edited_vs_original_auroc(original[:5], original[:5]) is None
