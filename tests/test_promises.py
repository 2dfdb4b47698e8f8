"""Thresholds that keep their promise, whatever the scores are distributed like, and refusals where nothing can be promised."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta

from guardkit.metrics.calibrators import fit_score_map
from guardkit.metrics.promises import images_needed, lowest_share, promise_fpr, promise_queue, promise_recall

SAFE, UNSAFE = beta(1, 6), beta(3, 2)


def broken(n, repeats, promise, truth):
    """How often a promise that was chosen on n images is not kept, by the distribution itself."""
    rng = np.random.default_rng(n)
    return np.mean([not truth(promise(rng)) for _ in range(repeats)])


@pytest.mark.parametrize(("n", "max_fpr"), [(60, 0.05), (100, 0.05), (230, 0.01), (1000, 0.01)])
def test_a_false_positive_rate_is_exceeded_in_at_most_the_stated_share_of_calibrations(n, max_fpr):
    def chosen(rng):
        return promise_fpr(SAFE.rvs(n, random_state=rng), max_fpr, 0.9).threshold

    share = broken(n, 1500, chosen, lambda threshold: SAFE.sf(threshold) <= max_fpr)
    assert 0.01 < share <= 0.1 + 3 * (0.1 * 0.9 / 1500) ** 0.5  # and not in vain: it is close to what was allowed


@pytest.mark.parametrize(("n", "min_recall"), [(45, 0.95), (100, 0.9)])
def test_a_recall_is_missed_in_at_most_the_stated_share_of_calibrations(n, min_recall):
    def chosen(rng):
        return promise_recall(UNSAFE.rvs(n, random_state=rng), min_recall, 0.9).threshold

    share = broken(n, 1500, chosen, lambda threshold: UNSAFE.sf(threshold) >= min_recall)
    assert 0.01 < share <= 0.1 + 3 * (0.1 * 0.9 / 1500) ** 0.5


@pytest.mark.parametrize(("prevalence", "per_day"), [(0.002, 900), (0.05, 3000)])
def test_a_queue_is_too_long_in_at_most_the_stated_share_of_calibrations(prevalence, per_day):
    volume, n = 10_000, 400

    def chosen(rng):
        safe, unsafe = SAFE.rvs(n, random_state=rng), UNSAFE.rvs(n, random_state=rng)
        block = promise_fpr(safe, 0.05, 0.9).threshold
        found = promise_queue(safe, unsafe, block, per_day=per_day, volume=volume, prevalence=prevalence, confidence=0.9)
        assert found.threshold < block
        return found.threshold, block

    def kept(thresholds):
        between = [one.cdf(thresholds[1]) - one.cdf(thresholds[0]) for one in (SAFE, UNSAFE)]
        return volume * ((1 - prevalence) * between[0] + prevalence * between[1]) <= per_day

    assert broken(n, 300, chosen, kept) <= 0.1 + 3 * (0.1 * 0.9 / 300) ** 0.5


@pytest.mark.parametrize(
    ("share", "confidence", "n"), [(0.1, 0.9, 22), (0.05, 0.9, 45), (0.05, 0.95, 59), (0.01, 0.9, 230), (0.005, 0.95, 598)]
)
def test_with_one_image_less_than_needed_nothing_is_promised(share, confidence, n):
    assert images_needed(share, confidence) == n
    scores = np.random.default_rng(0).uniform(size=n)
    assert promise_fpr(scores, share, confidence).threshold == np.nextafter(scores.max(), 2)
    assert promise_fpr(scores[1:], share, confidence).threshold is None
    assert promise_recall(scores, 1 - share, confidence).threshold == scores.min()
    assert promise_recall(scores[1:], 1 - share, confidence).threshold is None
    assert lowest_share(n, confidence) <= share < lowest_share(n - 1, confidence)


def test_a_refusal_says_what_would_do_and_what_can_be_had():
    found = promise_fpr(np.linspace(0, 0.9, 60), 0.01, 0.9)
    assert found.reason == (
        "a false-positive rate of at most 1 % with 90 % confidence needs 230 safe images; with 60 the lowest that can be promised is 3.77 %"
    )
    assert promise_recall(np.array([]), 0.9, 0.9).reason.startswith(
        "a recall of at least 90 % with 90 % confidence needs 22 unsafe images; with 0"
    )
    assert "100 of 300 safe images have the highest score" in promise_fpr(np.r_[np.zeros(200), np.ones(100)], 0.01, 0.9).reason
    # a queue that not even these images can promise
    found = promise_queue(np.linspace(0, 1, 50), np.linspace(0, 1, 50), 0.9, per_day=1, volume=1e5, prevalence=0.01, confidence=0.9)
    assert found.threshold is None
    assert "give more images, or a longer queue" in found.reason


def test_equal_scores_are_on_one_side():
    """Many images with one score: a threshold at it would flag them all."""
    safe = np.r_[np.full(500, 0.2), np.full(500, 0.4)]
    assert promise_fpr(safe, 0.05, 0.9).threshold > 0.4
    assert promise_recall(np.full(100, 0.7), 0.9, 0.9).threshold == 0.7


@pytest.mark.parametrize("n", [60, 100, 400])
def test_the_rule_is_as_good_as_mapies(n):
    """MAPIE tests thresholds one after the other, from the strictest on: the same promise, on a grid, by a bound that is a little more careful."""
    from mapie.risk_control import BinaryClassificationController

    scores, labels = np.random.default_rng(n).beta(1, 6, n), np.zeros(n, int)
    grid = np.linspace(0, 1, 2001)
    both = np.r_[scores, 0.99]
    controller = BinaryClassificationController(
        lambda rows: np.stack([1 - rows[:, 0], rows[:, 0]], axis=1),
        risk="fpr",
        target_level=0.05,
        confidence_level=0.9,
        fwer_method="fixed_sequence",
        list_predict_params=grid[::-1],
    )
    controller.calibrate(both[:, None], np.r_[labels, 1])
    theirs = min(np.ravel(controller.valid_predict_params))
    ours = promise_fpr(scores, 0.05, 0.9).threshold
    assert 0 <= (scores >= ours).sum() - (scores >= theirs).sum() <= 2


@pytest.mark.parametrize(
    ("slope", "shift", "kind"), [(3.0, 0.0, {"temperature", "platt"}), (0.5, 2.0, {"platt"}), (1.0, 0.0, {"none", "temperature", "platt"})]
)
def test_what_was_done_to_logits_is_found_and_taken_back(slope, shift, kind):
    """Logits of true probabilities at prevalence 0.5, changed by a line: the winner undoes it, and restates it at the prevalence asked for."""
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, 4000)
    labels = (rng.uniform(size=4000) < 1 / (1 + np.exp(-true))).astype(int)
    found = fit_score_map((true - shift) / slope, labels, trained_for=0.5, prevalence=0.02)
    assert found.map.kind in kind | {"isotonic"}
    import torch

    said = found.map(torch.from_numpy((true - shift) / slope)).numpy()
    expected = true + np.log(0.02 / 0.98) - np.log(labels.mean() / (1 - labels.mean()))
    inner = np.abs(true) < 3
    assert np.abs(said - expected)[inner].mean() < 0.15
    assert min(found.log_losses, key=found.log_losses.get) == found.map.kind


def test_steps_are_found_by_isotonic_regression_and_keep_the_order():
    rng = np.random.default_rng(1)
    logits = rng.uniform(-4, 4, 3000)
    labels = (rng.uniform(size=3000) < np.select([logits < -1, logits < 1], [0.02, 0.5], 0.98)).astype(int)
    found = fit_score_map(logits, labels, trained_for=0.5, prevalence=0.5)
    assert found.map.kind == "isotonic"
    import torch

    ordered = found.map(torch.from_numpy(np.sort(logits))).numpy()
    assert (np.diff(ordered) > 0).all()


def test_too_few_images_calibrate_nothing_and_a_guard_that_is_wrong_is_not_turned_round():
    few = fit_score_map(np.arange(30.0), np.r_[np.zeros(21, int), np.ones(9, int)], trained_for=0.5, prevalence=0.5)
    assert (few.map.kind, few.map.slopes) == ("none", (1.0, 1.0))
    assert "takes 10 images of each kind, and there are 9 and 21" in few.reason
    logits = np.linspace(-3, 3, 200)
    wrong = fit_score_map(logits, (logits < 0).astype(int), trained_for=0.5, prevalence=0.5)
    assert min(wrong.map.slopes) > 0
