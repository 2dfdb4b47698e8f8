"""Images that look to an encoder like nothing it knows are told, by one number of their vectors."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, picture

from guardkit.encoders.known import KNOWN, KnownImages, mean_cosine, unknown_images
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool
from guardkit.schema import InputError


@pytest.fixture(scope="module")
def scenes():
    return [SceneContent(ScenePool("test").scene(i % 2, i)).load() for i in range(30)]


@pytest.fixture(scope="module")
def pictures():
    return [np.asarray(picture(i, (64, 64))) for i in range(30)]


@pytest.fixture(scope="module")
def photos_encoder():
    return OpenClipEncoder(None, "guardkit:photos_clip")


def test_each_shipped_encoder_knows_its_own_world(scenes_encoder, photos_encoder, scenes, pictures):
    assert unknown_images(scenes_encoder, lambda: scenes_encoder.encode_images(scenes)) == []
    (said,) = unknown_images(scenes_encoder, lambda: scenes_encoder.encode_images(pictures))
    assert re.match(
        "encoder guardkit:scenes_clip knows drawn scenes, and these images look to it like something else: their mean cosine", said
    )
    assert "of images that it knows 0.98, and below 0.88" in said
    assert said.endswith("try another with encoder= (docs/encoders.md)")
    (said,) = unknown_images(photos_encoder, lambda: photos_encoder.encode_images(scenes))
    assert "knows photographs" in said
    assert "the mean cosine of two of them is 0.6" in said


def test_few_images_and_encoders_that_say_nothing_are_left_in_peace(scenes_encoder, pictures, tmp_path):
    few = scenes_encoder.encode_images(pictures[:10])
    assert unknown_images(scenes_encoder, lambda: few) == []

    def never():
        raise AssertionError("nobody needs the vectors")

    folder = tmp_path / "clip"
    shutil.copytree(ROOT / "checkpoints/scenes_clip", folder, ignore=shutil.ignore_patterns("*.py", KNOWN))
    assert unknown_images(OpenClipEncoder(None, f"local-dir:{folder}"), never) == []
    assert unknown_images(object(), never) == []


def test_a_wrong_description_is_one_line(tmp_path):
    right = json.loads((ROOT / "checkpoints/photos_clip" / KNOWN).read_text())
    for wrong in ({"statistic": "taste"}, {"limit": 3}, {"texts": ["a"]}, {"texts": None}, {"about": 1}):
        (tmp_path / KNOWN).write_text(json.dumps(right | wrong))
        with pytest.raises(InputError, match="must say about, statistic, normal, limit and texts"):
            KnownImages.read(tmp_path)
    (tmp_path / KNOWN).write_text(json.dumps(right))
    assert KnownImages.read(tmp_path).limit == 0.5


def test_the_mean_cosine_of_two_is_that_of_all_pairs():
    vectors = np.random.default_rng(0).normal(size=(12, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    by_hand = [vectors[i] @ vectors[j] for i in range(12) for j in range(i)]
    assert mean_cosine(vectors) == pytest.approx(np.mean(by_hand))


def test_train_and_evaluate_say_so(compose, pictures, tmp_path):
    from guardkit.runs.evaluate import run as evaluate
    from guardkit.runs.train import run

    rows = ["file_name,label"]
    for i in range(80):
        picture(100 + i, (64, 64)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'unsafe' if i % 2 else 'safe'}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    source = ["source=folder", f"source.root={tmp_path}", "policy=handled_objects"]
    trained = run(compose("train", "experiment=unpaired", "editor=none", *source, "trainer.max_epochs=5"), {}, tmp_path / "out")
    (said,) = [note for note in trained.metrics["notes"] if "knows drawn scenes" in note]
    assert f"note: {said}" in trained.table
    report = evaluate(compose("evaluate", f"guard={tmp_path / 'out/guard'}", *source, "split=test", "n_resamples=100"), tmp_path / "eval")
    assert any("knows drawn scenes" in note for note in report.summary["notes"])
