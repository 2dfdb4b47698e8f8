"""The policies that claims about photographs are made over: what they are, and that their division never changes."""

from __future__ import annotations

import csv
import hashlib

import pytest
from conftest import ROOT

from benchmarks.class_policies import FILE, make_policies, policies, read_chains

CLASSES = ROOT.parent / "shared/data/tiny_imagenet/classes.csv"
TUNE, TEST = policies("tune"), policies("test")


def test_the_division_never_changes():
    """What was tuned on once is never tested on: figures of different days are of the same policies."""
    assert (len(TUNE), len(TEST)) == (22, 24)
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == "15843cd2d25c76347f16fbbdb679a6fa8175a160cff2b4d9652da6421e6cb511"


@pytest.mark.skipif(not CLASSES.is_file(), reason="the photographs are not here")
def test_the_file_follows_from_the_classes_and_the_seed():
    chains = read_chains(CLASSES)
    assert [one for one in make_policies(chains) if one.split == "test"] == TEST
    assert [one for one in make_policies(chains) if one.split == "tune"] == TUNE
    for one in (*TUNE, *TEST):
        assert all(one.hypernym in chains[name] for name in one.classes)
        assert {*one.classes, *one.look_alikes, *one.ordinary} <= set(chains)


def test_no_class_is_forbidden_twice_and_every_policy_has_look_alikes():
    forbidden = [name for one in (*TUNE, *TEST) for name in one.classes]
    assert len(set(forbidden)) == len(forbidden)
    for one in (*TUNE, *TEST):
        assert len(one.classes) in (3, 4)
        assert len(set(one.look_alikes) - set(one.classes)) == 6
        assert not set(one.ordinary) & {*one.classes, *one.look_alikes}


def test_each_is_a_policy_of_its_own():
    made = [one.policy for one in (*TUNE, *TEST)]
    assert len({policy.name for policy in made}) == len(made)
    assert all(policy.harmless for policy in made)
    (category,) = made[0].categories
    assert (category.classes, category.look_alikes) == (TUNE[0].classes, TUNE[0].look_alikes)
    assert category.unsafe_texts[0] == f"a photo of a {TUNE[0].classes[0]}"


def test_look_alikes_are_the_nearest_others(tmp_path):
    """A made tree: two kinds of three and four, so either is forbidden whole, or looks like what is."""
    kinds = {"cat": ["tabby", "tiger", "lion"], "dog": ["pug", "boxer", "poodle", "collie"], "tool": ["saw", "axe", "file"]}
    above = {"cat": "animal|entity", "dog": "animal|entity", "tool": "thing|entity"}
    with (tmp_path / "classes.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "hypernyms"])
        rows.writerows([name, f"{kind}|{above[kind]}"] for kind, names in kinds.items() for name in names)
    made = make_policies(read_chains(tmp_path / "classes.csv"), seed=3, n_test=1)
    assert sum(one.split == "test" for one in made) == 1
    for one in made:
        if set(one.classes) == set(kinds["cat"]):
            assert set(one.look_alikes[:4]) == set(kinds["dog"])
            break
    else:
        pytest.fail("no policy forbids the cats")
