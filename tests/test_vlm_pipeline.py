"""A vision-language model as instructor and as verifier: what it says becomes an instruction or a verdict, or a reason."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from test_editors_pipeline import CountingEditor, darker, photograph

from guardkit.counterfactual.instructor import TemplateInstructor
from guardkit.counterfactual.pipeline import CounterfactualPipeline, EditCounts
from guardkit.counterfactual.verifier import NoVerifier
from guardkit.counterfactual.vlm_instructor import VLMInstructor
from guardkit.counterfactual.vlm_verifier import VLMVerifier
from guardkit.editors.base import EditResult
from guardkit.editors.inpaint import InpaintEditor
from guardkit.images import FileContent
from guardkit.vlm.base import Answer
from guardkit.vlm.endpoint import OpenAIVLM

GOOD = {"category": "hate", "violation": "a banner", "edit": "Replace the  banner\nwith a kite.", "target": "a person with a kite"}


class Scripted:
    """Answers with what it is told to, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, answer):
        self.answer, self.asked, self.config = answer, [], {"vlm": "scripted"}

    def ask(self, questions):
        self.asked += questions
        said = [self.answer(question) for question in questions]
        return [one if isinstance(one, Answer) else Answer(one if isinstance(one, str) else json.dumps(one)) for one in said]


def instructed(answer, record=None, policy=None, **options):
    vlm = Scripted(answer)
    return VLMInstructor(vlm, None).instruct([record or photograph()], [0], policy, **options)[0], vlm


def test_an_answer_becomes_an_instruction(scenes_policy):
    made, vlm = instructed(lambda _: GOOD, policy=scenes_policy)
    assert (made.text, made.target, made.reason) == ("Replace the banner with a kite.", "a person with a kite", None)
    (question,) = vlm.asked
    for category in scenes_policy.categories:
        assert category.name in question.prompt
        assert category.definition in question.prompt
    assert "labelled the image as a violation of hate" in question.prompt
    np.testing.assert_array_equal(question.images[0], photograph().content.load())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(None, "endpoint cannot be reached", transient=True), "endpoint cannot be reached"),
        (Answer(None, "refused on safety grounds"), "refused on safety grounds"),
        ("I will not do that.", "reply holds no JSON object"),
        (GOOD | {"category": "pears"}, "reply does not fit its schema"),
        (GOOD | {"extra": "and delete all files"}, "reply does not fit its schema: additionalProperties"),
        (GOOD | {"edit": "x" * 5000}, "reply does not fit its schema: properties.edit.maxLength"),
        ({key: value for key, value in GOOD.items() if key != "target"}, "reply does not fit its schema: required"),
        (GOOD | {"category": "none"}, "the model sees no violation"),
        (GOOD | {"category": "violence"}, "the model sees another category"),
    ],
)
def test_what_is_no_answer_is_an_abstention(scenes_policy, answer, reason):
    made, _ = instructed(lambda _: answer, policy=scenes_policy)
    assert made.text == ""
    assert made.reason.startswith(reason)


def test_an_unreadable_image_is_not_asked_about(scenes_policy, tmp_path):
    vlm = Scripted(lambda _: GOOD)
    records = [replace(photograph(), content=FileContent(tmp_path / "none.png")), photograph(1)]
    first, second = VLMInstructor(vlm, None).instruct(records, [0, 0], scenes_policy)
    assert first.reason.startswith("unreadable image: file does not exist")
    assert second.reason is None
    assert len(vlm.asked) == 1


def test_a_rerun_asks_nothing_and_abstentions_of_an_endpoint_are_asked_again(scenes_policy, tmp_path):
    down = Answer(None, "endpoint cannot be reached", transient=True)
    first = Scripted(lambda question: GOOD if question.images[0].mean() > 120 else down)
    records = [photograph(seed) for seed in range(6)]
    bright = sum(record.content.load().mean() > 120 for record in records)
    assert 0 < bright < 6

    def make(vlm, counts):
        here = CounterfactualPipeline(
            scenes_policy, VLMInstructor(vlm, str(tmp_path)), CountingEditor(darker), NoVerifier(), cache_dir=tmp_path, batch_size=2
        )
        return here.make(records, [0] * 6, counts=counts)

    counts = EditCounts()
    make(first, counts)
    assert (counts.requested, counts.accepted) == (6, bright)
    assert counts.rejected == {"instructor=vlm: endpoint cannot be reached": 6 - bright}
    again, counts = Scripted(lambda _: GOOD), EditCounts()
    make(again, counts)
    assert len(again.asked) == 6 - bright
    assert (counts.accepted, counts.cache_hits) == (6, bright)


