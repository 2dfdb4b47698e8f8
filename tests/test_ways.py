"""Ways to read images for one model: how far they are apart, and whose way counts when two meet."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from conftest import embed_records, picture

from guardkit import GuardClassifier, train_guard
from guardkit.artifacts import fingerprint, read_json, write_json
from guardkit.encoders.base import prepare_image
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.encoders.ways import drawn_images
from guardkit.heads import LinearHead
from guardkit.images import ArrayContent
from guardkit.schema import InputError, Record

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1 / 255] * 3}  # so that what is prepared are levels of 255
SIZES = [(224, 224), (225, 300), (301, 224), (500, 400), (90, 70), (640, 101), (1203, 811)]
IMAGES = drawn_images()


@pytest.fixture(scope="module")
def quick(scenes_encoder):
    return OpenClipEncoder(None, "guardkit:scenes_clip", backend="torchvision", device="cpu", batch_size=scenes_encoder.batch_size)


@pytest.fixture(scope="module")
def guard(scenes_policy, scenes_encoder):
    head = LinearHead(scenes_encoder.dim, len(scenes_policy.categories))
    torch.nn.init.normal_(head.linear.weight, std=3, generator=torch.Generator().manual_seed(0))
    return GuardClassifier(head, scenes_encoder, scenes_policy)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_they_are_at_most_two_levels_apart(mode, interpolation):
    said = {"size": [224, 224], "interpolation": interpolation, "resize_mode": mode, **PLAIN}
    for number, size in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        for image in (np.asarray(picture(number, size)), noise):
            pil, torchvision = (prepare_image(image, {**said, **how}).numpy() for how in ({}, {"backend": "torchvision"}))
            apart = np.abs(pil - torchvision)
            assert apart.max() <= 2.001, size
            assert apart.mean() < 0.1, size
            assert size != (224, 224) or not apart.any()


def test_nothing_moves_where_images_have_the_models_size(scenes_encoder, quick):
    drawn = [np.asarray(picture(seed, (64, 64))) for seed in range(4)]
    np.testing.assert_array_equal(scenes_encoder.encode_images(drawn), quick.encode_images(drawn))


def test_the_way_is_part_of_the_encoder_and_pillows_is_that_of_earlier_versions(scenes_encoder, quick):
    assert scenes_encoder.fingerprint.startswith("90e806c9f9ea")  # as guardkit has always called it
    assert "backend" not in scenes_encoder.preprocessing
    assert OpenClipEncoder(None, "guardkit:scenes_clip", backend="pil").fingerprint == scenes_encoder.fingerprint
    assert quick.preprocessing == {**scenes_encoder.preprocessing, "backend": "torchvision"}
    assert quick.fingerprint != scenes_encoder.fingerprint
    there_and_back = quick.reading_as(scenes_encoder.preprocessing)
    assert there_and_back.fingerprint == scenes_encoder.fingerprint
    assert there_and_back.model is quick.model
    np.testing.assert_array_equal(there_and_back.encode_images(IMAGES), scenes_encoder.encode_images(IMAGES))
    with pytest.raises(InputError, match="encoder.backend must be one of .*pil, torchvision, got 'cv2'"):
        OpenClipEncoder(None, "guardkit:scenes_clip", backend="cv2")


def test_a_guard_keeps_its_own_way(guard, quick, tmp_path, caplog):
    expected = [one.score for one in guard.predict(IMAGES)]
    folder = guard.save_pretrained(tmp_path / "guard")
    config = read_json(folder / "config.json", "a guard")
    del config["digest"], config["encoder"]["config"]["backend"]  # as earlier versions wrote it
    write_json(folder / "config.json", config | {"digest": fingerprint(config)})
    for encoder in (None, "guardkit:scenes_clip"):
        loaded = GuardClassifier.from_pretrained(folder, encoder=encoder, batch_size=guard.encoder.batch_size)
        assert [one.score for one in loaded.predict(IMAGES)] == expected
    fast = GuardClassifier(guard.head, quick, guard.policy).save_pretrained(tmp_path / "fast")
    for encoder in (None, "guardkit:scenes_clip"):
        loaded = GuardClassifier.from_pretrained(fast, encoder=encoder)
        assert loaded.encoder.fingerprint == quick.fingerprint
    assert not caplog.records


def test_a_guard_on_the_other_way_says_how_far_its_scores_moved(guard, quick, tmp_path, caplog):
    folder = guard.save_pretrained(tmp_path / "guard")
    with caplog.at_level(logging.WARNING):
        loaded = GuardClassifier.from_pretrained(folder, encoder=quick)
    assert loaded.encoder is quick
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(r"trained with backend=pil and is given guardkit:scenes_clip with backend=torchvision: on 8 drawn images", said)
    moved = np.abs(guard.probabilities(guard.encoder.encode_images(IMAGES)) - guard.probabilities(quick.encode_images(IMAGES))).max()
    assert f"moved by up to {moved:.4f};" in said
    assert 0 < moved < 0.05


def test_other_weights_are_refused_on_either_way(guard, tmp_path):
    folder = guard.save_pretrained(tmp_path / "guard")
    for backend in ("pil", "torchvision"):
        with pytest.raises(InputError, match="use the first, or train a guard on the second"):
            GuardClassifier.from_pretrained(folder, encoder=OpenClipEncoder(None, "guardkit:photos_clip", backend=backend))


def test_stored_embeddings_keep_their_way(scenes_policy, scenes_encoder, quick, tmp_path, caplog):
    from guardkit.data.sources.embeddings import EmbeddingsSource

    images = [np.asarray(picture(seed, (120, 90))) for seed in range(40)]
    category = scenes_policy.category_names[0]
    records = [
        Record(f"{i}.png", i % 2, category if i % 2 else None, "test", str(i), ArrayContent(image)) for i, image in enumerate(images)
    ]
    folder = tmp_path / "embeddings"
    embed_records(records, scenes_encoder, folder)
    assert "backend" not in read_json(folder / "manifest.json", "a manifest")["preprocessing"]
    settings = {"arm": "unpaired", "head": "linear", "n_unsafe": 8, "trainer": {"max_epochs": 1, "enable_progress_bar": False}}
    with caplog.at_level(logging.WARNING):
        fitted = train_guard(
            EmbeddingsSource(scenes_policy, str(folder)), scenes_policy, encoder=quick, output_dir=tmp_path / "run", **settings
        )
    assert fitted.guard.encoder.fingerprint == scenes_encoder.fingerprint
    assert "the source's embeddings are of encoder guardkit:scenes_clip with backend=pil, and so images are read here too" in caplog.text
