"""Fetching an encoder: tiny models in a local cache of the Hub, in the files that real ones have, become folders that need no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, picture
from safetensors.torch import load_file, save_file
from tiny_models import write_clip, write_dinov2

from guardkit import InputError, OpenClipEncoder, TransformersEncoder, fetch_encoder
from guardkit.artifacts import shipped
from guardkit.folders import FINISHED, claim, is_unfinished, read_mark
from guardkit.runs.fetch import run

IMAGES = [np.asarray(picture(seed)) for seed in range(3)]
TEXTS = ["a red pistol", "A Hair Dryer, on a table!"]
ID, REPOSITORY = "hf-hub:someone/tiny", "models--someone--tiny"

# what a machine without a network does with the folder: nothing is cached there either
ELSEWHERE = """
import json, sys
import numpy as np
from hydra.utils import instantiate
settings, images, texts = json.load(sys.stdin)
encoder = instantiate(settings, device="cpu")
vectors = encoder.encode_images([np.asarray(image, np.uint8) for image in images])
print(json.dumps([encoder.fingerprint, vectors.tolist(), encoder.encode_texts(texts).tolist()]))
"""


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """Where the cache of the Hub keeps the files of someone/tiny."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # files that the cache lacks are asked for again and again
    refs = tmp_path / "hub" / REPOSITORY / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc")
    folder = tmp_path / "hub" / REPOSITORY / "snapshots/abc"
    folder.mkdir(parents=True)
    # it also remembers what was asked for and is not there
    missing = tmp_path / "hub" / REPOSITORY / ".no_exist/abc"
    missing.mkdir(parents=True)
    (missing / "config.json").touch()
    return folder


def write_open_clip(folder, seed=0):
    """As timm/ViT-B-16-SigLIP2 is on the Hub, with a tokenizer of its own; returns the model's configuration."""
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    tokenizer = {"hf_tokenizer_name": "someone/tiny", "tokenizer_kwargs": {"clean": "lower"}}
    text = {"context_length": 30, "vocab_size": 153, "width": 32, "heads": 2, "layers": 1} | tokenizer
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(embed_dim=32, vision_cfg=dict(vision), text_cfg=dict(text))
    save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shipped("guardkit:scenes_clip") / name, folder / name)
    return config, preprocess


def elsewhere(encoder, home):
    target = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
    given = json.dumps([{"_target_": target, **encoder.config}, [image.tolist() for image in IMAGES], TEXTS])
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=given, capture_output=True, text=True, cwd=ROOT, timeout=300,
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("write", "kind"), [(write_open_clip, OpenClipEncoder), (write_clip, TransformersEncoder)], ids=["open_clip", "transformers"]
)
def test_a_fetched_folder_gives_the_same_vectors_where_nothing_else_is(snapshot, tmp_path, write, kind):
    write(snapshot)
    fetched = kind(None, ID, device="cpu") if kind is OpenClipEncoder else kind(ID, device="cpu")
    encoder = fetch_encoder(fetched, tmp_path / "model")
    expected = fetched.fingerprint, fetched.encode_images(IMAGES), fetched.encode_texts(TEXTS)
    shutil.move(tmp_path / "model", tmp_path / "moved here")
    encoder = kind(**encoder.config | {"weights": f"local-dir:{tmp_path / 'moved here'}"}, device="cpu")
    fingerprint, images, texts = elsewhere(encoder, tmp_path / "empty")
    assert fingerprint == expected[0]  # so that a guard that was trained with the one is loaded with the other
    np.testing.assert_allclose(images, expected[1], atol=1e-6)
    np.testing.assert_allclose(texts, expected[2], atol=1e-6)


def test_the_command_fetches_by_tag_and_says_how_to_use_it(snapshot, tmp_path, compose, monkeypatch):
    import open_clip

    config, preprocess = write_open_clip(snapshot)
    place = tmp_path / "configs" / "tiny-test.json"
    place.parent.mkdir()
    place.write_text(json.dumps(config))
    open_clip.add_model_config(place)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-test", {"tag": {"hf_hub": "someone/tiny/", **preprocess}})
    try:
        cfg = compose("fetch", "encoder=siglip2_b16", "encoder.architecture=tiny-test", "encoder.weights=tag", "encoder.device=cpu")
        facts = run(cfg, tmp_path / "model")
        by_tag = OpenClipEncoder("tiny-test", "tag", device="cpu")
        copy = OpenClipEncoder(None, f"local-dir:{tmp_path / 'model'}", device="cpu")
        assert copy.fingerprint == by_tag.fingerprint
        assert facts["use it as"] == f"encoder=open_clip encoder.weights=local-dir:{tmp_path / 'model'}"
        assert facts["width"] == "32"
    finally:
        open_clip.factory._MODEL_CONFIG_PATHS.pop()
        open_clip.factory._MODEL_CONFIGS.pop("tiny-test")
    mark = read_mark(tmp_path / "model")
    assert (mark["command"], mark["state"]) == ("fetch", FINISHED)
    assert "open_clip_model.safetensors" in mark["files"]


