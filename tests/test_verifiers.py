"""Verifiers: what flipped and was kept is accepted, all else is rejected for the reason that holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import picture
from test_editors_pipeline import CountingEditor, photograph, unsafe_scene

from guardkit import GuardClassifier
from guardkit.counterfactual.instructor import TemplateInstructor
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.counterfactual.preservation import preservation
from guardkit.counterfactual.score_verifier import ScoreVerifier
from guardkit.editors.base import EditResult
from guardkit.editors.inpaint import InpaintEditor
from guardkit.editors.scenes import ScenesEditor
from guardkit.embeddings import EmbeddingStore
from guardkit.heads import LinearHead
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool, find_region
from guardkit.schema import InputError, Record


def test_preservation_looks_outside_the_region():
    original = np.asarray(picture(0, (120, 90)))
    region = (0.3, 0.3, 0.6, 0.6)
    inside, outside = original.copy(), original.copy()
    inside[30:50, 40:70] = 0
    outside[:20, :30] = 0
    assert preservation(original, original, None) == pytest.approx(1)
    assert preservation(original, inside, region) > 0.999
    assert preservation(original, outside, region) < 0.95
    # without a region the more similar half counts: a small change is no blame, a change of everything is
    assert preservation(original, inside, None) > 0.999
    assert preservation(original, 255 - original, None) < 0.5


def test_ssim_agrees_with_torchmetrics():
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    from guardkit.counterfactual.preservation import _ssim_map

    one, other = (np.asarray(picture(seed, (64, 48)).convert("L")).astype(np.float32) / 255 for seed in (1, 2))
    _, whole = structural_similarity_index_measure(
        torch.from_numpy(one)[None, None], torch.from_numpy(other)[None, None], data_range=1.0, return_full_image=True
    )
    np.testing.assert_allclose(_ssim_map(one, other)[8:-8, 8:-8], whole[0, 0].numpy()[8:-8, 8:-8], atol=2e-3)


@pytest.fixture(scope="module")
def store(scenes_encoder):
    return EmbeddingStore(scenes_encoder, None)


def judged(policy, verifier, records, editor, kind="counterfactual"):
    here = CounterfactualPipeline(policy, TemplateInstructor(), editor, verifier, cache_dir=None)
    return here.make(records, [0] * len(records), kind)


def test_texts_accept_exact_counterfactuals_and_reject_what_still_violates(scenes_policy, store):
    verifier = ScoreVerifier.from_texts(store, scenes_policy)
    records = [unsafe_scene(i) for i in range(80)]
    right = judged(scenes_policy, verifier, records, ScenesEditor())
    assert np.mean([one.accepted for one in right]) > 0.7
    assert all(0 <= one.verdict.flip_score <= 1 and one.verdict.preservation_score > 0.95 for one in right)

    def still_unsafe(request):
        return EditResult(SceneContent(request.content.scene.null_edit(1)).load())

    wrong = judged(scenes_policy, verifier, records, CountingEditor(still_unsafe))
    assert np.mean([one.accepted for one in wrong]) < 0.1
    assert any("the label did not flip" in one.verdict.reason for one in wrong if not one.accepted)


def test_wiping_the_violation_away_is_not_what_was_asked_for(scenes_policy, store):
    """A blob flips the label, and a guard would learn blobs."""
    records = [replace(record, region=find_region(record.content.scene)) for record in map(unsafe_scene, range(40))]
    texts = ScoreVerifier.from_texts(store, scenes_policy)
    painted = judged(scenes_policy, texts, records, InpaintEditor())
    assert np.mean([one.accepted for one in painted]) < 0.1
    assert any(one.verdict.reason == "verifier=encoder: what was asked for is not there (arrival below 0.95)" for one in painted)
    lenient = judged(scenes_policy, ScoreVerifier.from_texts(store, scenes_policy, min_arrival=0.0), records, InpaintEditor())
    assert np.mean([one.accepted for one in lenient]) > 0.5
    # nobody can ask for it where nobody knows the words
    wordless = [replace(record, caption="") for record in records]
    kept = judged(scenes_policy, texts, wordless, InpaintEditor())
    assert not any("arrival" in str(one.verdict.reason) for one in kept)


def test_null_edits_need_not_flip(scenes_policy, store):
    made = judged(
        scenes_policy, ScoreVerifier.from_texts(store, scenes_policy), [unsafe_scene(i) for i in range(8)], ScenesEditor(), "null"
    )
    assert all(one.accepted for one in made)
    assert all(one.verdict.flip_score is None for one in made)


def test_an_edit_towards_the_unsafe_side_is_judged_the_other_way_round(scenes_policy, store):
    records = []
    for i in range(40):
        scene = ScenePool(look_alike_rate=1.0).scene(0, i)
        records.append(Record(scene.name, 0, scene.category, "scenes_photo", str(scene.key), SceneContent(scene), caption=scene.caption))
    made = judged(scenes_policy, ScoreVerifier.from_texts(store, scenes_policy), records, ScenesEditor())
    assert np.mean([one.accepted for one in made]) > 0.6


def test_another_picture_and_a_redrawn_one_are_rejected(scenes_policy, store):
    records = [unsafe_scene(i) for i in range(6)]
    lenient = {"max_score": 0.99, "min_drop": 0.0}

    def elsewhere(request):
        return EditResult(np.asarray(picture(5, (128, 128))))

    near = ScoreVerifier.from_texts(store, scenes_policy, **lenient, min_cosine=0.99)
    made = judged(scenes_policy, near, records, CountingEditor(elsewhere))
    assert {one.verdict.reason for one in made} == {"verifier=encoder: the edit is another picture (cosine of embeddings below 0.99)"}
    strict = ScoreVerifier.from_texts(store, scenes_policy, **lenient, min_preservation=0.9)
    made = judged(scenes_policy, strict, records, CountingEditor(elsewhere))
    assert {one.verdict.reason for one in made} == {"verifier=encoder: too little was kept (similarity below 0.9)"}


def test_a_guard_judges_with_its_own_encoder(scenes_policy, scenes_encoder, store):
    head = LinearHead(scenes_encoder.dim, len(scenes_policy.categories))
    guard = GuardClassifier(head, scenes_encoder, scenes_policy, threshold=0.5)
    verifier = ScoreVerifier.from_guard(store, scenes_policy, guard=guard)
    (made,) = judged(scenes_policy, verifier, [unsafe_scene(0)], ScenesEditor())
    # an untrained head says 0.5 of everything
    assert made.verdict.reason == "verifier=guard: the label did not flip (score not below 0.5)"
    before = verifier.config["guard"]
    head.linear.bias.data += 1
    assert verifier.config["guard"] != before  # another guard's verdicts are not taken for this one's
    with pytest.raises(InputError, match="verifier.guard enforces policy 'other'"):
        ScoreVerifier.from_guard(store, replace(scenes_policy, categories=scenes_policy.categories[:2]), guard=_with_name(guard, "other"))


def _with_name(guard, name):
    guard.policy = replace(guard.policy, name=name)
    return guard


@pytest.mark.parametrize(
    "wrong", [{"max_score": 1.0}, {"min_drop": -0.1}, {"min_preservation": 2}, {"min_cosine": -2}, {"min_arrival": 1.5}]
)
def test_wrong_limits_are_named(scenes_policy, store, wrong):
    with pytest.raises(InputError, match=f"verifier.{next(iter(wrong))} must lie in .*, got {next(iter(wrong.values()))}"):
        ScoreVerifier.from_texts(store, scenes_policy, **wrong)


def test_an_unreadable_neighbour_does_not_spoil_a_batch(scenes_policy, store):
    """A rejected edit in the same batch leaves the verdicts of the others as they are."""
    records = [unsafe_scene(0), photograph(), unsafe_scene(1)]
    verifier = ScoreVerifier.from_texts(store, scenes_policy)
    together = judged(scenes_policy, verifier, records, ScenesEditor())
    alone = [judged(scenes_policy, verifier, [record], ScenesEditor())[0] for record in records]
    assert [one.verdict for one in together] == [one.verdict for one in alone]
    assert "not a drawn scene" in together[1].verdict.reason
