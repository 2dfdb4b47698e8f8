"""Encoders: every way to name weights, against open_clip called by hand; differentiable; refusing to guess."""

from __future__ import annotations

import json
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from safetensors.torch import save_file

from guardkit.artifacts import shipped
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.schema import InputError

IMAGES = [np.asarray(picture(seed, size)) for seed, size in enumerate([(90, 70), (64, 128), (300, 200)])]
SIGLIP = {"size": [224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
OPENAI = {
    "size": [224, 224],
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def by_hand(model, transform, images):
    with torch.inference_mode():
        vectors = model.encode_image(torch.stack([transform(Image.fromarray(image)) for image in images]))
    return torch.nn.functional.normalize(vectors, dim=-1).numpy()


def write_hub_folder(folder, architecture, preprocess, half=False):
    """Random weights in the files that a model on the Hub has; returns the model."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(architecture, pretrained=None, force_preprocess_cfg=preprocess).eval()
    folder.mkdir(parents=True)
    state = {name: (value.half() if half else value).contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model


def make_shallow(monkeypatch, architecture):
    """Two layers of a tower are as many as twelve to what reads them, and a thousand words as many as 256,000."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    config["text_cfg"] |= {"layers": 2, "vocab_size": 1000}
    if "layers" in config["vision_cfg"]:
        config["vision_cfg"]["layers"] = 2
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "preprocess"), [("ViT-B-32", OPENAI), ("ViT-L-14-quickgelu", OPENAI), ("ViT-B-16-SigLIP2", SIGLIP)]
)
def test_real_architectures_load_from_hub_layouts_and_agree_with_open_clip(tmp_path, monkeypatch, architecture, preprocess):
    import open_clip

    make_shallow(monkeypatch, architecture)
    snapshot = tmp_path / "hub/models--someone--model/snapshots/abc"
    model = write_hub_folder(snapshot, architecture, preprocess, half=architecture.startswith("ViT-L"))
    refs = tmp_path / "hub/models--someone--model/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    model.load_state_dict(model.half().float().state_dict() if architecture.startswith("ViT-L") else model.state_dict())
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**{**preprocess, "size": tuple(preprocess["size"])}), is_train=False
    )
    expected = by_hand(model, transform, IMAGES[:2])
    del model
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    weights = str(snapshot / "open_clip_model.safetensors")
    ways = [(None, f"local-dir:{snapshot}", None), (architecture, weights, preprocess)]
    if architecture == "ViT-B-32":
        ways.append((None, "hf-hub:someone/model", None))
    prints = set()
    for name, where, stated in ways:
        encoder = OpenClipEncoder(name, where, preprocess=stated, device="cpu", batch_size=4)
        np.testing.assert_allclose(encoder.encode_images(IMAGES[:2]), expected, atol=2e-6)
        assert encoder.preprocessing == preprocess
        prints.add(encoder.fingerprint)
        del encoder
    assert len(prints) == 1  # the same weights and preprocessing are the same encoder, wherever they lay


def test_the_shipped_encoder_agrees_with_open_clip(scenes_encoder):
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{shipped('guardkit:scenes_clip')}")
    np.testing.assert_allclose(scenes_encoder.encode_images(IMAGES), by_hand(model.eval(), transform, IMAGES), atol=1e-6)
    texts = ["a pistol", "a hair dryer"]
    with torch.inference_mode():
        expected = model.encode_text(open_clip.get_tokenizer(f"local-dir:{shipped('guardkit:scenes_clip')}")(texts), normalize=True).numpy()
    np.testing.assert_allclose(scenes_encoder.encode_texts(texts), expected, atol=1e-6)
    assert scenes_encoder.dim == 256


def test_the_shipped_encoder_knows_its_world(scenes_encoder):
    """A small sample of what its model card measures: text matching tells an object from its look-alike."""
    from guardkit.scenes.content import SceneContent
    from guardkit.scenes.world import ScenePool

    scenes = [ScenePool("test", seed=9).scene(1, i) for i in range(60)]
    twins = [scene.counterfactual() for scene in scenes]
    images = scenes_encoder.encode_images([SceneContent(scene).load() for scene in scenes])
    own = (images * scenes_encoder.encode_texts([scene.words for scene in scenes])).sum(axis=1)
    rival = (images * scenes_encoder.encode_texts([twin.words for twin in twins])).sum(axis=1)
    assert (own > rival).mean() > 0.85


