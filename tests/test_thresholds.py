"""Bands, scopes and what a decision says: below review allow, from block on block, people between."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import picture

from guardkit import Band, GuardClassifier, LinearHead, Thresholds
from guardkit.schema import InputError
from guardkit.score_maps import Calibration, ScoreMap


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    torch.manual_seed(0)
    head = LinearHead.build(scenes_encoder, scenes_policy)
    torch.nn.init.normal_(head.linear.weight, std=0.3)
    return GuardClassifier(head, scenes_encoder, scenes_policy)


@pytest.fixture(scope="module")
def vectors(guard):
    rows = np.random.default_rng(0).normal(size=(200, guard.encoder.dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("score", "action"), [(0.0, "allow"), (0.29999, "allow"), (0.3, "review"), (0.79, "review"), (0.8, "block"), (1.0, "block")]
)
def test_a_band_has_three_actions_and_its_ends_belong_above(score, action):
    decision = Thresholds(Band(0.3, 0.8), {"a": Band.at(0.5)}).decide(score, {"a": 0.1})
    assert decision.action == action
    assert decision.flagged == (action != "allow") == bool(decision.label)
    assert (decision.threshold, decision.threshold_block) == (0.3, 0.8)
    said = json.loads(json.dumps(decision.to_dict()))
    assert (said["action"], said["threshold_review"], said["threshold_block"]) == (action, 0.3, 0.8)


def test_without_a_scope_the_decision_decides_and_categories_say_why():
    thresholds = Thresholds(Band(0.3, 0.8), {"a": Band.at(0.5), "b": Band(0.2, 0.9), "c": Band.at(0.5)})
    assert thresholds.decide(0.9, {"a": 0.6, "b": 0.7, "c": 0.1}).violated == ("b", "a")
    # a category does not flag what the decision allows, and something is named where the decision flags
    assert thresholds.decide(0.1, {"a": 0.99, "b": 0.99, "c": 0.99}).violated == ()
    assert thresholds.decide(0.5, {"a": 0.1, "b": 0.05, "c": 0.2}).violated == ("c",)


def test_within_a_scope_its_categories_decide_by_their_own_bands():
    thresholds = Thresholds(Band(0.3, 0.8), {"a": Band(0.4, 0.6), "b": Band(0.2, 0.9), "c": Band.at(0.5)})
    scores = {"a": 0.5, "b": 0.1, "c": 0.95}
    outside = thresholds.decide(0.99, scores, ["b"])
    assert (outside.action, outside.score, outside.violated) == ("allow", 0.1, ())
    first = thresholds.decide(0.0, scores, ["a", "b"])
    assert (first.action, first.score, first.threshold, first.threshold_block, first.violated) == ("review", 0.5, 0.4, 0.6, ("a",))
    # the more severe action wins, whatever the scores are
    both = thresholds.decide(0.0, {"a": 0.61, "b": 0.85, "c": 0.0}, ["a", "b"])
    assert (both.action, both.score, both.violated) == ("block", 0.61, ("b", "a"))
    assert dict(both.categories) == {"a": 0.61, "b": 0.85, "c": 0.0}


def test_a_scope_changes_decisions_and_no_score(guard):
    images = [np.asarray(picture(seed)) for seed in range(6)]
    names = guard.policy.category_names
    everything, one = guard.predict(images), guard.predict(images, scope=[names[0]])
    for whole, part in zip(everything, one, strict=True):
        assert dict(whole.categories) == dict(part.categories)
        assert part.score == part.categories[names[0]]
        assert part.flagged == (part.categories[names[0]] >= 0.5)
    assert guard.predict(images[:1], scope=[names[0]], threshold=0.0)[0].action == "block"


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (["spam"], "scope names the category 'spam', which this guard does not know; it knows"),
        ("weapon", r"scope must be a list of categories, as in scope=\[weapon\]"),
        ([], "scope is empty: nothing would ever be flagged"),
        (3, "scope must be a list of categories"),
    ],
)
def test_a_wrong_scope_is_one_line(guard, scope, message):
    with pytest.raises(InputError, match=message):
        guard.predict([], scope=scope)


@pytest.mark.parametrize(
    ("review", "block", "message"),
    [
        (0.8, 0.3, "review must not be above block, got review=0.8 and block=0.3"),
        (-0.1, 0.3, r"review must lie in \[0, 1\], got -0.1"),
        (0.1, float("nan"), r"block must lie in \[0, 1\], got nan"),
        ("x", 0.3, r"review must lie in \[0, 1\], got 'x'"),
        (True, 1.0, r"review must lie in \[0, 1\], got True"),
    ],
)
def test_a_wrong_band_is_one_line(review, block, message):
    with pytest.raises(InputError, match=message):
        Band(review, block)


def test_thresholds_are_of_the_guards_own_categories(guard):
    with pytest.raises(InputError, match="thresholds must be given for the categories .* is missing"):
        GuardClassifier(guard.head, guard.encoder, guard.policy, threshold=Thresholds(Band.at(0.5), {}))
    with pytest.raises(InputError, match="spam is none of them"):
        GuardClassifier(guard.head, guard.encoder, guard.policy, threshold=Thresholds.usual([*guard.policy.category_names, "spam"]))


def test_decide_says_of_embeddings_what_predict_says_of_images(guard):
    images = [np.asarray(picture(seed)) for seed in range(5)]
    by_pixels, by_vectors = guard.predict(images), guard.decide(guard.encoder.encode_images(images))
    assert [one.action for one in by_pixels] == [one.action for one in by_vectors]
    np.testing.assert_allclose([one.score for one in by_pixels], [one.score for one in by_vectors], atol=1e-6)
    assert guard.decide(np.zeros((1, guard.encoder.dim)))[0].action == "error"
    with pytest.raises(InputError, match=r"must be \(n, 256\)"):
        guard.decide(np.ones((2, 9)))


def test_a_saved_guard_keeps_bands_calibration_and_history(guard, vectors, tmp_path):
    names = guard.policy.category_names
    thresholds = Thresholds(Band(0.2, 0.7), dict.fromkeys(names, Band(0.1, 0.9)))
    maps = {names[0]: ScoreMap.line("platt", 2.0, -1.0)}
    decision = ScoreMap("isotonic", (-1.0, 0.0, 2.0), (-3.0, -1.0, 4.0), (0.5, 2.0))
    calibration = Calibration(decision, maps, {"promises": ["at most 0.01 of safe images are blocked"], "n_safe": 300})
    made = GuardClassifier(
        guard.head, guard.encoder, guard.policy, threshold=thresholds, calibration=calibration, history=[{"reason": "first"}]
    )
    loaded = GuardClassifier.from_pretrained(made.save_pretrained(tmp_path / "guard"), encoder=guard.encoder)
    assert (loaded.thresholds, loaded.calibration, loaded.history) == (thresholds, calibration, [{"reason": "first"}])
    np.testing.assert_array_equal(loaded.probabilities(vectors), made.probabilities(vectors))
    assert loaded.fingerprint == made.fingerprint != guard.fingerprint
    assert "at most 0.01 of safe images are blocked" in (tmp_path / "guard/README.md").read_text()
    plain, mapped = guard.probabilities(vectors), made.probabilities(vectors)
    np.testing.assert_array_equal(np.argsort(plain[:, 0]), np.argsort(mapped[:, 0]))
    np.testing.assert_array_equal(plain[:, 2:], mapped[:, 2:])
    logits = np.log(plain[:, 1]) - np.log1p(-plain[:, 1])
    np.testing.assert_allclose(mapped[:, 1], 1 / (1 + np.exp(1 - 2 * logits)), rtol=1e-9)
    # what evaluation and attacks differentiate is the same score
    by_logits = torch.sigmoid(made.logits(torch.from_numpy(vectors)).double()).detach().numpy()
    np.testing.assert_allclose(by_logits, mapped[:, 0], atol=1e-6)


def test_a_score_map_goes_through_its_knots_and_back():
    one = ScoreMap("isotonic", (-1.0, 0.0, 2.0), (-3.0, -1.0, 4.0), (0.5, 2.0))
    logits = torch.tensor([-3.0, -1.0, -0.5, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert one(logits).tolist() == [-4.0, -3.0, -2.0, -1.0, 1.5, 4.0, 6.0]
    torch.testing.assert_close(one.inverse()(one(logits)), logits)
    assert (one.of_score(0.0), one.of_score(1.0)) == (0.0, 1.0)
    assert one.of_score(0.5) == pytest.approx(1 / (1 + np.exp(1)))
    assert ScoreMap.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_a_score_map_of_many_knots_is_straight_between_them_and_finite_where_they_are_close():
    rng = np.random.default_rng(0)
    knots, values = np.sort(rng.normal(size=40)), np.sort(rng.normal(size=40))
    one = ScoreMap("isotonic", tuple(knots), tuple(values), (1.0, 1.0))
    logits = np.linspace(knots[0], knots[-1], 501)
    np.testing.assert_allclose(one(torch.from_numpy(logits)).numpy(), np.interp(logits, knots, values), atol=1e-12)
    close = ScoreMap("isotonic", (1.0, 1.0 + 1e-9, 2.0), (0.0, 0.5, 1.0), (1.0, 1.0))  # the first two are one in float32
    mapped = close(torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float32))
    assert mapped.isfinite().all()
    assert mapped[3] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("knots", "values", "slopes", "message"),
    [
        ((0.0, 1.0), (1.0, 1.0), (1.0, 1.0), "must increase"),
        ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), "must increase"),
        ((0.0,), (0.0,), (0.0, 1.0), "slopes be above 0"),
        ((0.0,), (float("nan"),), (1.0, 1.0), "must be numbers"),
        ((), (), (1.0, 1.0), "as many, from 1"),
        ((0.0, 1.0), (0.0,), (1.0, 1.0), "as many, from 1"),
    ],
)
def test_a_map_that_does_not_increase_is_refused(knots, values, slopes, message):
    with pytest.raises(ValueError, match=message):
        ScoreMap("isotonic", knots, values, slopes)
