"""`calibrate`: thresholds with a promise for a saved guard, on images that it was not trained on; refusals; what is kept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from commands import call
from conftest import strict_json

import guardkit
from guardkit import Band, GuardClassifier, InputError, ScenesSource
from guardkit.embeddings import EmbeddingStore

FRESH = ["source=scenes", "source.n_train=100", "source.n_test=100", "source.seed=7"]


def calibrate(guard, source, **asked):
    """With the session's cache, so that an image is embedded once."""
    return guardkit.calibrate(guard, source, cache_dir=os.environ["GUARDKIT_CACHE"], **asked)


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder=folder)
    return folder / "guard"


@pytest.fixture(scope="module")
def guard(trained):
    return GuardClassifier.from_pretrained(trained)


@pytest.fixture(scope="module")
def fresh(scenes_policy):
    """Scenes of another seed: none was trained on."""
    return ScenesSource(scenes_policy, n_train=200, n_test=100, seed=7)


@pytest.fixture(scope="module")
def report(guard, fresh, tmp_path_factory):
    return calibrate(guard, fresh, max_fpr=0.05, min_recall=0.9, output_dir=tmp_path_factory.mktemp("calibrated"))


def test_the_new_guard_has_thresholds_that_say_what_they_promise(guard, report):
    figures = strict_json(report.folder / "calibration.json")
    assert {path.name for path in report.folder.iterdir() if not path.name.startswith(".")} == {
        "guard",
        "calibration.json",
        "calibration.png",
        "scores.parquet",
    }
    made = GuardClassifier.from_pretrained(report.folder / "guard")
    assert made.thresholds == report.guard.thresholds != guard.thresholds
    assert figures["thresholds"] == made.thresholds.to_dict()
    assert made.thresholds.decision.review <= made.thresholds.decision.block
    said = [one["says"] for one in figures["columns"]["decision"]["promises"]]
    assert said[0].startswith("at most 0.05 of safe images are blocked (with 90% confidence, from ")
    assert said[1].startswith("at least 0.9 of unsafe images are reviewed or blocked (with 90% confidence, from ")
    assert said[0] in report.table
    assert said[0] in (report.folder / "guard/README.md").read_text()
    # the guard that was given is as it was, and its thresholds are kept beside the new ones
    assert guard.thresholds.decision == Band.at(0.5)
    assert made.history[-1]["thresholds"] == guard.thresholds.to_dict()
    assert "max_fpr=0.05" in made.history[-1]["reason"]


def test_counts_add_up(report, fresh):
    images = report.figures["images"]
    assert images["given"] == len(fresh.load().train) + len(fresh.load().test or [])
    assert images["given"] == images["used"] + images["trained_on"] + images["of_a_group_that_is_there"] + len(images["rejected"])
    assert images["used"] == images["n_safe"] + images["n_unsafe"]


def test_scores_keep_their_order_and_become_probabilities(guard, report, fresh):
    records = [record for record in fresh.load().train if record.content is not None]
    vectors = guard.encoder.encode_images([record.content.load() for record in records])
    before, after = guard.score_embeddings(vectors), report.guard.score_embeddings(vectors)
    np.testing.assert_array_equal(np.argsort(before, kind="stable"), np.argsort(after, kind="stable"))
    assert after.mean() < before.mean()  # one in a hundred is unsafe where it works, not one in two
    point = report.guard.operating_points["balanced"]["threshold"]
    np.testing.assert_array_equal(after >= point, before >= guard.operating_points["balanced"]["threshold"])


def test_the_same_promises_hold_for_categories_as_far_as_they_can(report, scenes_policy):
    columns = report.figures["columns"]
    assert set(columns) == {"decision", *scenes_policy.category_names}
    for name in scenes_policy.category_names:
        recall = next(one for one in columns[name]["promises"] if one["kind"] == "min_recall")
        if columns[name]["n_unsafe"] < 22:
            assert recall["threshold"] is None
            assert f"needs 22 unsafe images; with {columns[name]['n_unsafe']}" in recall["reason"]
        assert 0 <= columns[name]["review"] <= columns[name]["block"] <= 1
        kept = [one["threshold"] for one in columns[name]["promises"] if one["threshold"] is not None]
        assert {columns[name]["review"], columns[name]["block"]} <= {*kept, columns[name]["review_before"], columns[name]["block_before"]}


