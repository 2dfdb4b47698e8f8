"""Tiny models with random weights in the files that transformers writes, against the library called by hand."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from tiny_models import FAMILIES, WITH_TEXTS, WITHOUT_TEXTS

from guardkit.encoders.transformers import TransformersEncoder
from guardkit.schema import InputError

IMAGES = [np.asarray(picture(seed, size)) for seed, size in enumerate([(90, 70), (64, 128), (61, 33), (32, 32)])]
TEXTS = ["a red pistol", "A Hair Dryer, on a table!", "a knife"]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """folder_of("clip"): a tiny model of that family, written once; not to be changed."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng():
                torch.manual_seed(7)
                FAMILIES[name](made[name])
        return made[name]

    return folder


def encoder_of(folder, **options):
    return TransformersEncoder(f"local-dir:{folder}", **({"device": "cpu", "batch_size": 3} | options))


def by_hand(folder, images, backend):
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder, backend=backend)([Image.fromarray(image) for image in images], return_tensors="pt")
    with torch.inference_mode():
        output = model.get_image_features(**pixels) if hasattr(model, "get_image_features") else model(**pixels)
    return output.pooler_output.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_the_library(folder_of, family):
    folder = folder_of(family)
    for backend in ("torchvision",) if family.startswith("dinov3") else ("pil", "torchvision"):
        encoder = encoder_of(folder, backend=backend)
        expected = by_hand(folder, IMAGES, backend)
        np.testing.assert_allclose(encoder.encode_images(IMAGES, normalize=False), expected, atol=1e-5)
        unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(encoder.encode_images(IMAGES), unit, atol=1e-5)
        assert encoder.dim == expected.shape[1]
        assert encoder.preprocessing["backend"] == backend


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_take_the_same_way(folder_of, family):
    encoder = encoder_of(folder_of(family), backend="torchvision")
    for image in IMAGES:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float().div(255).requires_grad_()
        vector = encoder.encode_pixels(pixels)
        assert (vector.detach().numpy() @ encoder.encode_images([image]).T).item() > 0.999
        vector[0, 0].backward()
        assert pixels.grad.abs().sum() > 0
    # what is prepared is only standardised
    settings = encoder.preprocessing
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    prepared = encoder.encode_pixels((encoder.preprocess(IMAGES[0]) * std + mean)[None], prepared=True)
    np.testing.assert_allclose(prepared.detach().numpy(), encoder.encode_images(IMAGES[:1]), atol=1e-5)


@pytest.mark.parametrize("family", WITH_TEXTS)
def test_texts_are_padded_as_the_model_was_trained(folder_of, family):
    from transformers import AutoModel, AutoTokenizer

    folder = folder_of(family)
    encoder, model, tokenizer = encoder_of(folder), AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if family == "clip":
        tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    else:
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer([text.lower() for text in TEXTS], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = {"input_ids": tokens["input_ids"]}
    with torch.inference_mode():
        expected = model.get_text_features(**tokens).pooler_output
    expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS[:1])[0], expected[0], atol=1e-5)  # whatever it is encoded with
    assert encoder.encode_texts([]).shape == (0, encoder.dim)
    assert np.abs(expected[0] - expected[2]).max() > 1e-3
    same = encoder.encode_texts(["a red pistol", "A RED Pistol"])
    np.testing.assert_array_equal(same[0], same[1])


def test_texts_beyond_the_context_are_named(folder_of, caplog):
    encoder = encoder_of(folder_of("siglip2"))
    encoder.encode_texts(["a knife", "a red toy pistol on the table of the photo of a dryer"])
    encoder.encode_texts(["a red toy pistol on the table of the photo of a dryer"])
    (record,) = caplog.records
    assert "reads the first 40 tokens of a text" in record.message
    assert "a red toy pistol" in record.message
    assert "a knife" not in record.message


@pytest.mark.parametrize("family", WITHOUT_TEXTS)
def test_dino_has_no_texts(folder_of, family, scenes_policy):
    from guardkit.heads import LinearHead, PromptHead

    encoder = encoder_of(folder_of(family))
    assert not hasattr(encoder, "encode_texts")
    with pytest.raises(InputError, match="head=prompt needs an encoder that reads texts, and .* does not; choose head=linear"):
        PromptHead.build(encoder, scenes_policy)
    assert LinearHead.build(encoder, scenes_policy).config["dim"] == encoder.dim


