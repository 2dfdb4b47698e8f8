"""Who is measured, under which policy: whatever cannot be had is said of all at once, before anything long."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny_models import write_clip, write_dinov2

from guardkit import GuardClassifier
from guardkit.api.evaluate import notes_on
from guardkit.heads import LinearHead
from guardkit.policy import Policy
from guardkit.runs.contenders import build_contenders
from guardkit.schema import InputError
from guardkit.seen import SeenImages


@pytest.fixture
def guard(scenes_encoder, scenes_policy, tmp_path):
    """guard(name, policy) -> the folder of an untrained guard."""

    def make(name, policy=scenes_policy):
        head = LinearHead.build(scenes_encoder, policy)
        made = GuardClassifier(head, scenes_encoder, policy, training={"experiment": name}, training_images=SeenImages.of([]))
        return made.save_pretrained(tmp_path / name)

    return make


@pytest.fixture
def no_encoder(monkeypatch):
    """Fails the test when an encoder's model is loaded."""
    from guardkit.encoders.open_clip import OpenClipEncoder

    def loaded(self):
        raise AssertionError(f"{self.name} was loaded")

    monkeypatch.setattr(OpenClipEncoder, "_build", loaded)


@pytest.fixture(scope="module")
def other_policy(scenes_policy):
    return replace(scenes_policy, name="others", description="The same categories under other words.")


@pytest.mark.parametrize(
    ("baselines", "messages"),
    [
        ("[zero_shot,zero_shoot]", ["there is no baseline 'zero_shoot'"]),
        ("[zero_shot,{q16: {weights: /no/such/file.p}}]", [r"baseline.q16.weights /no/such/file.p does not exist"]),
        (
            "[zero_shot,{q16: {weights: /no/such/file.p}},always_unsafe,{nsfw_detector: {weights: /no/such/one}}]",
            ["2 of 4 classifiers cannot be had, and nothing was measured", r"\(1\) baseline.q16.weights", r"\(2\) baseline.nsfw_detector.weights"],
        ),
        ("[zero_shoot,zero_shot,{prevalence: {shares: 1}}]", ["2 of 3 classifiers", "'zero_shoot'", "baseline prevalence does not take"]),
        (
            "[zero_shot,{zero_shot: {encoder: open_clip}}]",
            [r"baseline zero_shot needs encoder.weights; give baselines=\[{zero_shot: {encoder: {open_clip: {weights: VALUE}}}}\]"],
        ),
    ],
)  # fmt: skip
def test_all_that_cannot_be_had_is_named_before_an_encoder_is_loaded(compose, no_encoder, baselines, messages):
    with pytest.raises(InputError) as caught:
        build_contenders(compose("evaluate", f"baselines={baselines}"))
    for message in messages:
        caught.match(message)
    assert "\n" not in str(caught.value)


def test_every_guard_that_is_none_is_named(compose, guard, tmp_path):
    cfg = compose("evaluate", f"guard=[{tmp_path / 'one'},{guard('good')},{tmp_path / 'two'}]", "baselines=[always_unsafe]")
    with pytest.raises(InputError, match=r"2 of 4 classifiers cannot be had, and nothing was measured: \(1\) .*one.*; \(2\) .*two"):
        build_contenders(cfg)


def test_the_policy_of_the_guards_is_used(compose, guard, other_policy):
    rules, contenders = build_contenders(compose("evaluate", f"guard={guard('own', other_policy)}", "baselines=[zero_shot]"))
    assert (rules.name, rules.digest) == ("others", other_policy.digest)
    assert [one.name for one in contenders] == ["own", "zero_shot"]
    assert notes_on(rules, contenders) == []


def test_guards_of_several_policies_need_a_word(compose, guard, other_policy, scenes_policy, tmp_path):
    first, second = guard("first"), guard("second", other_policy)
    asked = f"guard=[{first},{second}]"
    with pytest.raises(
        InputError,
        match=r"different policies \(first under scenes, digest [0-9a-f]{8}, second under others, digest [0-9a-f]{8}\); choose one with policy=NAME or",
    ):
        build_contenders(compose("evaluate", asked))
    rules, contenders = build_contenders(compose("evaluate", asked, "policy=scenes"))
    (note,) = notes_on(rules, contenders)
    assert rules.digest == scenes_policy.digest
    assert note.startswith("second was trained under the policy others, not under scenes as given")
    rules, contenders = build_contenders(compose("evaluate", asked, f"policy_file={second / 'policy.yaml'}"))
    (note,) = notes_on(rules, contenders)
    assert rules.digest == other_policy.digest
    assert note.startswith("first was trained under the policy scenes, not under others")


def test_another_policy_is_said_in_the_report(compose, guard, other_policy, tmp_path):
    from guardkit.runs.evaluate import run

    folder = guard("own", other_policy)
    cfg = compose("evaluate", f"guard={folder}", "policy=scenes", "source.n_test=9", "n_resamples=100")
    report = run(cfg, tmp_path / "out")
    facts = json.loads((tmp_path / "out/summary.json").read_text())
    assert facts["benchmark"]["policy"] == "scenes"
    assert facts["classifiers"]["own"]["policy"] == {"name": "others", "digest": other_policy.digest}
    assert Policy.from_dict(facts["settings"]["policy"]).name == "scenes"
    for text in (report.table, (tmp_path / "out/report.md").read_text(), (tmp_path / "out/report.html").read_text()):
        assert "own was trained under the policy others, not under scenes as given" in text


def test_baselines_alone_are_measured_under_the_scenes_policy(compose):
    rules, contenders = build_contenders(compose("evaluate", "baselines=[always_unsafe]"))
    assert (rules.name, notes_on(rules, contenders)) == ("scenes", [])


def test_a_baseline_takes_any_encoder_with_its_settings(compose, tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "dino").mkdir()
    write_clip(tmp_path / "clip")
    write_dinov2(tmp_path / "dino")
    of = "{zero_shot: {encoder: {transformers: {weights: '" + str(tmp_path) + "/%s', device: cpu}}}}"
    _, (one,) = build_contenders(compose("evaluate", f"baselines=[{of % 'clip'}]"))
    assert one.guard.encoder.weights == str(tmp_path / "clip")
    with pytest.raises(InputError, match="baseline zero_shot needs an encoder that reads texts, and .*dino does not"):
        build_contenders(compose("evaluate", f"baselines=[{of % 'dino'}]"))