def test_pixels_are_differentiable_and_agree_with_images(scenes_encoder):
    from guardkit.scenes.content import SceneContent
    from guardkit.scenes.world import ScenePool

    for image in (SceneContent(ScenePool().scene(1, 0)).load(), IMAGES[0], IMAGES[1]):
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float().div(255).requires_grad_()
        vector = scenes_encoder.encode_pixels(pixels)
        assert (vector.detach().numpy() @ scenes_encoder.encode_images([image]).T).item() > 0.999
        vector[0, 0].backward()
        assert torch.isfinite(pixels.grad).all()
        assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in scenes_encoder.model.parameters())


def test_pixels_are_differentiable_whatever_was_asked_first():
    encoder = OpenClipEncoder(None, "guardkit:scenes_clip")
    with torch.inference_mode():
        encoder.encode_texts(["a photo of a dog"])
    pixels = torch.rand(1, 3, 64, 64).requires_grad_()
    encoder.encode_pixels(pixels)[0, 0].backward()
    assert pixels.grad.abs().sum() > 0


def test_vectors_come_as_the_model_gives_them_on_request(scenes_encoder):
    raw = scenes_encoder.encode_images(IMAGES, normalize=False)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.1
    np.testing.assert_allclose(raw / lengths, scenes_encoder.encode_images(IMAGES), atol=1e-6)
    with torch.inference_mode():
        pixels = torch.rand(2, 3, 64, 64)
        unit, whole = scenes_encoder.encode_pixels(pixels), scenes_encoder.encode_pixels(pixels, normalize=False)
    torch.testing.assert_close(whole / whole.norm(dim=1, keepdim=True), unit)
    assert (whole.norm(dim=1) - 1).abs().min() > 0.1


def test_a_vector_does_not_depend_on_its_neighbours(scenes_encoder):
    images = [np.asarray(picture(seed)) for seed in range(20)]
    alone = [scenes_encoder.encode_images([image], fixed_batch=True)[0] for image in images]
    np.testing.assert_array_equal(scenes_encoder.encode_images(images, fixed_batch=True), alone)
    np.testing.assert_array_equal(scenes_encoder.encode_images(images[::-1], fixed_batch=True)[::-1], alone)


