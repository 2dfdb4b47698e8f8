"""Vision-language models as frozen encoders: every family is real, built tiny and at random, saved, and loaded like any other."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import picture
from tiny_models import VLMS, chat_template, write_clip

from guardkit import GuardClassifier, InputError, Policy
from guardkit.encoders.base import reads_texts
from guardkit.encoders.vlm import VLMEncoder

PROMPT = "Is this image safe or unsafe ?"
IMAGES = [np.asarray(picture(seed)) for seed in range(5)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> the folder of a tiny model with random weights."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                VLMS[name](made[name])
        return made[name]

    return folder


def encoder(folder, **settings):
    return VLMEncoder(str(folder), **{"prompt": PROMPT, "device": "cpu", **settings})


# PaliGemma's processor in transformers 5.23, with numpy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", VLMS)
def test_the_state_says_what_the_model_would_answer(folders, name):
    """Against the model's own logits, from a copy that nobody changed."""
    from transformers import AutoModelForImageTextToText

    one = encoder(folders(name))
    vectors = one.encode_images(IMAGES)
    assert vectors.shape == (5, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    whole = AutoModelForImageTextToText.from_pretrained(folders(name), dtype=torch.float32).eval()
    inputs = one._inputs(whole, torch.stack([one.preprocess(image) for image in IMAGES]))
    with torch.inference_mode():
        logits = whole(**inputs).logits[:, -1][:, one.tokens_of(["safe", "unsafe"])].numpy()
    cap = getattr(whole.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = cap * np.arctanh(logits / cap)
    mine = vectors @ one.readout(["safe", "unsafe"]).T * one.dim**0.5
    assert np.abs(logits).max() > 0.05
    np.testing.assert_allclose(mine, logits, rtol=2e-3, atol=2e-4)


def test_a_vector_does_not_depend_on_its_company_or_copy(folders):
    one = encoder(folders("smolvlm"))
    alone, together = one.encode_images(IMAGES[:1], fixed_batch=True), one.encode_images(IMAGES, fixed_batch=True)
    assert np.array_equal(alone[0], together[0])
    copied = pickle.dumps(one)
    assert len(copied) < 2000  # no weights travel with it
    again = pickle.loads(copied)
    assert again.fingerprint == one.fingerprint
    assert np.array_equal(again.encode_images(IMAGES), one.encode_images(IMAGES))
    moved = VLMEncoder(**one.config, device="cpu")
    assert moved.fingerprint == one.fingerprint


def test_whatever_changes_a_vector_changes_the_fingerprint(folders, tmp_path):
    plain = encoder(folders("smolvlm"))
    other = tmp_path / "other"
    shutil.copytree(folders("smolvlm"), other)
    said = json.loads((other / "processor_config.json").read_text())
    said["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    (other / "processor_config.json").write_text(json.dumps(said))
    variants = [
        plain,
        encoder(folders("smolvlm"), prompt="Is it red ?"),
        encoder(folders("smolvlm"), layer=1),
        encoder(folders("smolvlm"), dtype="bfloat16"),
        encoder(folders("smolvlm"), prompt="{policy}", rules="Is it red ?"),
        encoder(other),
    ]
    assert len({one.fingerprint for one in variants[:5]}) == 4  # a policy's text counts as the prompt that it makes
    assert variants[4].fingerprint == variants[1].fingerprint
    assert variants[5].fingerprint != plain.fingerprint
    assert not np.allclose(variants[2].encode_images(IMAGES), plain.encode_images(IMAGES), atol=1e-3)


def test_special_tokens_in_a_policy_announce_no_image(folders):
    one = encoder(folders("smolvlm"), prompt="{policy} ?", rules="<image> is safe </s>")
    assert one.encode_images(IMAGES[:1]).shape == (1, 32)


def test_what_it_cannot_do_is_said(folders, scenes_policy):
    from guardkit.heads import PromptHead

    one = encoder(folders("smolvlm"))
    assert not reads_texts(one)
    with pytest.raises(InputError, match="needs an encoder that reads texts, and .* does not; choose head=linear"):
        PromptHead.build(one, scenes_policy)


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


def without_image(folder):
    (folder / "chat_template.jinja").write_text(chat_template(""))


def with_adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}')


def short_context(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 12
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (without_template, {}, "has no chat template; choose a model that was tuned to follow instructions"),
        (without_image, {}, "image"),
        (short_context, {}, r"image and prompt are \d+ tokens, and .* reads 12 \(its context length\); shorten encoder.prompt"),
        (short_context, {"prompt": "safe " * 10**5}, r"are 1000\d+ tokens, and .* reads 12"),  # told before that many are run
        (with_adapter, {}, "holds an adapter of a model; give the model itself, whole and without adapter_config.json beside it"),
        (None, {"layer": 3}, "encoder.layer must be from 1 to 2, the layers of .*, got 3"),
        (None, {"prompt": "a {policy}"}, "encoder.prompt has a place for a policy, {policy}, and was given none"),
        (None, {"adapter": "/nowhere"}, "adapter_config.json"),
    ],
)
def test_what_is_wrong_is_one_line(folders, tmp_path, spoil, settings, message):
    folder = folders("smolvlm")
    if spoil is not None:
        folder = shutil.copytree(folder, tmp_path / "spoiled")
        spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        _ = encoder(folder, **settings).fingerprint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " "}, "encoder.prompt must be a text"),
        ({"layer": 0}, "encoder.layer"),
        ({"image_size": 0}, "encoder.image_size"),
        ({"weights": "x" * 5000}, "encoder.weights: x+ … x+ is no folder here"),
        ({"rules": ["x"]}, r"encoder.rules must be a text or null, got \['x'\]"),
        ({"adapter": 5}, "encoder.adapter must be a text or null, got 5"),
        ({"dtype": "int8"}, "encoder.dtype must be"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(folders, settings, message):
    with pytest.raises(InputError, match=message):
        VLMEncoder(**{"weights": str(folders("smolvlm")), **settings})


def test_another_kind_of_model_is_refused(tmp_path):
    write_clip(tmp_path)
    with pytest.raises(InputError, match="could not be loaded on cpu"):
        _ = encoder(tmp_path).fingerprint


def test_words_of_several_tokens_are_named(folders):
    with pytest.raises(InputError, match=r"does not write allowed and forbidden as one token each.*'allowed' is .*; choose other words"):
        encoder(folders("smolvlm")).tokens_of(["allowed", "forbidden"])
    with pytest.raises(InputError, match="and as different ones"):
        encoder(folders("smolvlm")).tokens_of(["safe", "safe"])


def test_a_probe_on_states_is_a_guard_like_any_other(folders, train, tmp_path):
    folder = folders("smolvlm")
    policy_in_prompt = ["encoder=vlm", f"encoder.weights={folder}", "encoder.prompt='{policy} is it safe ?'", "encoder.device=cpu"]
    with pytest.raises(InputError, match="context length"):  # the scenes' rules are longer than 256 tokens
        train(*policy_in_prompt, "head=linear", "cache_dir=null")
    report = train("encoder=vlm", f"encoder.weights={folder}", "encoder.prompt='Is it red ?'", "head=linear", "cache_dir=null")
    assert report.guard.encoder.prompt == "Is it red ?"
    elsewhere = shutil.copytree(folder, tmp_path / "below" / "model")
    loaded = GuardClassifier.from_pretrained(report.folder / "guard", encoder=elsewhere.parent)  # found by its weights
    assert [one.score for one in loaded.predict(IMAGES)] == [one.score for one in report.guard.predict(IMAGES)]
    heat = loaded.explain(IMAGES[0])
    assert heat.method == "occlusion"


def test_the_runs_policy_is_told_to_the_encoder(folders, compose):
    from guardkit.runs.objects import encoder as made

    policy = Policy.load("guardkit:handled_objects")
    cfg = compose("train", "encoder=vlm", f"encoder.weights={folders('smolvlm')}")
    one = made(cfg, policy)
    assert one.rules == policy.rules()
    assert policy.category_names[0] in one.rules
    assert one.for_policy(Policy.load("guardkit:scenes")).rules != one.rules


def test_it_is_fetched_whole_and_without_a_policy(folders, compose, tmp_path):
    from guardkit.runs.fetch import run

    plain = ["encoder=vlm", f"encoder.weights=local-dir:{folders('smolvlm')}"]
    said = run(compose("fetch", *plain), tmp_path / "model")  # its prompt has a place for a policy, which is nobody's yet
    assert said["use it as"] == f"encoder=vlm encoder.weights=local-dir:{tmp_path / 'model'}"
    said = run(compose("fetch", *plain, "encoder.prompt='Is it red ?'"), tmp_path / "model")
    assert said["use it as"] == f"encoder=vlm encoder.weights=local-dir:{tmp_path / 'model'} 'encoder.prompt=Is it red ?'"
    assert encoder(tmp_path / "model").fingerprint == encoder(folders("smolvlm")).fingerprint


def test_loading_says_nothing(folders, tmp_path, capfd):
    """Neither of layers that were not sharded, nor of tokens that no text has."""
    folder = shutil.copytree(folders("smolvlm"), tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["bos_token_id"] = 10**6
    (folder / "config.json").write_text(json.dumps(config))
    _ = encoder(folder).fingerprint
    said = "".join(capfd.readouterr())
    assert "sharded" not in said
    assert "bos_token_id" not in said
