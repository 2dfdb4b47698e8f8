"""Diffusers pipelines as editors: every pipeline class is real, built tiny and at random, saved, and loaded like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import ROOT, picture
from PIL import Image
from tiny_models import PIPELINES, stable_diffusion

from guardkit.artifacts import weights_variant
from guardkit.counterfactual.instructor import TemplateInstructor
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.counterfactual.verifier import NoVerifier
from guardkit.editors.base import EditRequest
from guardkit.editors.diffusers import DiffusersEditor
from guardkit.editors.registration import global_shift, largest_change
from guardkit.images import ArrayContent, FileContent
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool
from guardkit.schema import InputError, Record

# diffusers' schedulers hand torch tensors to NumPy, which torch does not yet support as NumPy 2 wants it
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

REGION = (0.3, 0.3, 0.6, 0.6)
SAVED = {  # folder: the pipeline that it is
    "instruct_pix2pix": "instruct_pix2pix",
    "instruct_pix2pix_xl": "instruct_pix2pix_xl",
    "flux_kontext": "flux_kontext",
    "qwen_image_edit": "qwen_image_edit",
    "qwen_image_edit_plus": "qwen_image_edit",
    "inpaint": "inpaint",
    "inpaint_xl": "inpaint",
    "text_to_image": "inpaint",
    "flux_fill": "flux_fill",
}
BATCHED = [name for name in SAVED if not name.startswith("qwen")]
MASKED = ["inpaint", "inpaint_xl", "text_to_image", "flux_fill"]


# --- tiny pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(name) -> the folder of a tiny pipeline with random weights."""
    import torch

    root = tmp_path_factory.mktemp("diffusers")

    def folder(name):
        if not (root / name).exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                PIPELINES[name]().save_pretrained(root / name)
        return str(root / name)

    return folder


@pytest.fixture(scope="session")
def editor(saved):
    """editor(name, ...) -> a quick editor on that pipeline; those with equal arguments share one."""
    made = {}

    def build(name, **options):
        options = {"steps": 2, "size": 32} | options
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = DiffusersEditor("auto", saved(name), **options)
        return made[key]

    return build


@pytest.fixture(autouse=True)
def small_qwen(monkeypatch):
    """Qwen's pipelines scale every image to about a million pixels, half a minute for a tiny model; here to a thousandth."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, scale=module.calculate_dimensions: scale(4096, ratio))


def request(seed=0, size=(96, 64), **changes):
    content = ArrayContent(np.asarray(picture(seed, size)))
    return replace(EditRequest(content, "take it away", REGION, seed, target="a bench in a park"), **changes)


def box(shape, region=REGION, margin=0):
    """(h, w) bool, True within the region and a margin in pixels."""
    height, width = shape[:2]
    inside = np.zeros((height, width), bool)
    inside[
        int(region[1] * height) - margin : int(region[3] * height) + margin,
        int(region[0] * width) - margin : int(region[2] * width) + margin,
    ] = True
    return inside


def change(result, original):
    return np.abs(result.image.astype(int) - original.content.load().astype(int)).max(axis=2)


# --- every pipeline --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVED)
def test_every_pipeline_edits(editor, name):
    """An image of the original's size, the same for the same seed, another for another seed, null edits too."""
    one = editor(name)
    assert one.name == f"diffusers/{SAVED[name]}"
    asked = request(1)
    results = one.edit([asked, asked, replace(asked, seed=2), replace(asked, kind="null", instruction="change nothing")])
    assert [result.reason for result in results] == [None] * 4
    first, again, other, null = (result.image for result in results)
    assert (first.shape, first.dtype) == ((64, 96, 3), np.uint8)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (null != asked.content.load()).any()


@pytest.mark.parametrize("name", BATCHED)
def test_an_edit_does_not_depend_on_its_batch(editor, name):
    """Up to rounding: at most one level of 255. Sizes are mixed, and results come in the order of the requests."""
    asked = [request(1), request(2, (64, 96)), request(3), request(4, target="a cat", instruction="make it a cat, please")]
    alone = [editor(name).edit([one])[0].image for one in asked]
    for options in ({"batch_size": 2}, {"batch_size": 4}):
        for single, batched in zip(alone, editor(name, **options).edit(asked), strict=True):
            assert single.shape == batched.image.shape
            assert np.abs(single.astype(int) - batched.image).max() <= 1