def test_preprocessing_is_part_of_the_fingerprint(scenes_encoder, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(shipped("guardkit:scenes_clip"), other)
    same = OpenClipEncoder(None, f"local-dir:{other}")
    assert same.fingerprint == scenes_encoder.fingerprint
    config = json.loads((other / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["std"] = [0.3, 0.3, 0.3]
    (other / "open_clip_config.json").write_text(json.dumps(config))
    assert OpenClipEncoder(None, f"local-dir:{other}").fingerprint != scenes_encoder.fingerprint


@pytest.mark.parametrize(
    ("architecture", "weights", "preprocess", "message"),
    [
        (None, "guardkit:nothing", None, "ships no model 'nothing'; it ships .*scenes_clip"),
        (None, "local-dir:/nowhere", None, "/nowhere is not a folder; python -m guardkit.fetch"),
        ("ViT-B-32", "guardkit:scenes_clip", None, "encoder.architecture must be null"),
        ("ViT-B-32", "/nowhere/model.safetensors", OPENAI, "does not exist"),
        ("ViT-B-32", "openai", OPENAI, "encoder.preprocess belongs to a bare weights file only"),
        (None, "", None, "encoder.weights must be a pretrained tag"),
    ],
)
def test_wrong_arguments_are_named_at_once(architecture, weights, preprocess, message):
    with pytest.raises(InputError, match=message):
        OpenClipEncoder(architecture, weights, preprocess=preprocess)


@pytest.mark.parametrize(
    ("architecture", "weights", "message"),
    [
        ("ViT-B-33", "openai", "knows no architecture 'ViT-B-33'; close: .*ViT-B-32"),
        ("ViT-B-32", "opnai", "knows no weights 'opnai' of ViT-B-32; it knows .*openai"),
        (None, "hf-hub:nobody/no-such-model", "could not be loaded .*local-dir"),
    ],
)
def test_what_open_clip_does_not_know_is_named_when_needed(architecture, weights, message):
    encoder = OpenClipEncoder(architecture, weights)
    with pytest.raises(InputError, match=message):
        encoder.encode_images(IMAGES[:1])


def test_a_bare_file_needs_its_preprocessing(tmp_path):
    path = tmp_path / "siglip2.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="a file does not say, and a wrong guess goes unnoticed"):
        OpenClipEncoder("ViT-B-16-SigLIP2", str(path))
    with pytest.raises(InputError, match="encoder.architecture is needed"):
        OpenClipEncoder(None, str(path), preprocess=SIGLIP)
    with pytest.raises(InputError, match="missing: resize_mode, std, unknown: sdt"):
        OpenClipEncoder(
            "ViT-B-16-SigLIP2", str(path), preprocess={"size": 224, "mean": [0.5] * 3, "sdt": [0.5] * 3, "interpolation": "bicubic"}
        )


def test_a_folder_without_weights_is_never_random(tmp_path):
    (tmp_path / "open_clip_config.json").write_text((shipped("guardkit:scenes_clip") / "open_clip_config.json").read_text())
    with pytest.raises(InputError, match="holds no weights"):
        OpenClipEncoder(None, f"local-dir:{tmp_path}")


def tiny(folder, seed=0, *, size=(32, 32), resize_mode="shortest", interpolation="bicubic", quick_gelu=False, batch_size=4):
    """A random encoder of a few thousand weights in a folder of its own."""
    import open_clip

    vision = {"image_size": list(size), "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(embed_dim=32, vision_cfg=dict(vision), text_cfg=dict(text))
    folder.mkdir(parents=True)
    save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    config = {"embed_dim": 32, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": interpolation, "resize_mode": resize_mode}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return OpenClipEncoder(None, f"local-dir:{folder}", device="cpu", batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 7, 11, 16])
def test_nor_on_its_place_whatever_the_batch_size(tmp_path, batch_size):
    """Sizes such as 7 need rounding up: there the CPU's matrix product treats the last rows differently."""
    encoder = tiny(tmp_path / "m", batch_size=batch_size)
    images = [np.asarray(picture(seed)) for seed in range(13)]
    alone = [encoder.encode_images([image], fixed_batch=True)[0] for image in images]
    np.testing.assert_array_equal(encoder.encode_images(images, fixed_batch=True), alone)
    np.testing.assert_array_equal(encoder.encode_images(images[::-1], fixed_batch=True)[::-1], alone)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("resize_mode", "size"), [("shortest", (32, 32)), ("squash", (32, 32)), ("longest", (32, 32)), ("shortest", (32, 48))]
)
def test_pixels_are_resized_and_cropped_as_images_are(tmp_path, resize_mode, size, interpolation):
    if size[0] != size[1] and interpolation == "bilinear":
        pytest.skip("open_clip uses bicubic there, whatever its settings say")
    encoder = tiny(tmp_path / "m", size=size, resize_mode=resize_mode, interpolation=interpolation)
    for shape in [(97, 61), (61, 97), (333, 64), (33, 50), (32, 32), (20, 25)]:
        image = np.asarray(picture(3, shape))
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float().div(255)
        similarity = (encoder.encode_pixels(pixels).numpy() @ encoder.encode_images([image]).T).item()
        assert similarity > 0.99999, (shape, similarity)


def test_the_activation_is_part_of_the_fingerprint(tmp_path):
    """The same weights with QuickGELU are another encoder, though no weight's name or shape tells."""
    plain, quick = tiny(tmp_path / "plain"), tiny(tmp_path / "quick", quick_gelu=True)
    assert np.abs(plain.encode_images(IMAGES) - quick.encode_images(IMAGES)).max() > 1e-4
    assert plain.fingerprint != quick.fingerprint


def test_loading_leaves_logging_as_it_was(tmp_path, caplog):
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    encoder = tiny(tmp_path / "m")
    assert encoder.dim == 32
    assert (root.handlers, root.level, root.filters) == (before, level, [])
    assert not caplog.records


def test_other_threads_keep_their_log_while_a_model_loads(caplog):
    from guardkit.encoders.open_clip import _quiet

    with _quiet():
        other = threading.Thread(target=logging.warning, args=("still here",))
        other.start()
        other.join()
        logging.warning("open_clip's own")
    assert [record.message for record in caplog.records] == ["still here"]


def test_threads_build_the_model_once(tmp_path, monkeypatch):
    import open_clip

    encoder, built, build = tiny(tmp_path / "m"), [], open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: built.append(1) or build(*args, **kwargs))
    with ThreadPoolExecutor(4) as threads:
        jobs = [
            threads.submit(lambda: encoder.dim),
            threads.submit(lambda: encoder.fingerprint),
            threads.submit(encoder.encode_images, IMAGES),
        ]
        assert jobs[0].result() == 32
        assert jobs[2].result().shape == (3, 32)
    assert built == [1]


def test_texts_may_be_none(scenes_encoder):
    assert scenes_encoder.encode_texts([]).shape == (0, 256)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_weights_that_cannot_be_used_say_so(tmp_path):
    folder = tmp_path / "m"
    config = (folder, tiny(folder))[0] / "open_clip_config.json"
    (folder / "open_clip_model.safetensors").write_bytes(b"half a file")
    with pytest.raises(InputError, match="could not be loaded .*the file may be damaged"):
        OpenClipEncoder(None, f"local-dir:{folder}").dim  # noqa: B018
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb()}))
    with pytest.raises(InputError, match="could not be loaded"):
        OpenClipEncoder(None, f"local-dir:{folder}").dim  # noqa: B018
    config.write_text("{")
    with pytest.raises(InputError, match="could not be loaded .*the file may be damaged"):
        OpenClipEncoder(None, f"local-dir:{folder}").dim  # noqa: B018


