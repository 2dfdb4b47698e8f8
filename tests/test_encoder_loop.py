"""Encoders that are not open_clip's go through every command: embed, train, save, load, load from elsewhere, evaluate, sweep."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from conftest import picture
from tiny_models import STATED, write_clip, write_dinov2, write_onnx

from guardkit import GuardClassifier
from guardkit.schema import InputError

IMAGES = [np.asarray(picture(seed)) for seed in range(3)]
SCENES = ["source.n_train=60", "source.n_test=18", "encoder.device=cpu", "encoder.batch_size=16"]
TRAIN = [*SCENES, "data.n_unsafe=12", "trainer.max_epochs=4"]


def _transformers(write):
    def chosen(place):
        write(place)
        return [f"encoder.weights=local-dir:{place}"], "transformers"

    return chosen


def _onnx(place):
    write_onnx(place / "net.onnx")
    stated = [f"encoder.preprocess.{name}={value}" for name, value in STATED.items()]
    return [f"encoder.weights={place / 'net.onnx'}", *stated, "encoder.output=pooled"], "onnx"


KINDS = {"clip": _transformers(write_clip), "dinov2": _transformers(write_dinov2), "onnx": _onnx}


@pytest.fixture(scope="session")
def chosen(tmp_path_factory):
    """chosen("onnx"): a model's folder, and the settings that choose it."""
    made = {}

    def choose(name):
        if name not in made:
            place = tmp_path_factory.mktemp(name) / "model"
            place.mkdir()
            settings, kind = KINDS[name](place)
            made[name] = place, [f"encoder={kind}", *settings]
        return made[name]

    return choose


HEADS = [("clip", "linear"), ("clip", "prompt"), ("clip", "linear_texts"), ("dinov2", "linear_whitened"), ("onnx", "linear")]


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_a_guard_is_trained_saved_and_loaded(chosen, compose, tmp_path, name, head):
    from guardkit.runs.train import run

    place, settings = chosen(name)
    shutil.copytree(place, tmp_path / "here")
    settings = [one.replace(str(place), str(tmp_path / "here")) for one in settings]
    whitening = ["head.n_images=40"] if head == "linear_whitened" else []
    run(compose("train", *settings, *TRAIN, f"head={head}", *whitening, "experiment=unpaired"), {}, tmp_path / "run")
    guard = GuardClassifier.from_pretrained(tmp_path / "run")
    scores = [decision.score for decision in guard.predict(IMAGES)]
    assert all(0 <= score <= 1 for score in scores)
    # the model moves
    (tmp_path / "models/of/others").mkdir(parents=True)
    write_dinov2(tmp_path / "models/of/others")
    (tmp_path / "here").rename(tmp_path / "models/mine")
    with pytest.raises(InputError, match="could not be had where it was recorded .*give from_pretrained"):
        GuardClassifier.from_pretrained(tmp_path / "run")
    exact = tmp_path / "models/mine" / ("net.onnx" if name == "onnx" else "")
    for elsewhere in (tmp_path / "models", str(exact)):
        found = GuardClassifier.from_pretrained(tmp_path / "run", encoder=elsewhere, batch_size=2, device="cpu")
        assert found.encoder.batch_size == 2
        assert [decision.score for decision in found.predict(IMAGES)] == pytest.approx(scores, abs=1e-5)
    with pytest.raises(InputError, match="none of the .* below .* has these weights|holds no model"):
        GuardClassifier.from_pretrained(tmp_path / "run", encoder=tmp_path / "models/of")


@pytest.mark.parametrize("name", ["dinov2", "onnx"])
def test_it_embeds_sweeps_and_evaluates(chosen, compose, tmp_path, name):
    import json

    from guardkit.runs.embed import run as embed
    from guardkit.runs.evaluate import run as evaluate
    from guardkit.runs.sweep import run as sweep
    from guardkit.runs.train import run as train

    _, settings = chosen(name)
    assert embed(compose("embed", *settings, *SCENES), tmp_path / "embeddings")["rejected"] == 0
    manifest = json.loads((tmp_path / "embeddings/manifest.json").read_text())
    assert manifest["preprocessing"]["size"] == [32, 32]
    swept = ["sweep.sizes=[8]", "sweep.seeds=1", "sweep.arms=[unpaired,pairs_aug]", "sweep.n_resamples=100", "trainer.max_epochs=4"]
    swept += ["sweep.heads=[linear,mlp]"]
    assert sweep(compose("sweep", *settings, *SCENES, *swept), {}, tmp_path / "sweep").summary["engine"]["fits"] > 0
    train(compose("train", *settings, *TRAIN, "experiment=unpaired"), {}, tmp_path / "run")
    quick = [
        "robustness=pixels",
        "robustness.n_pixels=4",
        "robustness.edits=[jpeg]",
        "robustness.strengths=[1]",
        "robustness.noise_stds=[8]",
    ]
    quick += ["robustness.epsilons=[8]", "robustness.square_queries=4", "robustness.pgd_steps=4", "n_resamples=100"]
    report = evaluate(compose("evaluate", f"guard={tmp_path / 'run'}", "source.n_test=18", *quick), tmp_path / "report")
    assert {row["attack"] for row in report.summary["robustness"]} >= {"jpeg", "square" if name == "onnx" else "pgd"}


def test_a_head_of_texts_is_refused_before_anything_is_embedded(chosen, compose, tmp_path):
    from guardkit.runs.train import run

    _, settings = chosen("onnx")
    with pytest.raises(InputError, match="head=prompt needs an encoder that reads texts, and net.onnx does not; choose head=linear"):
        run(compose("train", *settings, *TRAIN, "head=prompt"), {}, tmp_path / "run")
    assert not (tmp_path / "run/guard").exists()