@pytest.mark.parametrize("name", SAVED)
def test_a_round_trip_is_that_of_the_autoencoder(editor, name):
    """No words, no noise: whatever the seed, the autoencoder alone; and only where an edit would redraw."""
    import torch

    here = editor(name)
    one, other = here.edit([replace(request(), kind="round_trip", instruction="", seed=seed) for seed in (0, 7)])
    assert one.reason is None
    np.testing.assert_array_equal(one.image, other.image)
    original = request().content.load()
    assert change(one, request()).any()
    if name in MASKED:
        assert not change(one, request())[~box(original.shape, margin=8)].any()
        whole = here.edit([request(kind="round_trip", region=None)])[0]  # a safe image has no box
        assert change(whole, request()).mean() > change(one, request()).mean()
    elif name == "instruct_pix2pix":
        size = here._working_size(original.shape[1], original.shape[0])
        pixels = (
            torch.from_numpy(np.array(Image.fromarray(original).resize(size, Image.Resampling.LANCZOS))).permute(2, 0, 1)[None] / 127.5 - 1
        )
        vae = here._pipeline.vae
        with torch.inference_mode():
            made = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].permute(1, 2, 0)
        small = (made.clamp(-1, 1) * 127.5 + 127.5).round().numpy().astype(np.uint8)
        expected = np.array(Image.fromarray(small).resize(original.shape[1::-1], Image.Resampling.LANCZOS))
        assert np.abs(expected.astype(int) - one.image).mean() < 2


@pytest.mark.parametrize("name", MASKED)
def test_inpainting_keeps_what_lies_outside_the_region(editor, name):
    asked = request(1)
    (result,) = editor(name).edit([asked])
    difference = change(result, asked)
    assert difference[box(difference.shape)].mean() > 5
    assert difference[~box(difference.shape, margin=10)].max() == 0
    # a null edit happens beside the region, whatever the caption of the real edit says
    null = replace(asked, kind="null")
    nothing, same = editor(name).edit([null, replace(null, target="something else", instruction="and more")])
    difference = change(nothing, asked)
    assert difference.max() > 5
    assert difference[box(difference.shape, margin=-4)].max() == 0
    np.testing.assert_array_equal(nothing.image, same.image)
    safe, unknown = editor(name).edit([replace(null, region=None, label=0), replace(null, region=None)])
    assert safe.image is not None
    assert unknown.reason.startswith(f"no region: pipeline={SAVED[name]}")


def test_inpainting_is_told_what_the_result_shows(editor):
    first, same, fallback, words = editor("inpaint").edit(
        [request(1), request(1, instruction="other words"), request(1, target=""), request(1, target="take it away")]
    )
    np.testing.assert_array_equal(first.image, same.image)
    assert (first.image != fallback.image).any()
    np.testing.assert_array_equal(fallback.image, words.image)


def test_inpainting_without_pasting_returns_all_that_the_pipeline_made(editor):
    one = editor("inpaint", paste_outside=False)
    for kind in ("counterfactual", "null"):
        asked = request(1, kind=kind)
        (result,) = one.edit([asked])
        assert (change(result, asked) > 0).mean() > 0.9


@pytest.mark.parametrize("name", ["instruct_pix2pix", "qwen_image_edit"])
def test_guidance_acts(editor, name):
    """Qwen's does beside a negative prompt only, so one is always given."""
    plain, guided, turned = (
        editor(name, **options).edit([request(1)])[0].image
        for options in ({"guidance": 1}, {"guidance": 8}, {"guidance": 8, "negative_prompt": "a bright red hat"})
    )
    assert (plain != guided).any()
    assert (guided != turned).any()


