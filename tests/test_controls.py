"""Controls of a training report: what handling leaves in images that nobody meant to change."""

from __future__ import annotations

import re

import numpy as np
import pytest
from test_editors_pipeline import CountingEditor, unsafe_scene

from guardkit.counterfactual.instructor import TemplateInstructor
from guardkit.counterfactual.pipeline import CounterfactualPipeline, EditCounts
from guardkit.counterfactual.verifier import NoVerifier
from guardkit.data.arms import arm_named
from guardkit.data.controls import JpegContent, make_controls
from guardkit.data.views import ViewMaker
from guardkit.editors.base import EditResult
from guardkit.editors.scenes import ScenesEditor
from guardkit.embeddings import EmbeddingStore
from guardkit.evaluation.verdicts import editor_trace, texts, unusable, unused
from guardkit.metrics.probe import edited_vs_original_auroc


@pytest.fixture(scope="module")
def store(scenes_encoder):
    return EmbeddingStore(scenes_encoder, None)


def controls(store, policy, editor, n=40):
    pipeline = CounterfactualPipeline(policy, TemplateInstructor(), editor, NoVerifier(), cache_dir=None)
    counts = EditCounts()
    views = ViewMaker(store, pipeline, transform="none", variants_per_image=1, counts=EditCounts())
    return make_controls(views, [unsafe_scene(i) for i in range(n)], counts), counts


def signing(request):
    """Leaves the same trace in everything: a ghost of another picture. (The encoder is blind to blur, grey and black bars.)"""
    ghost = unsafe_scene(999).content.load().astype(float)
    return EditResult((0.3 * request.content.load() + 0.7 * ghost).astype(np.uint8))


def test_the_exact_editor_leaves_no_trace_and_has_no_autoencoder(store, scenes_policy):
    found, counts = controls(store, scenes_policy, ScenesEditor())
    assert list(found) == ["null_edit", "autoencoder", "jpeg"]
    assert edited_vs_original_auroc(found["null_edit"].original, found["null_edit"].altered).estimate < 0.7
    assert not len(found["autoencoder"].original)
    assert found["autoencoder"].reason.startswith("40 x no round trip")
    assert len(found["jpeg"].original) == 40
    assert counts.seconds > 0


def test_an_editor_that_leaves_a_trace_is_found_out(store, scenes_policy):
    found, _ = controls(store, scenes_policy, CountingEditor(signing))
    trip = found["autoencoder"]
    assert trip.reason is None
    assert edited_vs_original_auroc(trip.original, trip.altered).low > 0.8


def test_jpeg_changes_little_and_says_so_in_its_key():
    content = unsafe_scene(0).content
    one = JpegContent(content)
    difference = np.abs(one.load().astype(int) - content.load())
    assert 0 < difference.mean() < 6
    assert len({content.key, one.key, JpegContent(content, 30).key}) == 3
    assert np.abs(JpegContent(content, 5).load().astype(int) - content.load()).mean() > difference.mean()


@pytest.mark.parametrize(
    ("arm", "is_said"),
    [
        ("pairs_aug", True),
        ("pairs_plus", True),
        ("shuffled_pairs", True),
        ("pairs_balanced", False),
        ("null_edits", False),
        ("unpaired", False),
    ],
)
def test_a_trace_is_said_where_only_safe_images_passed_through_the_editor(arm, is_said):
    def said(auroc, low, high):
        controls = {"null_edit": {"auroc": auroc, "ci": {"auroc": [low, high]}}}
        return editor_trace({"controls": controls}, arm_named(arm), "inpaint")

    found = said(0.79, 0.7, 0.87)
    assert bool(found) == is_said
    if found:
        assert "the guard may have learned the editor" in found[0]
        assert "editor=inpaint" in found[0]
        assert "AUROC 0.790, 95 % interval 0.700–0.870" in found[0]
        assert f"experiment={arm}" not in found[0]
    assert said(0.79, 0.55, 0.95) == []  # so few images that it may be as weak as a trace that does no harm
    assert editor_trace({"controls": {"null_edit": {"auroc": None, "ci": {}}}}, arm_named(arm), "inpaint") == []


def of_images(auroc, low, high):
    return {"auroc": auroc, "ci": {"auroc": [low, high]}}


@pytest.mark.parametrize(
    ("alone", "guard", "is_said"),
    [
        (of_images(0.9, 0.8, 0.95), of_images(0.93, 0.9, 0.96), None),
        (
            of_images(0.6, 0.45, 0.7),
            of_images(0.9, 0.8, 0.95),
            "no better than chance on these test images .AUROC 0.600, 95 % interval 0.450–0.700",
        ),
        (of_images(0.9, 0.85, 0.95), of_images(0.7, 0.6, 0.8), "alone do better .* than with the labels .AUROC 0.700"),
        (of_images(0.9, 0.85, 0.95), of_images(0.84, 0.7, 0.9), None),  # within what chance gives
        (of_images(None, None, None), of_images(None, None, None), None),
        (None, of_images(0.7, 0.6, 0.8), None),  # a head without texts
    ],
)
def test_what_the_texts_do_alone_is_said_where_they_mislead_or_do_better(alone, guard, is_said):
    found = texts({"texts_alone": alone, "test": guard})
    assert len(found) == (is_said is not None)
    if is_said:
        assert re.search(is_said, found[0])


def test_inputs_that_could_not_be_used_are_said_with_the_commonest_reasons():
    assert unusable({"given": 9, "rejected": []}) == []
    reasons = ["no label"] * 2 + ["truncated"] * 3 + ["too large", "empty", "a folder"]
    assert unusable({"given": 9, "rejected": [{"id": str(i), "reason": one} for i, one in enumerate(reasons)]}) == [
        "of 9 inputs 8 could not be used (3 x truncated; 2 x no label; 1 x too large; 2 other reasons); metrics.json names each"
    ]


def test_labelled_images_that_are_left_over_are_said():
    (note,) = unused({"n_unsafe": 10, "n_safe": 10}, 10, 30)
    assert note.startswith("of 30 labelled safe images for training 10 are used; data.safe_per_unsafe=4 takes up to 30")
    assert unused({"n_unsafe": 10, "n_safe": 40}, 10, 100) == [
        "of 100 labelled safe images for training 40 are used; data.safe_per_unsafe=all takes all"
    ]
    assert unused({"n_unsafe": 10, "n_safe": 10}, 10, 10) == []
    assert unused({"n_unsafe": 10, "n_safe": 0}, 10, 100) == []  # an arm without natural safe images
    assert unused({"n_unsafe": 10, "n_safe": 0}, 25, 0) == [
        "of 25 labelled unsafe images for training 10 are used; data.n_unsafe=25 takes all"
    ]


def test_train_measures_the_texts_beside_the_guard(train):
    report = train("experiment=unpaired")
    alone = report.metrics["texts_alone"]
    assert alone["auroc"] > 0.99  # the policy of the drawn scenes names what they show
    assert alone["ci"]["auroc"][0] <= alone["auroc"]
    assert 0 <= alone["ranking_accuracy"] <= 1
    assert f"AUROC of the texts alone           {alone['auroc']:.3f}" in report.table
    assert "of 120 labelled safe images for training 24 are used" in " ".join(report.metrics["notes"])
    without = train("experiment=unpaired", "head=linear")
    assert without.metrics["texts_alone"] is None
    assert "texts alone" not in without.table
