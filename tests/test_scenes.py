"""The embedded world: deterministic, visible features, exact twins, the promised variety and shift."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from guardkit import InputError, Policy, ScenesSource
from guardkit.scenes.content import SceneContent
from guardkit.scenes.features import KINDS
from guardkit.scenes.stage import ACTORS, PLACES
from guardkit.scenes.world import CATEGORIES, RENDERINGS, TEST_ONLY_VARIANTS, ScenePool, draw, features, find_region


def outside(image, *regions, margin=7):
    """The pixels that no region covers."""
    size = image.shape[0]
    mask = np.ones(image.shape[:2], bool)
    for x_min, y_min, x_max, y_max in regions:
        mask[
            max(0, int(y_min * size) - margin) : int(y_max * size) + margin + 1,
            max(0, int(x_min * size) - margin) : int(x_max * size) + margin + 1,
        ] = False
    return image[mask].astype(int)


def test_the_world_is_as_rich_as_promised():
    assert len(CATEGORIES) == 9
    assert len(PLACES) >= 8
    assert len(ACTORS) >= 4
    for kind in KINDS.values():
        assert len(kind.unsafe) >= 3
        assert len(kind.safe) >= 3


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_same_seed_and_index_give_the_same_pixels(rendering):
    pool = ScenePool(rendering=rendering, seed=3)
    for label in (0, 1):
        again = ScenePool(rendering=rendering, seed=3).scene(label, 17)
        assert pool.scene(label, 17) == again
        np.testing.assert_array_equal(draw(pool.scene(label, 17)).image, draw(again).image)
    assert pool.scene(1, 17) != ScenePool(rendering=rendering, seed=4).scene(1, 17)


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_feature_is_visible_and_counterfactual_changes_nothing_else(rendering):
    pool = ScenePool("test", rendering=rendering)
    for i in range(60):
        scene = pool.scene(1, i)
        twin = scene.counterfactual()
        mine, theirs = draw(scene), draw(twin)
        x_min, y_min, x_max, y_max = mine.region
        assert max(x_max - x_min, y_max - y_min) >= 0.2, scene.words
        assert mine.region == find_region(scene)
        assert twin.label == 0
        assert twin.category == scene.category
        # what lies outside changes at most by the glow and blur of what lies inside
        difference = np.abs(outside(mine.image, mine.region, theirs.region) - outside(theirs.image, mine.region, theirs.region))
        assert difference.mean() < 0.5, scene.words
        assert np.abs(mine.image.astype(int) - theirs.image.astype(int)).max() > 30, (scene.words, twin.words)


def test_counterfactual_and_back_keep_category_and_seeds_choose_among_look_alikes():
    scene = ScenePool().scene(1, 5)
    assert scene.counterfactual().counterfactual().label == 1
    assert {scene.counterfactual(seed).feature for seed in range(30)} == set(KINDS[scene.category].safe)
    plain = next(one for one in (ScenePool().scene(0, i) for i in range(50)) if one.category is None)
    with pytest.raises(ValueError, match="has no counterfactual"):
        plain.counterfactual()


def test_null_edit_keeps_label_and_feature():
    scene = ScenePool().scene(1, 9)
    edited = scene.null_edit()
    assert (edited.label, edited.feature, edited.place) == (scene.label, scene.feature, scene.place)
    first, second = draw(scene), draw(edited)
    assert first.region == second.region
    assert (first.image != second.image).any()


def test_captions_name_things_and_never_a_verdict():
    pool = ScenePool()
    for label in (0, 1):
        for i in range(200):
            caption = pool.scene(label, i).caption
            assert "safe" not in caption
            assert "{" not in caption
            assert any(actor in caption for actor in ACTORS)


def test_test_only_variants_stay_out_of_training_pools():
    train = {ScenePool("train").scene(1, i).variant for i in range(400)}
    test = Counter(ScenePool("test").scene(1, i).variant for i in range(400))
    assert not train & set(TEST_ONLY_VARIANTS)
    assert all(test[variant] > 20 for variant in TEST_ONLY_VARIANTS)


@pytest.mark.parametrize(("split", "shift", "low", "high"), [("train", 0.0, 0.0, 0.2), ("train", 1.0, 0.99, 1.0), ("test", 1.0, 0.0, 0.2)])
def test_scene_shift_separates_places_in_training_pools_only(split, shift, low, high):
    pool = ScenePool(split, scene_shift=shift)
    counts = [Counter(pool.scene(label, i).place for i in range(600)) for label in (0, 1)]
    distance = sum(abs(counts[0][place] - counts[1][place]) for place in PLACES) / 1200
    assert low <= distance <= high


def test_every_nine_unsafe_scenes_cover_the_nine_categories():
    pool = ScenePool()
    for start in (0, 9, 90):
        assert {pool.scene(1, start + i).category for i in range(9)} == set(CATEGORIES)


def test_content_key_follows_the_description():
    scene = ScenePool().scene(1, 0)
    key = SceneContent(scene).key
    assert SceneContent(replace(scene)).key == key
    assert SceneContent(scene.counterfactual()).key != key
    assert SceneContent(scene, size=64).key != key
    assert SceneContent(scene, size=64).load().shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split must be one of train, test, got 'dev'"),
        ({"rendering": "oil"}, "rendering must be one of photo, generated"),
        ({"scene_shift": 1.5}, r"scene_shift must be a number in \[0, 1\], got 1.5"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScenePool(**arguments)


def test_policy_texts_are_the_features(scenes_policy):
    assert scenes_policy.category_names == CATEGORIES
    for label, field in ((1, "unsafe_texts"), (0, "safe_texts")):
        for phrase, category in features(label).items():
            nouns = phrase.replace("{c} ", "").replace(" {c}", "")
            assert any(text.endswith(nouns) for text in getattr(scenes_policy[category], field)), phrase


def test_a_forgotten_source_is_named_with_what_to_do():
    message = r"source=scenes \(the default\) draws scenes of nine categories, of which policy 'photos' lacks 9, 'hate' first; give the source of your own"
    with pytest.raises(InputError, match=message):
        ScenesSource(Policy.load("guardkit:photos"))