@pytest.mark.parametrize(("name", "options"), [("instruct_pix2pix", {"image_guidance": 4}), ("inpaint", {"strength": 0.5})])
def test_other_arguments_reach_the_pipeline(editor, name, options):
    usual, changed = (editor(name, **more).edit([request(1)])[0].image for more in ({}, options))
    assert (usual != changed).any()


def test_safety_checker_is_not_loaded(tmp_path):
    """It would blacken the images that are to be edited. The folder keeps one that would."""
    import transformers
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=8))
    checker.concept_embeds_weights.data.fill_(-9)  # every image is above this
    parts = {
        "safety_checker": checker,
        "feature_extractor": transformers.CLIPImageProcessor(crop_size=32, size=32),
        "requires_safety_checker": True,
    }
    pipeline = stable_diffusion("StableDiffusionInstructPix2PixPipeline", 8, **parts)
    pipeline.save_pretrained(tmp_path / "with")
    black = pipeline("x", picture(1, (32, 32)), num_inference_steps=1, output_type="np").images
    assert black.max() == 0
    assert DiffusersEditor("auto", str(tmp_path / "with"), steps=1, size=32).edit([request(1)])[0].reason is None


def test_a_folder_that_holds_only_half_precision_is_loaded(saved, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(saved("instruct_pix2pix"), folder)
    plain = DiffusersEditor("auto", str(folder), device="cpu", steps=2).edit([request()])[0].image
    weights = list(folder.rglob("*.safetensors"))
    assert len(weights) > 1
    for file in weights:
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    np.testing.assert_array_equal(DiffusersEditor("auto", str(folder), device="cpu", steps=2).edit([request()])[0].image, plain)


def test_the_variant_is_asked_for_only_where_there_is_nothing_else():
    assert weights_variant(["unet/a.fp16.safetensors", "vae/b.safetensors"]) == "fp16"
    assert weights_variant(["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", "config.json"]) == "fp16"
    assert weights_variant(["unet/a.fp16.safetensors", "unet/a.safetensors"]) is None
    assert weights_variant(["model.safetensors", "model.fp16.bin"]) is None


def test_half_precision(editor):
    one = editor("inpaint", dtype="bfloat16")
    assert one.config["dtype"] == "bfloat16"
    assert one.edit([request(1)])[0].reason is None


def test_works_in_the_pipeline(editor, scenes_policy):
    record = Record("1.png", 1, None, "folder", "1", request(1).content, REGION, caption="a picture")
    (tried,) = CounterfactualPipeline(scenes_policy, TemplateInstructor(), editor("inpaint"), NoVerifier(), cache_dir=None).make(
        [record], [0]
    )
    assert tried.accepted


# --- sizes and crops, seen by a stand-in -------------------------------------------------------------------------------


class StandIn:
    """In place of a pipeline: remembers how it was called and gives what it is told to."""

    vae_scale_factor = 8
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=64))

    def __init__(self, answer=lambda image: image):
        self.answer, self.calls = answer, []

    def __call__(self, **call):
        self.calls.append(call)
        images = call["image"] if isinstance(call["image"], list) else [call["image"]]
        return SimpleNamespace(images=np.stack([self.answer(np.asarray(image) / 255) for image in images]))


def with_stand_in(saved, name, answer=lambda image: image, **options):
    made = DiffusersEditor("auto", saved(name), **options)
    made._pipeline = StandIn(answer)
    return made


