"""Editors, and the pipeline with its store: nothing made twice, every try counted, nothing wrong let through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import picture

from guardkit import images
from guardkit.counterfactual.instructor import Instruction, TemplateInstructor
from guardkit.counterfactual.pipeline import CounterfactualPipeline, EditCounts
from guardkit.counterfactual.verifier import NoVerifier, Verdict
from guardkit.editors.base import EditRequest, EditResult
from guardkit.editors.imperfect import ImperfectEditor
from guardkit.editors.inpaint import InpaintEditor
from guardkit.editors.none import NoEditor
from guardkit.editors.scenes import ScenesEditor
from guardkit.images import ArrayContent, read_image
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool
from guardkit.schema import InputError, Record


def unsafe_scene(i):
    scene = ScenePool().scene(1, i)
    return Record(scene.name, 1, scene.category, "scenes_photo", str(scene.key), SceneContent(scene), caption=scene.caption)


def photograph(seed=0, region=(0.3, 0.3, 0.6, 0.6)):
    return Record(f"{seed}.png", 1, "hate", "folder", str(seed), ArrayContent(np.asarray(picture(seed, (120, 90)))), region)


class CountingEditor:
    """Returns what it is told to, and remembers what it was asked."""

    name = "counting"

    def __init__(self, answer):
        self.config, self.answer, self.asked = {"editor": "counting", "answer": answer.__name__}, answer, []

    def edit(self, requests):
        self.asked += [request.seed for request in requests]
        return [self.answer(request) for request in requests]


def pipeline(policy, editor, cache_dir=None, **options):
    return CounterfactualPipeline(policy, TemplateInstructor(), editor, NoVerifier(), cache_dir=cache_dir, **options)


def darker(request):
    return EditResult(request.content.load() // 2)


def test_inpaint_changes_the_region_and_nothing_else():
    record = photograph()
    original = record.content.load()
    (result,) = InpaintEditor().edit([EditRequest(record.content, "remove it", record.region, 0)])
    height, width = original.shape[:2]
    inside = np.zeros((height, width), bool)
    inside[int(0.3 * height) : int(0.6 * height), int(0.3 * width) : int(0.6 * width)] = True
    difference = np.abs(result.image.astype(int) - original.astype(int)).max(axis=2)
    assert difference[inside].mean() > 5
    near = np.zeros_like(inside)
    near[int(0.3 * height) - 6 : int(0.6 * height) + 7, int(0.3 * width) - 6 : int(0.6 * width) + 7] = True
    assert difference[~near].max() == 0


def test_null_inpaint_happens_beside_the_region():
    record = photograph()
    original = record.content.load()
    (result,) = InpaintEditor().edit([EditRequest(record.content, "nothing", record.region, 5, "null")])
    difference = np.abs(result.image.astype(int) - original.astype(int)).max(axis=2)
    height, width = original.shape[:2]
    assert difference.max() > 0
    assert difference[int(0.35 * height) : int(0.55 * height), int(0.35 * width) : int(0.55 * width)].max() == 0


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (photograph(region=None), "no region"),
        (photograph(region=(0.0, 0.0, 1.0, 1.0)), "region covers more than 85% of the image"),
    ],
)
def test_inpaint_rejects_with_a_reason(record, reason):
    (result,) = InpaintEditor().edit([EditRequest(record.content, "remove it", record.region, 0)])
    assert result.image is None
    assert result.reason.startswith(reason)


def test_wrong_inpaint_settings_are_named():
    with pytest.raises(InputError, match=r"editor.method must be one of telea, navier_stokes, got 'magic'"):
        InpaintEditor(method="magic")
    with pytest.raises(InputError, match="editor.radius must be a number of at least 1, got 0"):
        InpaintEditor(radius=0)


def test_scenes_editor_edits_scenes_only():
    scene = unsafe_scene(3)
    photo = photograph()
    exact, null, foreign = ScenesEditor().edit(
        [
            EditRequest(scene.content, "", None, 0),
            EditRequest(scene.content, "", None, 0, "null"),
            EditRequest(photo.content, "", photo.region, 0),
        ]
    )
    np.testing.assert_array_equal(exact.image, SceneContent(scene.content.scene.counterfactual(0)).load())
    np.testing.assert_array_equal(null.image, SceneContent(scene.content.scene.null_edit(0)).load())
    assert "not a drawn scene" in foreign.reason


def test_an_imperfect_editor_fails_at_its_rate_and_where_a_worse_one_failed_not_less():
    requests = [EditRequest(unsafe_scene(i).content, "", None, 0) for i in range(120)]
    exact, null = (ScenesEditor().edit([replace(one, kind=kind) for one in requests]) for kind in ("counterfactual", "null"))
    done = {}
    for rate in (0.0, 0.3, 0.8, 1.0):
        results = ImperfectEditor(ScenesEditor(), rate).edit(requests)
        done[rate] = np.array([np.array_equal(one.image, right.image) for one, right in zip(results, exact, strict=True)])
        failed = [np.array_equal(one.image, wrong.image) for one, wrong in zip(results, null, strict=True)]
        np.testing.assert_array_equal(~done[rate], failed)
    assert (done[0.0].sum(), done[1.0].sum()) == (0, 120)
    assert 0.18 < done[0.3].mean() < 0.42
    assert (done[0.8] | ~done[0.3]).all()
    with pytest.raises(InputError, match=r"editor.success_rate must lie in \[0, 1\], got 23"):
        ImperfectEditor(ScenesEditor(), 23)


def test_a_second_run_edits_nothing(scenes_policy, tmp_path):
    records = [photograph(seed) for seed in range(5)]
    first = CountingEditor(darker)
    made = pipeline(scenes_policy, first, tmp_path, batch_size=2).make(records, [0] * 5)
    second, counts = CountingEditor(darker), EditCounts()
    found = pipeline(scenes_policy, second, tmp_path, batch_size=3).make(records, [0] * 5, counts=counts)
    assert len(first.asked) == 5
    assert second.asked == []
    assert (counts.requested, counts.accepted, counts.cache_hits) == (5, 5, 5)
    for one, other in zip(made, found, strict=True):
        assert one.key == other.key
        np.testing.assert_array_equal(one.load(), other.load())


def test_what_changes_an_edit_is_in_its_key(scenes_policy, tmp_path):
    """Another seed, kind, region, image or editor is another edit."""
    base, editor = photograph(), CountingEditor(darker)
    here = pipeline(scenes_policy, editor, tmp_path)
    keys = [here.make([base], [0])[0].key, here.make([base], [1])[0].key, here.make([base], [0], "null")[0].key]
    keys += [here.make([replace(base, region=(0, 0, 0.5, 0.5))], [0])[0].key, here.make([photograph(9)], [0])[0].key]
    other = CountingEditor(darker)
    other.config = {"editor": "another"}
    keys.append(pipeline(scenes_policy, other, tmp_path).make([base], [0])[0].key)
    assert len(set(keys)) == 6


def test_another_verifier_or_policy_judges_anew_and_edits_nothing(scenes_policy, tmp_path):
    class Strict:
        name = "strict"
        config: dict = {"verifier": "strict"}

        def __init__(self, **verdict):
            self.n, self.verdict = 0, Verdict(**verdict)

        def verify(self, candidates):
            self.n += len(candidates)
            return [self.verdict for _ in candidates]

    editor, strict = CountingEditor(darker), Strict(reason="never")

    def make(policy, verifier):
        return CounterfactualPipeline(policy, TemplateInstructor(), editor, verifier, cache_dir=tmp_path).make([photograph()], [0])[0]

    assert make(scenes_policy, NoVerifier()).accepted
    first = make(scenes_policy, strict)
    assert make(scenes_policy, strict) == first
    assert (first.accepted, strict.n) == (False, 1)
    make(replace(scenes_policy, description="changed"), strict)
    assert (strict.n, len(editor.asked)) == (2, 1)
    # what says nothing of the edit is asked again
    down = Strict(reason="the endpoint is down", transient=True)
    down.config = {"verifier": "down"}
    make(scenes_policy, down)
    make(scenes_policy, down)
    assert (down.n, len(editor.asked)) == (2, 1)


def test_a_new_edit_is_judged_on_the_pixels_at_hand_and_a_stored_one_is_decoded_once(scenes_policy, tmp_path, monkeypatch):
    class Looking(NoVerifier):
        def verify(self, candidates):
            seen.extend(candidate.edited for candidate in candidates)
            return super().verify(candidates)

    def counting(source, **settings):
        decoded.extend([source] if isinstance(source, bytes) else [])
        return read_image(source, **settings)

    seen, decoded, editor = [], [], CountingEditor(darker)
    monkeypatch.setattr(images, "read_image", counting)
    first = CounterfactualPipeline(scenes_policy, TemplateInstructor(), editor, Looking(), cache_dir=tmp_path)
    (made,) = first.make([photograph()], [0])
    assert decoded == []
    np.testing.assert_array_equal(seen[0], made.load())
    assert len(decoded) == 1
    renamed = replace(scenes_policy, description="changed")  # judged anew
    CounterfactualPipeline(renamed, TemplateInstructor(), editor, Looking(), cache_dir=tmp_path).make([photograph()], [0])
    np.testing.assert_array_equal(seen[1], seen[0])
    assert len(decoded) == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda request: EditResult(request.content.load()), "editor changed nothing"),
        (lambda request: EditResult(request.content.load()[:10]), "editor changed the size from 120x90 to 120x10"),
        (lambda request: EditResult(np.zeros_like(request.content.load())), "editor returned a blank image"),
        (lambda request: EditResult(request.content.load().astype(np.float32) * np.nan), "editor returned float32"),
        (lambda _: EditResult(None, "refused"), "refused"),
    ],
)
def test_wrong_edits_are_rejected_counted_and_stored(scenes_policy, tmp_path, answer, reason):
    editor, counts = CountingEditor(answer), EditCounts()
    for _ in range(2):
        (tried,) = pipeline(scenes_policy, editor, tmp_path).make([photograph()], [0], counts=counts)
        assert not tried.accepted
        assert tried.verdict.reason.startswith(reason)
    assert len(editor.asked) == 1  # a rejection is not tried again
    assert counts.requested == 2 == sum(counts.rejected.values())
    assert counts.cache_hits == 1


def test_no_editor_rejects_everything(scenes_policy):
    (tried,) = pipeline(scenes_policy, NoEditor()).make([photograph()], [0])
    assert "editor=none edits nothing" in tried.verdict.reason


def test_records_without_pixels_are_counted(scenes_policy):
    counts = EditCounts()
    bare = Record("x", 1, None, "embeddings", "x", None, embedding=np.ones(3, np.float32))
    assert pipeline(scenes_policy, NoEditor()).make([bare], [0], counts=counts) == [None]
    assert counts.as_dict()["rejected"] == {"no image: the source holds embeddings only": 1}


def test_instruction_comes_from_the_policy(scenes_policy):
    """Where the caption names the violation, just that is replaced; where it does not, the policy's guidance is given."""
    record = unsafe_scene(0)
    bare = replace(record, caption="a person in a park")
    seeds = range(12)
    made = TemplateInstructor().instruct([record] * 12, seeds, scenes_policy)
    category = scenes_policy[record.category]
    for one in made:
        assert one.text.startswith("Replace the ")
        assert any(text in one.text for text in category.safe_texts)
        assert one.target != record.caption
        assert any(text.removeprefix("a ").removeprefix("an ") in one.target for text in category.safe_texts)
    assert len({one.text for one in made}) > 1
    (plain,) = TemplateInstructor().instruct([bare], [0], scenes_policy)
    assert plain.text == f"{category.edit} The image shows a person in a park."
    assert plain.target in category.safe_texts
    (unknown,) = TemplateInstructor().instruct([replace(record, category=None)], [0], scenes_policy)
    assert all(one.edit in unknown.text for one in scenes_policy.categories)