def test_an_encoder_without_texts_is_fetched_too(snapshot, tmp_path):
    write_dinov2(snapshot)
    encoder = fetch_encoder(TransformersEncoder(ID, device="cpu"), tmp_path / "model")
    assert encoder.config["weights"] == f"local-dir:{tmp_path / 'model'}"
    assert not hasattr(encoder, "encode_texts")


def test_another_model_replaces_the_first_whole(snapshot, tmp_path):
    write_clip(snapshot)
    fetch_encoder(TransformersEncoder(ID, device="cpu"), tmp_path / "model")
    for path in snapshot.iterdir():
        path.unlink()
    write_open_clip(snapshot)
    fetch_encoder(OpenClipEncoder(None, ID, device="cpu"), tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir() if not path.name.startswith(".")} == {
        "open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("encoder", "kind"),
    [
        (lambda: OpenClipEncoder(None, "hf-hub:nobody/nothing"), "open_clip"),
        (lambda: OpenClipEncoder("ViT-B-16-SigLIP2", "webli"), "open_clip"),
        (lambda: TransformersEncoder("hf-hub:nobody/nothing"), "transformers"),
    ],
    ids=["open_clip", "tag", "transformers"],
)
def test_without_a_network_one_line_says_what_to_do_and_the_model_before_stays(snapshot, tmp_path, encoder, kind):
    write_clip(snapshot)
    fetch_encoder(TransformersEncoder(ID, device="cpu"), tmp_path / "model")
    before = load_file(tmp_path / "model/model.safetensors").keys()
    with pytest.raises(InputError, match=rf"run python -m guardkit.fetch .*copy its folder here and give encoder={kind} ") as caught:
        fetch_encoder(encoder(), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert load_file(tmp_path / "model/model.safetensors").keys() == before
    assert not is_unfinished(tmp_path / "model")


def test_folders_of_others_and_its_own_are_refused_before_anything_is_fetched(tmp_path):
    never = OpenClipEncoder(None, "hf-hub:nobody/nothing")
    with claim(tmp_path / "run", "train", {}, replaces=[]):
        pass
    with pytest.raises(InputError, match="holds the results of guardkit train, not of fetch; choose another output_dir"):
        fetch_encoder(never, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("words")
    with pytest.raises(InputError, match=r"holds files that guardkit fetch did not write \(thesis.txt\)"):
        fetch_encoder(never, tmp_path / "mine")
    fetch_encoder(OpenClipEncoder(None, "guardkit:scenes_clip", device="cpu"), tmp_path / "model")
    with pytest.raises(InputError, match="is read from .*model itself; choose another output_dir"):
        fetch_encoder(OpenClipEncoder(None, f"local-dir:{tmp_path / 'model'}", device="cpu"), tmp_path / "model")
    assert OpenClipEncoder(None, f"local-dir:{tmp_path / 'model'}", device="cpu").dim == 256


def test_a_copy_that_is_another_model_is_not_finished(snapshot, tmp_path, monkeypatch):
    write_open_clip(snapshot)
    fetched = OpenClipEncoder(None, ID, device="cpu")
    honest = OpenClipEncoder.save

    def save(self, folder):
        copy = honest(self, folder)
        weights = load_file(folder / "open_clip_model.safetensors")
        save_file(weights | {"visual.proj": weights["visual.proj"].flip(0)}, folder / "open_clip_model.safetensors")
        return copy

    monkeypatch.setattr(OpenClipEncoder, "save", save)
    with pytest.raises(InputError, match="is not the model hf-hub:someone/tiny .*image differs by up to .*text differs by up to 0"):
        fetch_encoder(fetched, tmp_path / "model")
    assert is_unfinished(tmp_path / "model")


def test_what_cannot_be_carried_elsewhere_is_refused(tmp_path, snapshot):
    class Foreign:
        name = "foreign"

    with pytest.raises(InputError, match="encoder foreign cannot be written into a folder"):
        fetch_encoder(Foreign(), tmp_path / "model")
    write_open_clip(snapshot)
    said = json.loads((snapshot / "open_clip_config.json").read_text())
    encoder = OpenClipEncoder(None, ID, device="cpu")
    assert encoder.dim == 32
    # a text tower that open_clip builds by an id of the Hub, as that of xlm-roberta-base-ViT-B-32
    said["model_cfg"]["text_cfg"]["hf_model_name"] = "someone/else"
    (snapshot / "open_clip_config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="the text tower of encoder hf-hub:someone/tiny is of another library"):
        encoder.save(tmp_path)