@pytest.mark.parametrize(
    ("name", "options", "size", "expected"),
    [
        ("instruct_pix2pix", {}, (1000, 1000), (512, 512)),  # 64 latents of 8 pixels, as the U-Net says
        ("instruct_pix2pix", {}, (300, 200), (624, 416)),
        ("instruct_pix2pix", {"size": 256}, (2000, 30), (2088, 32)),
        ("inpaint", {"size": 100}, (90, 70), (112, 88)),
        ("flux_kontext", {}, (300, 200), (1248, 832)),  # one of those that it was trained on
        ("flux_kontext", {"size": 512}, (300, 200), (624, 416)),
        ("flux_fill", {}, (640, 480), (1184, 880)),
        ("qwen_image_edit", {}, (640, 480), (1184, 896)),
    ],
)
def test_working_sizes(saved, name, options, size, expected):
    """Of the trained area and the image's shape, in multiples of what the pipeline takes; results have the original's size."""
    one = with_stand_in(saved, name, lambda _: np.random.default_rng(0).random((expected[1], expected[0], 3)), **options)
    (result,) = one.edit([request(1, size)])
    assert result.image.shape == (size[1], size[0], 3)
    (call,) = one._pipeline.calls
    images = call["image"] if isinstance(call["image"], list) else [call["image"]]
    assert {image.size for image in images} == {size if name == "qwen_image_edit" else expected}
    if name != "instruct_pix2pix":
        assert (call["width"], call["height"]) == expected
    if name in MASKED:
        assert call["mask_image"][0].size == expected
        assert set(np.unique(call["mask_image"][0])) == {0, 255}


def test_a_crop_is_seen_at_its_own_scale(saved):
    """Pixel for pixel where crop and working size agree; larger around a large region; the rest is the original's."""
    one = with_stand_in(saved, "inpaint", lambda image: 1 - image, crop_px=64, size=64, dilate=0.0)
    asked = request(1, (200, 150), region=(0.5, 0.5, 0.6, 0.6))
    (result,) = one.edit([asked])
    (call,) = one._pipeline.calls
    np.testing.assert_array_equal(np.asarray(call["image"][0]), asked.content.load()[50:114, 78:142])
    assert np.asarray(call["mask_image"][0]).nonzero()[0].size == 20 * 15
    difference = change(result, asked)
    assert difference[75:90, 100:120].mean() > 5
    assert difference[~box(difference.shape, (0.5, 0.5, 0.6, 0.6), margin=5)].max() == 0
    for region, side in (((0.0, 0.0, 0.1, 0.1), 64), ((0.1, 0.1, 0.5, 0.5), 120), ((0.9, 0.0, 1.0, 1.0), 150)):
        larger = with_stand_in(saved, "inpaint", crop_px=64, dilate=0.0)
        job = larger._prepare(0, request(1, (200, 150), region=region))
        rows, columns = job.view
        assert (rows.stop - rows.start, columns.stop - columns.start) == (side, side if side < 150 else 200)


# --- what goes wrong with results --------------------------------------------------------------------------------------


def scene(size=128):
    return EditRequest(ArrayContent(SceneContent(ScenePool().scene(1, 3), size).load()), "take it away", None, 0)


def painted(image):
    """An edit in the middle, and the noise of an autoencoder everywhere."""
    height, width = image.shape[:2]
    edited = image + np.random.default_rng(0).normal(0, 0.01, image.shape)
    edited[height // 3 : height // 2, width // 3 : width // 2] = (0.9, 0.1, 0.2)
    return np.clip(edited, 0, 1)


@pytest.mark.parametrize("region", [None, (0.3, 0.3, 0.55, 0.55)])
def test_a_shifted_result_is_moved_back(saved, region):
    asked = replace(scene(), region=region)
    edits = [painted, lambda image: np.roll(painted(image), (-2, 3), (0, 1))]
    straight, moved_back = (
        with_stand_in(saved, "instruct_pix2pix", edit, size=128, max_shift=0.03).edit([asked])[0].image.astype(int) for edit in edits
    )
    assert np.abs(straight - moved_back)[2:, :-3].max() == 0
    # what becomes free shows the original
    np.testing.assert_array_equal(moved_back[:2], asked.content.load()[:2])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda image: np.roll(painted(image), 9, 1), "editor shifted the image by more than 2.0% of its longer side"),
        (lambda image: image, "editor ignored the instruction (mean change below 3 of 255)"),
        (lambda image: image + np.random.default_rng(0).normal(0, 0.02, image.shape), "editor ignored the instruction"),
        (lambda image: np.full_like(image, np.nan), "editor returned NaN in float32"),
        (lambda image: image * 0, "editor returned a blank image"),
        (lambda image: image[:-8], "editor returned an image of shape (120, 128, 3), not (128, 128, 3)"),
    ],
)
def test_useless_results_are_rejected(saved, answer, reason):
    (result,) = with_stand_in(saved, "instruct_pix2pix", answer, size=128).edit([scene()])
    assert result.image is None
    assert result.reason.startswith(reason)