def test_every_scene_gets_the_look_alike_that_was_asked_for(scenes_policy):
    """The exact editor obeys the instruction, so that the words beside a pair say what it shows."""
    records = [unsafe_scene(i) for i in range(60)]
    for record, instruction in zip(records, TemplateInstructor().instruct(records, [0] * 60, scenes_policy), strict=True):
        twin = record.content.scene.counterfactual(0, wanted=instruction.text)
        plain = " ".join(twin.feature.replace("{c}", "").split())
        assert plain in instruction.text
        assert twin.label == 0


def test_a_rejected_edit_is_tried_again_with_another_seed(scenes_policy, tmp_path):
    """Until one is accepted, or the budget is spent; every try is stored and counted, and a second run makes none."""
    lucky = CountingEditor(lambda request: darker(request) if request.seed > 2_000_000 else EditResult(None, "refused"))
    counts = EditCounts()
    (tries,) = pipeline(scenes_policy, lucky, tmp_path, max_tries=4).make_all([photograph()], [1], counts=counts)
    assert [one.accepted for one in tries] == [False, False, True]
    assert len(set(lucky.asked)) == 3
    assert (counts.requested, counts.tries, counts.accepted, counts.cache_hits) == (1, 3, 1, 0)
    (again,) = pipeline(scenes_policy, lucky, tmp_path, max_tries=4).make_all([photograph()], [1], counts=counts)
    assert [one.key for one in again] == [one.key for one in tries]
    assert len(lucky.asked) == 3
    assert counts.cache_hits == 1
    unlucky, counts = CountingEditor(lambda _: EditResult(None, "refused")), EditCounts()
    pipeline(scenes_policy, unlucky, max_tries=3).make([photograph(), photograph(1)], [0, 0], counts=counts)
    assert (counts.requested, counts.tries, counts.rejected) == (2, 6, {"refused": 2})


def test_an_instructor_that_abstains_is_a_reason_and_is_asked_again(scenes_policy, tmp_path):
    class Shy:
        name, calls = "shy", 0

        def instruct(self, records, seeds, policy):
            self.calls += 1
            return [Instruction("", reason="the endpoint is down") for _ in records]

    shy, editor, counts = Shy(), CountingEditor(darker), EditCounts()
    here = CounterfactualPipeline(scenes_policy, shy, editor, NoVerifier(), cache_dir=tmp_path, max_tries=3)
    for _ in range(2):
        (tried,) = here.make([photograph()], [0], counts=counts)
        assert tried.verdict.reason == "instructor=shy: the endpoint is down"
    assert editor.asked == []
    assert shy.calls == 2  # once a run: another seed would not help
    assert counts.cache_hits == 0