@pytest.mark.parametrize("family", FAMILIES)
def test_images_alone_are_cast_to_bfloat16(folder_of, family):
    folder = folder_of(family)
    plain, cast = encoder_of(folder), encoder_of(folder, dtype="bfloat16")
    assert cast.fingerprint not in (plain.fingerprint, encoder_of(folder, decode="reduced").fingerprint)
    here, there = plain.encode_images(IMAGES), cast.encode_images(IMAGES)
    assert 1e-6 < np.abs(here - there).max() < 0.05
    assert (here * there).sum(axis=1).min() > 0.99
    assert {value.dtype for value in cast.model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    if family in WITH_TEXTS:
        np.testing.assert_array_equal(cast.encode_texts(["a hand"]), plain.encode_texts(["a hand"]))
    pixels = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cast.encode_pixels(pixels), plain.encode_pixels(pixels))


@pytest.mark.parametrize(("family", "dtype"), [("clip", "float32"), ("dinov3_vit", "float32"), ("clip", "bfloat16")])
def test_a_vector_does_not_depend_on_its_neighbours(folder_of, family, dtype):
    encoder = encoder_of(folder_of(family), batch_size=7, dtype=dtype)
    images = [np.asarray(picture(seed)) for seed in range(11)]
    alone = [encoder.encode_images([image], fixed_batch=True)[0] for image in images]
    np.testing.assert_array_equal(encoder.encode_images(images, fixed_batch=True), alone)
    np.testing.assert_array_equal(encoder.encode_images(images[::-1], fixed_batch=True)[::-1], alone)


def test_the_same_files_are_the_same_encoder_wherever_they_lie(folder_of, tmp_path, monkeypatch):
    here = encoder_of(folder_of("clip"))
    snapshot = tmp_path / "hub/models--someone--clip/snapshots/abc"
    shutil.copytree(folder_of("clip"), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = TransformersEncoder("hf-hub:someone/clip", device="cpu")
    assert hub.fingerprint == here.fingerprint == TransformersEncoder(str(snapshot)).fingerprint
    np.testing.assert_array_equal(hub.encode_texts(TEXTS), here.encode_texts(TEXTS))
    assert hub.config == {"weights": "hf-hub:someone/clip", "backend": None, "decode": "full", "dtype": "float32"}
    with pytest.raises(InputError, match="hf-hub:nobody/nothing could not be fetched from the Hub .*local-dir"):
        TransformersEncoder("hf-hub:nobody/nothing").fingerprint  # noqa: B018


def changed(folder_of, family, tmp_path, file, change):
    """A copy of a model's folder with one JSON file changed."""
    folder = tmp_path / "changed"
    shutil.copytree(folder_of(family), folder, dirs_exist_ok=True)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


def test_everything_that_changes_a_vector_is_in_the_fingerprint(folder_of, tmp_path):
    prints = [encoder_of(folder_of("clip"), backend=backend).fingerprint for backend in ("pil", "torchvision")]
    for file, change in [
        ("config.json", lambda config: config["vision_config"].update(hidden_act="gelu")),
        ("preprocessor_config.json", lambda config: config.update(resample=2)),
        ("preprocessor_config.json", lambda config: config.update(image_std=[0.3, 0.3, 0.3])),
        ("preprocessor_config.json", lambda config: config.update(size=40)),
    ]:
        prints.append(encoder_of(changed(folder_of, "clip", tmp_path, file, change)).fingerprint)
        shutil.rmtree(tmp_path / "changed")
    assert len(set(prints)) == len(prints)


def test_one_file_that_says_more_or_less_is_the_same_model(folder_of, tmp_path):
    def drop(config):
        config.pop("transformers_version")
        config["architectures"] = ["Other"]

    assert encoder_of(changed(folder_of, "clip", tmp_path, "config.json", drop)).fingerprint == encoder_of(folder_of("clip")).fingerprint


def test_processors_of_the_newer_layout_are_read(folder_of, tmp_path):
    """processor_config.json holds the image processor since transformers 5."""
    folder = tmp_path / "m"
    shutil.copytree(folder_of("siglip2"), folder)
    inner = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner, "processor_class": "SiglipProcessor"}))
    assert encoder_of(folder).fingerprint == encoder_of(folder_of("siglip2")).fingerprint


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("local-dir:/nowhere", "/nowhere is no folder here; give local-dir:FOLDER, or hf-hub:ORG/NAME"),
        ("", "encoder.weights must be hf-hub:ORG/NAME or local-dir:FOLDER, got ''"),
        (None, "encoder.weights must be hf-hub:ORG/NAME or local-dir:FOLDER, got None"),
    ],
)
def test_wrong_places_are_named_at_once(weights, message):
    with pytest.raises(InputError, match=message):
        TransformersEncoder(weights)