def test_a_null_edit_may_change_nothing(saved):
    (result,) = with_stand_in(saved, "instruct_pix2pix", size=128).edit([replace(scene(), kind="null")])
    np.testing.assert_array_equal(result.image, scene().content.load())


def test_pasting_for_instruction_pipelines(saved):
    """On demand, where a region is known; null edits are pasted beside it."""
    one = with_stand_in(saved, "instruct_pix2pix", lambda image: 1 - image, size=128, paste_outside=True)
    asked = replace(scene(), region=REGION)
    edited, null, everywhere = one.edit([asked, replace(asked, kind="null"), replace(asked, region=None)])
    assert change(edited, asked)[~box((128, 128), margin=8)].max() == 0
    assert change(null, asked)[box((128, 128), margin=-4)].max() == 0
    assert change(null, asked).max() > 20
    assert (change(everywhere, asked) > 0).mean() > 0.9


def test_a_moved_object_is_no_shift_of_the_image():
    image = scene(256).content.load()
    object_ = cv2.resize(scene(64).content.load(), (64, 64))
    one, other = image.copy(), image.copy()
    one[80:144, 80:144], other[80:144, 92:156] = object_, object_
    region = np.zeros((256, 256), bool)
    region[80:144, 80:156] = True
    assert global_shift(one, other, region) == (0, 0)
    assert global_shift(one, np.roll(other, (5, -7), (0, 1)), region) == (-7, 5)
    assert global_shift(one[:8, :8], one[:8, :8], None) == (0, 0)
    flat = np.full((64, 64, 3), 128, np.uint8)
    assert global_shift(flat, flat, np.ones((64, 64), bool)) == (0, 0)


def test_change_is_that_of_a_patch():
    image = np.full((160, 160, 3), 100, np.uint8)
    spot = image.copy()
    spot[50:60, 50:60] += 60  # exactly one patch of 1/16
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    assert largest_change(image, spot, None) == pytest.approx(60)
    assert largest_change(image, noisy, None) < 2.5 < np.abs(noisy - image.astype(float)).mean()
    elsewhere = np.zeros((160, 160), bool)
    elsewhere[100:150, 100:150] = True
    assert largest_change(image, spot, elsewhere) == 0


def test_requests_that_cannot_be_met(saved, tmp_path):
    one = with_stand_in(saved, "inpaint", lambda image: 1 - image, size=64)
    missing = FileContent(tmp_path / "gone.png")
    asked = [
        request(region=None),
        request(content=missing),
        request(target="", instruction=" "),
        request(region=(0, 0, 1, 1)),
        request(kind="null", region=(0, 0, 1, 0.9)),
        request(region=(1.2, 0.2, 1.3, 0.3)),
        request(),
    ]
    results = one.edit(asked)
    assert [result.reason for result in results] == [
        "no region: pipeline=inpaint needs a box around the feature; give one (x_min, y_min, x_max, y_max beside file_name), or an editor without: editor=diffusers",
        "unreadable image: file does not exist",
        "no instruction",
        "the region covers the whole image",
        "no room for a null edit beside the region",
        "the region is empty",
        None,
    ]
    assert len(one._pipeline.calls) == 1