def test_any_weights_name_that_open_clip_takes_will_do(tmp_path):
    tiny(tmp_path / "m")
    (tmp_path / "m/open_clip_model.safetensors").rename(tmp_path / "m/open_clip_pytorch_model.safetensors")
    assert OpenClipEncoder(None, f"local-dir:{tmp_path / 'm'}").dim == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "preprocess.size must be pixels, or height and width in pixels, got 0"),
        ({"size": [1, 2, 3]}, "preprocess.size must be"),
        ({"mean": 0.5}, "preprocess.mean must be 3 numbers"),
        ({"std": [0.5, 0.5, 0]}, "preprocess.std must be above 0"),
        ({"interpolation": "nearest"}, "preprocess.interpolation must be one of bicubic, bilinear, got 'nearest'"),
        ({"resize_mode": "crop"}, "preprocess.resize_mode must be one of shortest, longest, squash, got 'crop'"),
    ],
)
def test_wrong_preprocessing_is_named(tmp_path, change, message):
    (tmp_path / "m.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        OpenClipEncoder("ViT-B-32", str(tmp_path / "m.safetensors"), preprocess=OPENAI | change)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", "encoder.device 'cuda:99' cannot be used"), ("gpu", "encoder.device 'gpu' cannot be used")],
)
def test_a_device_that_is_not_there_is_named(tmp_path, device, message):
    tiny(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        OpenClipEncoder(None, f"local-dir:{tmp_path / 'm'}", device=device).dim  # noqa: B018


def test_a_bare_file_is_loaded_with_the_preprocessing_given(tmp_path):
    import open_clip

    folder = tmp_path / "m"
    encoder = tiny(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "tiny-test.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(folder / "tiny-test.json")
    try:
        stated = config["preprocess_cfg"] | {"size": 32}
        weights = str(folder / "open_clip_model.safetensors")
        bare = OpenClipEncoder("tiny-test", weights, preprocess=stated, device="cpu")
        np.testing.assert_array_equal(bare.encode_images(IMAGES), encoder.encode_images(IMAGES))
        assert bare.fingerprint == encoder.fingerprint
        assert OpenClipEncoder(**bare.config).fingerprint == bare.fingerprint
        other = OpenClipEncoder("tiny-test", weights, preprocess=stated | {"mean": [0.4] * 3}, device="cpu")
        assert other.fingerprint != bare.fingerprint
        assert np.abs(other.encode_images(IMAGES) - bare.encode_images(IMAGES)).max() > 1e-3
        with pytest.raises(InputError, match="could not be loaded .*another architecture or image size"):
            OpenClipEncoder("tiny-test", weights, preprocess=stated | {"size": 64}, device="cpu").dim  # noqa: B018
        with pytest.raises(InputError, match="could not be loaded .*another architecture or image size"):
            OpenClipEncoder("RN50", weights, preprocess=OPENAI, device="cpu").dim  # noqa: B018
    finally:
        open_clip.factory._MODEL_CONFIG_PATHS.pop()
        open_clip.factory._MODEL_CONFIGS.pop("tiny-test")


def test_a_tag_needs_an_architecture():
    with pytest.raises(InputError, match="encoder.architecture is needed with weights=openai, .*hf-hub:ORG/NAME"):
        OpenClipEncoder(None, "openai")


@pytest.mark.slow
def test_a_tag_whose_activation_does_not_fit_is_not_passed_over(tmp_path, monkeypatch):
    for architecture in ("ViT-B-32", "ViT-B-32-quickgelu"):
        make_shallow(monkeypatch, architecture)
    snapshot = tmp_path / "hub/models--timm--vit_base_patch32_clip_224.openai/snapshots/abc"
    write_hub_folder(snapshot, "ViT-B-32", OPENAI, half=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    plain = OpenClipEncoder("ViT-B-32", "openai", device="cpu")
    with pytest.warns(UserWarning, match="QuickGELU mismatch"):
        plain.dim  # noqa: B018
    quick = OpenClipEncoder("ViT-B-32-quickgelu", "openai", device="cpu")
    assert quick.name == "ViT-B-32-quickgelu (openai)"
    assert quick.fingerprint != plain.fingerprint