def test_a_folder_of_something_else_is_named(tmp_path, folder_of):
    with pytest.raises(InputError, match="holds no config.json"):
        encoder_of(tmp_path)
    with pytest.raises(InputError, match="encoder.backend must be one of null, pil, torchvision, got 'slow'"):
        encoder_of(folder_of("clip"), backend="slow")
    with pytest.raises(InputError, match="encoder.backend of dinov3_vit must be torchvision, got 'pil'"):
        encoder_of(folder_of("dinov3_vit"), backend="pil").dim  # noqa: B018


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.update(model_type="bert"), "describes a model of type 'bert', and encoder=transformers takes clip"),
        ("config.json", lambda c: c.pop("model_type"), "describes a model of type None"),
        ("config.json", lambda c: c.update(model_type="siglip2"), "describes SigLIP 2 for images of any shape .NaFlex"),
        (
            "config.json",
            lambda c: c.update(model_type="mine", auto_map={"AutoModel": "mine.Model"}),
            "describes a model of type 'mine', .* code that comes with a model is never run",
        ),
        ("config.json", lambda c: c["vision_config"].update(image_size=64), "could not be loaded"),
        ("config.json", lambda c: c["vision_config"].update(num_hidden_layers=3), "could not be loaded .*the weights lack vision_model"),
        ("preprocessor_config.json", lambda c: c.update(size=64, crop_size=64), "could not be loaded"),
        ("preprocessor_config.json", lambda c: c.update(do_center_crop=False), "must make images of one size"),
        ("preprocessor_config.json", lambda c: c.update(do_normalize=False), "must resize, divide by 255 and standardise"),
        ("preprocessor_config.json", lambda c: c.update(resample=1), "must resize with bilinear or bicubic"),
        ("preprocessor_config.json", lambda c: c.update(crop_size=48), "must crop at most what it has resized to"),
    ],
)
def test_files_that_do_not_fit_are_named(folder_of, tmp_path, file, change, message):
    with pytest.raises(InputError, match=message) as caught:
        encoder_of(changed(folder_of, "clip", tmp_path, file, change)).dim  # noqa: B018
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights in safetensors"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "holds no weights in safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half a file"), "could not be loaded"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "could not be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    ],
)
def test_damaged_folders_are_named(folder_of, tmp_path, spoil, message):
    folder = tmp_path / "m"
    shutil.copytree(folder_of("clip"), folder)
    encoder = encoder_of(folder)
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        encoder.dim  # noqa: B018
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_named(folder_of, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(folder_of("clip"), folder)
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="give vectors that are not finite"):
        encoder_of(folder).dim  # noqa: B018


def test_texts_without_a_tokenizer_say_so(folder_of, tmp_path, monkeypatch):
    folder = tmp_path / "m"
    shutil.copytree(folder_of("siglip"), folder)
    monkeypatch.setattr("guardkit.encoders.transformers.find_spec", lambda name: None)
    with pytest.raises(InputError, match="need SentencePiece; install it with: pip install sentencepiece"):
        encoder_of(folder).encode_texts(TEXTS)
    monkeypatch.undo()
    (folder / "spiece.model").unlink()
    with pytest.raises(InputError, match="the tokenizer of encoder .* could not be loaded"):
        encoder_of(folder).encode_texts(TEXTS)


def test_copies_encode_alike(folder_of):
    encoder = encoder_of(folder_of("clip"))
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        np.testing.assert_array_equal(twin.encode_images(IMAGES), encoder.encode_images(IMAGES))
        np.testing.assert_array_equal(twin.encode_texts(TEXTS), encoder.encode_texts(TEXTS))


def test_a_fetched_model_is_pickled_by_its_id(folder_of, tmp_path, monkeypatch):
    """Another machine has it in another place."""
    for name in ("one", "two"):
        snapshot = tmp_path / name / "models--someone--clip/snapshots/abc"
        shutil.copytree(folder_of("clip"), snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "one"))
    encoder = TransformersEncoder("hf-hub:someone/clip", device="cpu")
    expected, stored = encoder.encode_images(IMAGES), pickle.dumps(encoder)
    shutil.rmtree(tmp_path / "one")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "two"))
    np.testing.assert_array_equal(pickle.loads(stored).encode_images(IMAGES), expected)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_never_run(folder_of, tmp_path, file):
    classes = {"AutoConfig": "mine.A", "AutoModel": "mine.A", "AutoImageProcessor": "mine.A", "AutoTokenizer": ["mine.A", "mine.A"]}
    folder = changed(folder_of, "clip", tmp_path, file, lambda config: config.update(auto_map=classes))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\nclass A: pass\n")
    encoder = encoder_of(folder)
    np.testing.assert_array_equal(encoder.encode_images(IMAGES), encoder_of(folder_of("clip")).encode_images(IMAGES))
    np.testing.assert_array_equal(encoder.encode_texts(TEXTS), encoder_of(folder_of("clip")).encode_texts(TEXTS))
    assert not (tmp_path / "was_run").exists()
