"""`compare`: an old and a new guard on the same images, which neither has seen."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
from commands import call
from conftest import strict_json

import guardkit
from guardkit import Band, GuardClassifier, InputError, LinearHead, ScenesSource, Thresholds


def compare(*guards_and_source, **asked):
    """With the session's cache, so that an image is embedded once."""
    return guardkit.compare(*guards_and_source, cache_dir=os.environ["GUARDKIT_CACHE"], **asked)


@pytest.fixture(scope="module")
def folders(train, tmp_path_factory):
    """A good guard, and one that was not trained at all."""
    good, bad = (tmp_path_factory.mktemp(name) for name in ("good", "bad"))
    train(folder=good)
    trained = GuardClassifier.from_pretrained(good)
    head = LinearHead.build(trained.encoder, trained.policy)
    head.linear.weight.data.normal_(std=0.05)
    GuardClassifier(head, trained.encoder, trained.policy, training_images=trained.training_images).save_pretrained(bad / "guard")
    return good, bad


@pytest.fixture(scope="module")
def source(scenes_policy):
    return ScenesSource(scenes_policy, n_train=60, n_test=60, seed=5)


@pytest.fixture(scope="module")
def report(folders, source, tmp_path_factory):
    good, bad = folders
    return compare(bad, good, source, output_dir=tmp_path_factory.mktemp("compared"))


def rows_of(report, **wanted):
    return [row for row in report.figures["figures"] if all(row[key] == value for key, value in wanted.items())]


def test_a_better_guard_is_called_better_with_an_interval(report):
    (auroc,) = rows_of(report, part="all", metric="auroc")
    assert auroc["difference"] == pytest.approx(auroc["new"] - auroc["old"])
    assert (auroc["verdict"], auroc["ci"][0] > 0) == ("better", True)
    assert report.figures["says"].startswith("new is better in ")
    assert {path.name for path in report.folder.iterdir() if not path.name.startswith(".")} == {"compare.json", "compare.html"}
    assert strict_json(report.folder / "compare.json") == report.figures
    page = (report.folder / "compare.html").read_text()
    assert "http://" not in page
    low, high = auroc["ci"]
    assert f"{auroc['difference']:+.3f} ({low:+.3f} to {high:+.3f})" in page
    assert '<td class="better">better</td>' in page


def test_the_same_guard_is_neither_better_nor_worse(folders, source):
    same = compare(folders[0], folders[0], source)
    assert {row["difference"] for row in same.figures["figures"]} == {0.0}
    assert {row["verdict"] for row in same.figures["figures"]} == {"open"}
    assert same.figures["changes"] == []
    assert "neither better nor worse" in same.table


def test_changes_are_wins_and_losses_and_add_up(report):
    changes, flips = report.figures["changes"], report.figures["flips"]
    assert len(changes) == sum(flips[label][kind] for label in ("unsafe", "safe") for kind in ("won", "lost"))
    for one in changes:
        flagged = [one[name]["action"] != "allow" for name in ("old", "new")]
        assert flagged[0] != flagged[1]
        assert one["is_win"] == (flagged[1] == bool(one["label"]))
    # the difference in recall is what was won and lost of unsafe images
    (recall,) = rows_of(report, part="all", metric="recall", at="flagged")
    assert recall["difference"] * recall["n"] == pytest.approx(flips["unsafe"]["won"] - flips["unsafe"]["lost"])


def test_figures_are_those_of_each_guards_own_thresholds(folders, source):
    good = GuardClassifier.from_pretrained(folders[0])
    strict = copy.copy(good)
    strict.thresholds = Thresholds(Band(0.5, 0.9), good.thresholds.categories)
    found = compare(good, strict, source)
    (flagged,) = rows_of(found, part="all", metric="recall", at="flagged")
    (blocked,) = rows_of(found, part="all", metric="recall", at="blocked")
    assert flagged["difference"] == 0
    assert blocked["new"] < blocked["old"] == flagged["old"]


def test_what_one_of_them_has_seen_is_left_out_for_both(folders, scenes_policy):
    own = ScenesSource(scenes_policy, n_train=120, n_test=27)
    found = compare(folders[1], folders[0], own)
    assert found.figures["images"]["trained_on"] >= 24
    images = found.figures["images"]
    assert images["given"] == images["n"] + images["trained_on"] + len(images["rejected"])


def test_a_guard_with_a_category_more_is_compared_and_one_with_less_is_not(folders, source):
    good = GuardClassifier.from_pretrained(folders[0])
    policy = guardkit.Policy.from_dict(
        {"name": "more", "categories": [{"name": "kites", "definition": "A kite.", "unsafe_texts": ["a kite"]}]}
    )
    more = good.extended_by(
        GuardClassifier(LinearHead.build(good.encoder, policy), good.encoder, policy, training_images=good.training_images)
    )
    found = compare(good, more, source)
    assert np.isfinite(rows_of(found, part="all", metric="auroc")[0]["new"])
    with pytest.raises(InputError, match="lacks the category 'kites' of the old one's"):
        compare(more, good, source)


def test_the_command_does_the_same(folders, source, report, tmp_path):
    good, bad = folders
    ran = call(
        "guardkit.compare",
        f"old={bad}",
        f"new={good}",
        "source.n_train=60",
        "source.n_test=60",
        "source.seed=5",
        f"output_dir={tmp_path / 'out'}",
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == str(tmp_path / "out")
    assert strict_json(tmp_path / "out/compare.json")["figures"] == report.figures["figures"]