def test_what_violates_one_category_is_not_taken_for_another(guard, report, fresh, scenes_policy):
    """On the images of the calibration it holds for certain; on others as promised, where there are images enough for a promise."""
    unsafe = [record for record in fresh.load().train if record.label]
    embeddings = EmbeddingStore(guard.encoder, Path(os.environ["GUARDKIT_CACHE"])).embed([record.content for record in unsafe])
    for made, max_fpr in ((report, 0.05), (calibrate(guard, fresh, max_fpr=0.008), 0.008)):
        scores = made.guard.probabilities(embeddings)
        for i, name in enumerate(scenes_policy.category_names, 1):
            promises = {one["kind"]: one["says"] for one in made.figures["columns"][name]["promises"]}
            assert ("max_fpr_of_others" in promises) == (max_fpr == 0.05)
            others = np.array([record.category != name for record in unsafe])
            columns = made.figures["columns"]
            n_others = columns["decision"]["n_unsafe"] - columns[name]["n_unsafe"]
            assert (scores[others, i] >= made.guard.thresholds.categories[name].block).sum() <= max_fpr * n_others
        if max_fpr == 0.05:
            assert "at most 0.05 of unsafe images of other categories are blocked for" in promises["max_fpr_of_others"]


def test_too_few_images_are_a_refusal_that_says_how_many_it_takes(guard, scenes_policy, tmp_path):
    few = ScenesSource(scenes_policy, n_train=40, n_test=20, seed=8)
    with pytest.raises(InputError, match="a false-positive rate of at most 1 % with 90 % confidence needs 230 safe images; with "):
        calibrate(guard, few, max_fpr=0.01, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_images_that_it_was_trained_on_are_left_out(guard, compose, scenes_policy, tmp_path):
    own = ScenesSource(scenes_policy, n_train=120, n_test=27)
    report = calibrate(guard, own, max_fpr=0.2)
    assert report.figures["images"]["trained_on"] >= 24
    assert any("left out because the guard was trained or validated on them" in note for note in report.figures["notes"])


def test_images_of_a_calibration_are_not_tested_on_and_may_be_calibrated_on_again(report, fresh, tmp_path):
    again = calibrate(report.guard, fresh, max_fpr=0.1)
    assert again.figures["images"]["trained_on"] == 0
    assert len(again.guard.history) == 2
    with pytest.raises(InputError, match="nothing is left to test on"):
        guardkit.evaluate(report.guard, fresh, output_dir=tmp_path, split="all", cache_dir=os.environ["GUARDKIT_CACHE"])


def test_a_guard_of_no_use_is_called_that(guard, fresh):
    """It flags whatever it likes, and keeps its promise."""
    idle = GuardClassifier(guardkit.LinearHead.build(guard.encoder, guard.policy), guard.encoder, guard.policy)
    idle.head.linear.weight.data.copy_(-guard.head.linear.weight.data[:, : guard.encoder.dim])
    report = calibrate(idle, fresh, max_fpr=0.1)
    assert any("no better than chance at its new thresholds" in note for note in report.figures["notes"])
    low, high = report.figures["columns"]["decision"]["on_these_images"]["precision_of_blocked"]["ci"]
    assert low < high


def test_one_promise_sets_one_threshold(guard, fresh):
    for asked in ({"max_fpr": 0.05}, {"min_recall": 0.9}):
        band = calibrate(guard, fresh, **asked).guard.thresholds.decision
        assert band.review == band.block
    queue = calibrate(guard, fresh, max_fpr=0.05, queue_per_day=20_000, volume_per_day=100_000)
    band = queue.guard.thresholds.decision
    assert band.review < band.block
    assert "at most 20000 images a day are reviewed" in queue.table


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "no promise is asked for; give max_fpr=0.01"),
        ({"max_fpr": 0}, r"max_fpr must lie in \(0, 1\), or null, got 0"),
        ({"max_fpr": 0.1, "confidence": 1}, r"confidence must lie in \(0, 1\), got 1"),
        ({"queue_per_day": 10}, "queue_per_day needs volume_per_day"),
        ({"queue_per_day": 10, "volume_per_day": 5, "max_fpr": 0.1}, "queue_per_day must be below volume_per_day"),
        ({"queue_per_day": 10, "volume_per_day": 500, "max_fpr": 0.1, "min_recall": 0.9}, "give one of them"),
        ({"max_fpr": 0.1, "prevalence": 2}, r"prevalence must lie in \(0, 1\)"),
    ],
)
def test_a_wrong_wish_is_one_line(guard, fresh, asked, message):
    with pytest.raises(InputError, match=message):
        calibrate(guard, fresh, **asked)


def test_the_command_does_the_same(trained, guard, scenes_policy, tmp_path):
    ran = call("guardkit.calibrate", f"guard={trained}", *FRESH, "max_fpr=0.1", f"output_dir={tmp_path / 'out'}")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == str(tmp_path / "out")
    by_function = calibrate(guard, ScenesSource(scenes_policy, n_train=100, n_test=100, seed=7), max_fpr=0.1)
    assert GuardClassifier.from_pretrained(tmp_path / "out/guard").thresholds == by_function.guard.thresholds
    refused = call("guardkit.calibrate", f"guard={trained}", *FRESH, "max_fpr=0.001", f"output_dir={tmp_path / 'none'}")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 or "error: a false-positive rate of at most 0.1 %" in refused.stderr
    assert not (tmp_path / "none/guard").exists()