# --- weights, devices, arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pipeline": "magic"},
            "editor.pipeline must be one of auto, instruct_pix2pix, instruct_pix2pix_xl, flux_kontext, qwen_image_edit",
        ),
        ({"pipeline": "inpaint"}, "hold a StableDiffusionInstructPix2PixPipeline, got pipeline=inpaint; give pipeline=instruct_pix2pix"),
        ({"weights": "/does/not/exist"}, "editor.weights /does/not/exist does not exist; give a local folder or a Hub id ORG/NAME"),
        ({"weights": str(ROOT / "docs")}, "docs holds no model_index.json; give a folder that a diffusers pipeline was saved to"),
        ({"weights": "some/model"}, "editor.pipeline=auto reads a local folder, got weights=some/model; name one of"),
        ({"weights": ""}, "editor.weights must be a local folder or a Hub id ORG/NAME, got ''"),
        ({"revision": "main"}, "editor.revision belongs to a Hub id"),
        ({"strength": 0.5}, "editor.strength has no effect on pipeline=instruct_pix2pix; leave it null, got 0.5"),
        ({"crop_px": 64, "paste_outside": False}, "leave paste_outside null or true"),
        ({"steps": 0}, "editor.steps must be a whole number of at least 1, or null, got 0"),
        ({"steps": 1.5}, "editor.steps must be a whole number"),
        ({"image_guidance": 0.5}, "editor.image_guidance must be a number of at least 1, or null, got 0.5"),
        ({"max_shift": 1}, "editor.max_shift must lie in [0, 0.5), got 1"),
        ({"min_change": float("nan")}, "editor.min_change must lie in [0, 255], got nan"),
        ({"guidance": float("inf")}, "editor.guidance must be a number of at least 0, or null, got inf"),
        ({"batch_size": True}, "editor.batch_size must be a whole number of at least 1, got True"),
        ({"dtype": "int8"}, "editor.dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_wrong_arguments_are_named(saved, arguments, message):
    arguments = {"pipeline": "auto", "weights": saved("instruct_pix2pix")} | arguments
    with pytest.raises(InputError) as raised:
        DiffusersEditor(**arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["flux_kontext", "flux_fill"])
def test_a_negative_prompt_without_effect_is_refused(saved, name):
    with pytest.raises(InputError, match=f"editor.negative_prompt has no effect on pipeline={name}"):
        DiffusersEditor("auto", saved(name), negative_prompt="hats")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"_class_name": "KandinskyPipeline"},
            "hold a KandinskyPipeline, which editor=diffusers cannot call; it can call StableDiffusionInstruct",
        ),
        ({"_class_name": ["my_code", "Mine"]}, "hold a ['my_code', 'Mine'], which editor=diffusers cannot call"),
        ({}, "names no pipeline"),
        ("not json", "model_index.json is damaged (Expecting value"),
    ],
)
def test_folders_of_unknown_pipelines_are_refused(tmp_path, index, message):
    (tmp_path / "model_index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(InputError) as raised:
        DiffusersEditor("auto", str(tmp_path))
    assert message in str(raised.value)


def test_a_constructor_loads_nothing(saved):
    code = f"""
import sys
from guardkit.editors.diffusers import DiffusersEditor
DiffusersEditor("auto", {saved("inpaint")!r}); DiffusersEditor("flux_kontext", "some/model", dtype="bfloat16")
print(sorted({{"torch", "diffusers", "transformers", "huggingface_hub"}} & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == "[]"


def test_config_names_all_that_edits_depend_on(saved, tmp_path):
    shutil.copytree(saved("inpaint"), tmp_path / "copy")
    base = DiffusersEditor("inpaint", saved("inpaint"))
    config = base.config
    assert json.loads(json.dumps(config)) == config
    assert (config["dtype"], config["pipeline"], config["paste_outside"]) == ("float32", "inpaint", True)
    assert "diffusers" in config
    assert DiffusersEditor("auto", str(tmp_path / "copy"), device="cpu", batch_size=4).config == config
    changes = [{"steps": 3}, {"guidance": 2}, {"strength": 0.5}, {"negative_prompt": "x"}, {"size": 64}, {"crop_px": 64}, {"dilate": 0.1}]
    changes += [{"paste_outside": False}, {"max_shift": 0.1}, {"min_change": 1.0}, {"dtype": "bfloat16"}]
    others = [DiffusersEditor("auto", saved("inpaint"), **change).config for change in changes]
    (tmp_path / "copy/README.md").write_text("words")
    assert DiffusersEditor("auto", str(tmp_path / "copy")).config == config
    path = tmp_path / "copy/vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    others.append(DiffusersEditor("auto", str(tmp_path / "copy")).config)
    assert len({json.dumps(one, sort_keys=True) for one in [config, *others]}) == len(changes) + 2


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")  # of diffusers' own call
def test_a_hub_id_is_pinned_to_its_commit(saved, tmp_path, monkeypatch):
    """Key and weights are those of one commit; a filled cache needs no network."""
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(saved("inpaint"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    one = DiffusersEditor("inpaint", "org/tiny", steps=2, size=32)
    assert one.config["weights"] == f"org/tiny@{commit}"
    local = DiffusersEditor("inpaint", saved("inpaint"), steps=2, size=32)
    np.testing.assert_array_equal(one.edit([request(1)])[0].image, local.edit([request(1)])[0].image)
    with pytest.raises(InputError, match="hold a StableDiffusionInpaintPipeline, got pipeline=flux_fill; give pipeline=inpaint"):
        DiffusersEditor("flux_fill", "org/tiny").edit([request(1)])
    for weights, revision in (("org/unknown", None), ("org/tiny", "no-such-branch")):
        missing = DiffusersEditor("inpaint", weights, revision=revision)
        with pytest.raises(InputError, match=r"is no local folder and could not be fetched from the Hub .*without a network give a folder"):
            _ = missing.config


def test_weights_that_cannot_be_loaded(saved, tmp_path):
    import torch
    from safetensors.torch import load_file

    shutil.copytree(saved("inpaint"), tmp_path / "pickled")
    path = tmp_path / "pickled/unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    shutil.copytree(saved("inpaint"), tmp_path / "damaged")
    (tmp_path / "damaged/unet/diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    for name in ("pickled", "damaged"):
        with pytest.raises(InputError, match=r"could not be loaded \(.*with safetensors, is expected"):
            DiffusersEditor("auto", str(tmp_path / name)).edit([request()])


def test_devices_and_memory(saved, monkeypatch):
    import torch

    with pytest.raises(InputError, match="editor.device 'cuda:77' cannot be used"):
        DiffusersEditor("auto", saved("inpaint"), device="cuda:77").edit([request()])
    monkeypatch.setattr("guardkit.editors.diffusers.find_spec", lambda name: None)
    with pytest.raises(InputError, match="editor.offload=model needs accelerate; install it with"):
        DiffusersEditor("auto", saved("inpaint"), offload="model")
    monkeypatch.setattr("guardkit.editors.diffusers.find_spec", lambda name: object())
    with pytest.raises(InputError, match="editor.offload=sequential moves weights off a GPU, and there is none"):
        DiffusersEditor("auto", saved("inpaint"), offload="sequential", device="cpu").edit([request()])

    def full(image):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        InputError, match=r"cpu has not enough memory for 1 of 64x64 pixels .*in float32; lower editor.batch_size or editor.size"
    ):
        with_stand_in(saved, "inpaint", full, size=64).edit([request(size=(80, 80))])

    def broken(image):
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):  # not dressed up as the user's
        with_stand_in(saved, "inpaint", broken, size=64).edit([request()])
    monkeypatch.setattr("diffusers.DiffusionPipeline.to", lambda *_: full(None))
    with pytest.raises(InputError, match="cpu has not enough memory; give editor.offload=model or sequential"):
        DiffusersEditor("auto", saved("flux_fill")).edit([request()])


def test_weights_that_do_not_say_their_size(saved):
    one = with_stand_in(saved, "instruct_pix2pix")
    one._pipeline.unet = SimpleNamespace(config=SimpleNamespace(sample_size=None))
    with pytest.raises(InputError, match="do not say which image size they were trained on; give editor.size"):
        one.edit([request()])


def test_configuration(compose):
    from hydra.utils import instantiate

    cfg = compose("synthesize", "editor=diffusers", "editor.pipeline=flux_kontext", "editor.weights=org/name")
    assert instantiate(cfg.editor).name == "diffusers/flux_kontext"