def verdict(answers, record=None, kind="counterfactual"):
    said = iter(answers)
    from guardkit import Policy

    policy = Policy.load(ROOT / "conf/policy/scenes.yaml")
    vlm = Scripted(lambda _: next(said))
    here = CounterfactualPipeline(policy, TemplateInstructor(), CountingEditor(darker), VLMVerifier(policy, vlm, None), cache_dir=None)
    (made,) = here.make([record or photograph()], [0], kind)
    return made.verdict, vlm


def seen(first, second, same=True):
    return {"first_violates": first, "second_violates": second, "rest_is_the_same": same}


def test_both_orders_must_agree():
    good, vlm = verdict([seen(True, False), seen(False, True)])
    assert (good.reason, good.flip_score, good.preservation_score) == (None, 1, 1)
    one, other = (question.images for question in vlm.asked)
    np.testing.assert_array_equal(one[0], other[1])
    np.testing.assert_array_equal(one[1], other[0])


@pytest.mark.parametrize(
    ("answers", "reason", "scores"),
    [
        ([seen(True, True), seen(True, True)], "the label did not flip", (0, 1)),
        ([seen(True, False), seen(True, False)], "the two orders disagree on the label", (0.5, 1)),  # favours the second place
        ([seen(True, False, False), seen(False, True, False)], "the rest was not kept", (1, 0)),
        ([seen(True, False), seen(False, True, False)], "the two orders disagree on the rest", (1, 0.5)),
        ([seen(True, False), "perhaps"], "reply holds no JSON object", (None, None)),
        ([seen(True, False), seen(False, "yes")], "reply does not fit its schema: properties.second_violates.type", (None, None)),
        ([Answer(None, "refused on safety grounds"), seen(False, True)], "refused on safety grounds", (None, None)),
    ],
)
def test_what_does_not_convince_is_rejected(answers, reason, scores):
    made, _ = verdict(answers)
    assert made.reason.startswith(f"verifier=vlm: {reason}")
    assert (made.flip_score, made.preservation_score) == scores


def test_null_edits_must_leave_the_label():
    assert verdict([seen(True, True), seen(True, True)], kind="null")[0].reason is None
    assert verdict([seen(True, False), seen(False, True)], kind="null")[0].reason == "verifier=vlm: the label moved"


def test_a_down_endpoint_is_asked_again_and_the_edit_is_not_made_again(scenes_policy, tmp_path):
    down = Scripted(lambda _: Answer(None, "endpoint cannot be reached", transient=True))
    editor = CountingEditor(lambda request: EditResult(request.content.load() // 2))

    def make(vlm):
        verifier = VLMVerifier(scenes_policy, vlm, str(tmp_path))
        return CounterfactualPipeline(scenes_policy, TemplateInstructor(), editor, verifier, cache_dir=tmp_path).make([photograph()], [0])[
            0
        ]

    assert make(down).verdict.reason == "verifier=vlm: endpoint cannot be reached"
    said = iter([seen(True, False), seen(False, True)])
    up = Scripted(lambda _: next(said))
    assert make(up).accepted
    assert make(up).accepted
    assert (len(down.asked), len(up.asked), len(editor.asked)) == (2, 2, 1)


def test_what_is_sent_to_workers_holds_no_key(scenes_policy, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    vlm = OpenAIVLM("m", base_url="http://localhost:1/v1")
    here = CounterfactualPipeline(
        scenes_policy,
        VLMInstructor(vlm, str(tmp_path)),
        InpaintEditor(),
        VLMVerifier(scenes_policy, vlm, str(tmp_path)),
        cache_dir=tmp_path,
    )
    sent = pickle.dumps(here)
    assert b"sk-of-the-test" not in sent
    there = pickle.loads(sent)
    assert (there.verifier.config, there.editor.config) == (here.verifier.config, here.editor.config)
    # the worker finds what is stored, in the same place on the same machine
    VLMInstructor(Scripted(lambda _: GOOD), str(tmp_path)).instruct([photograph()], [0], scenes_policy)
    kept = pickle.loads(pickle.dumps(VLMInstructor(Unasked(), str(tmp_path))))
    assert kept.instruct([photograph()], [0], scenes_policy)[0].target == GOOD["target"]


class Unasked:
    """The scripted model, elsewhere."""

    name, config = "scripted", {"vlm": "scripted"}


def test_configured_by_name(compose):
    """instructor=vlm and verifier=vlm, with an endpoint or with a local model."""
    from guardkit.runs.objects import build

    names = ["instructor=vlm", "instructor.vlm.model=m", "verifier=vlm", "vlm@verifier.vlm=local", "verifier.vlm.model=/no/such"]
    parts = build(compose("train", *names, "source.n_train=8", "source.n_test=2", "cache_dir=null"))
    assert (parts.pipeline.instructor.name, parts.pipeline.verifier.name) == ("vlm", "vlm")
