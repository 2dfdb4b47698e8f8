"""A guard in and around pipelines that generate images: real ones of diffusers, tiny and at random; every reaction, every form of output."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from tiny_models import flux, stable_diffusion, stable_diffusion_xl

from guardkit import GuardClassifier, InputError, UnsafeImageError, guarded, safety_checker
from guardkit.heads import LinearHead

# diffusers' schedulers hand torch tensors to NumPy, which torch does not yet support as NumPy 2 wants it
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

FORMS = ["pil", "np", "pt"]


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    torch.manual_seed(0)
    head = LinearHead.build(scenes_encoder, scenes_policy)
    torch.nn.init.normal_(head.linear.weight)
    return GuardClassifier(head, scenes_encoder, scenes_policy)


@pytest.fixture(scope="module")
def pipelines():
    """Name -> a pipeline without a guard."""
    from transformers import CLIPImageProcessor

    with torch.random.fork_rng():
        torch.manual_seed(0)
        slot = {"feature_extractor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})}
        made = {
            "sd": stable_diffusion("StableDiffusionPipeline", 4, **slot),
            "sdxl": stable_diffusion_xl("StableDiffusionXLPipeline", 4),
            "flux": flux("FluxPipeline", 4),
        }
    for one in made.values():
        one.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def call():
    def run(pipeline, **kwargs):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipeline(["a red pistol", "a toy"], height=32, width=32, num_inference_steps=2, generator=generators, **kwargs)

    return run


@pytest.fixture(scope="module")
def embedded(pipelines, call, guard):
    """Name -> (2, d) embeddings of what a pipeline gives without a guard."""
    return {name: guard.encoder.encode_images([np.asarray(image) for image in call(one).images]) for name, one in pipelines.items()}


@pytest.fixture
def between(guard, embedded):
    """between(name): from now on the first of a pipeline's two images is flagged, clearly, and the second is not; gives the first's place."""

    def choose(name):
        first, second = torch.from_numpy(embedded[name])
        direction = 8 * (first - second) / (first - second).square().sum()  # logits of 4 and -4
        with torch.no_grad():
            guard.head.linear.weight[0] = direction / len(direction) ** 0.5
            guard.head.linear.bias[0] = -direction @ (first + second) / 2
        return 0

    return choose


def array(image):
    """(h, w, c) float, whatever it came as."""
    if isinstance(image, torch.Tensor):
        return image.float().permute(1, 2, 0).numpy()
    return np.asarray(image, np.float32) / (255 if isinstance(image, Image.Image) else 1)


def detail(image):
    """How much neighbouring pixels differ."""
    return np.abs(np.diff(array(image), axis=0)).mean()


def check(shown, before, flagged, reaction):
    """Two images after a reaction to one of them."""
    assert type(shown) is type(before)
    np.testing.assert_array_equal(array(shown[1 - flagged]), array(before[1 - flagged]))
    image, original = shown[flagged], before[flagged]
    assert array(image).shape == array(original).shape
    if reaction == "black":
        assert not array(image).any()
    elif reaction == "tag":
        np.testing.assert_array_equal(array(image), array(original))
    else:
        assert array(image).min() >= 0
        assert array(image).max() <= 1
        assert detail(image) < 0.7 * detail(original)
        assert abs(array(image).mean() - array(original).mean()) < 0.05


# --- the slot --------------------------------------------------------------------------------------------------------------


def watch(pipeline):
    """unguarded(form): the images that a pipeline with a checker would have given without, in its latest call."""
    seen = []
    pipeline.safety_checker.register_forward_pre_hook(lambda _, args, given: seen.append(given["images"].clone()), with_kwargs=True)
    return lambda form: pipeline.image_processor.postprocess(seen[-1], output_type=form)


@pytest.fixture
def with_checker(pipelines, guard):
    """with_checker(...) -> a pipeline with a checker, and what it would have given without."""

    def build(**options):
        pipelines["sd"].register_modules(safety_checker=safety_checker(guard, **options))
        return pipelines["sd"], watch(pipelines["sd"])

    yield build
    pipelines["sd"].register_modules(safety_checker=None)


@pytest.mark.parametrize("reaction", ["black", "blur", "tag"])
@pytest.mark.parametrize("form", FORMS)
def test_the_slot_gives_flagged_images_as_the_pipeline_shows_them(with_checker, call, guard, between, reaction, form):
    flagged = between("sd")
    pipeline, unguarded = with_checker(on_unsafe=reaction)
    output = call(pipeline, output_type=form)
    assert output.nsfw_content_detected == [i == flagged for i in range(2)]
    check(output.images, unguarded(form), flagged, reaction)
    assert [one.score for one in pipeline.safety_checker.decisions] == [one.score for one in guard.predict(unguarded("pil"))]


def test_the_slot_leaves_safe_images_and_raises_where_it_is_to(with_checker, call, guard, monkeypatch):
    monkeypatch.setattr(guard, "thresholds", guard.thresholds)
    guard.threshold = 1
    pipeline, unguarded = with_checker(on_unsafe="raise")
    output = call(pipeline, output_type="np")
    np.testing.assert_array_equal(output.images, unguarded("np"))
    assert output.nsfw_content_detected == [False, False]
    guard.threshold = 0
    with pytest.raises(UnsafeImageError, match=r"2 of 2 images not allowed by the guard: [\w, ]+ 0\.\d\d") as caught:
        call(pipeline)
    assert len(pickle.loads(pickle.dumps(caught.value)).decisions) == 2


def test_the_slot_counts_review_and_scope(with_checker, call, guard, monkeypatch):
    from guardkit import Band, Thresholds

    first = guard.policy.category_names[0]
    monkeypatch.setattr(guard, "thresholds", Thresholds(Band(0, 1), {**guard.thresholds.categories, first: Band(1, 1)}))
    assert call(with_checker()[0]).nsfw_content_detected == [True, True]
    assert call(with_checker(scope=[first])[0]).nsfw_content_detected == [False, False]
    with pytest.raises(InputError, match="scope names the category 'elsewhere'"):
        safety_checker(guard, scope=["elsewhere"])
    with pytest.raises(InputError, match="on_unsafe must be one of black, blur, tag, raise, got 'gone'"):
        safety_checker(guard, on_unsafe="gone")


def test_the_slot_moves_with_its_pipeline_and_is_saved_with_it(with_checker, call, between, guard, tmp_path):
    from diffusers import StableDiffusionPipeline

    def loaded(**given):
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", **given)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    flagged = between("sd")
    pipeline, _ = with_checker(on_unsafe="blur")
    moved = copy.deepcopy(pipeline).to("cpu", torch.float64)
    assert (moved.safety_checker.dtype, moved.safety_checker.device.type) == (torch.float64, "cpu")
    assert moved.safety_checker.guard.head.linear.weight.dtype == torch.float32
    assert len(call(moved).images) == 2
    pipeline.save_pretrained(tmp_path / "pipeline")
    for given, reaction in [({}, "blur"), ({"safety_checker": safety_checker(guard, on_unsafe="black")}, "black")]:
        another = loaded(**given)
        unguarded = watch(another)
        check(call(another, output_type="np").images, unguarded("np"), flagged, reaction)
    settings = tmp_path / "pipeline/safety_checker/safety_checker.json"
    settings.write_text(json.dumps({"on_unsafe": "black"}))
    with pytest.raises(InputError, match=r"safety_checker.json is not as guardkit wrote it; save the pipeline anew"):
        loaded()


@pytest.mark.parametrize("reaction", ["black", "blur", "tag"])
def test_the_slot_takes_arrays_and_what_is_no_number_is_unsafe(guard, reaction, monkeypatch):
    monkeypatch.setattr(guard, "thresholds", guard.thresholds)
    guard.threshold = 1
    images = np.stack([np.asarray(picture(seed, (32, 32)), np.float32) / 255 for seed in range(2)])
    images[1, 0, 0] = np.nan
    before = images.copy()
    shown, flags, watermarks = safety_checker(guard, on_unsafe=reaction, watermarks=True)(images=images, clip_input=None)
    assert (flags, watermarks) == ([False, True], [False, False])
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(shown[0], before[0])
    if reaction == "tag":
        np.testing.assert_array_equal(shown[1], before[1])
    else:
        assert np.isfinite(shown[1]).all()
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    assert safety_checker(guard, on_unsafe=reaction)(images=tensor.half())[1] == [False, True]
    with pytest.raises(InputError, match=r"images must be an \(n, c, h, w\) tensor in \[-1, 1\].*got NoneType"):
        safety_checker(guard)()


# --- around a pipeline -----------------------------------------------------------------------------------------------------


class Watched:
    """A pipeline whose images are kept as it gave them."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def __call__(self, *args, **kwargs):
        output = self.pipeline(*args, **kwargs)
        self.images = copy.deepcopy(output[0] if isinstance(output, tuple) else output.images)
        return output


@pytest.mark.parametrize("reaction", ["black", "blur", "tag"])
@pytest.mark.parametrize(("name", "form"), [("sdxl", "pil"), ("sdxl", "np"), ("flux", "pt"), ("flux", "pil")])
def test_a_guarded_pipeline_shows_what_it_may(pipelines, call, guard, between, name, form, reaction):
    flagged, watched = between(name), Watched(pipelines[name])
    pipeline = guarded(watched, guard, on_unsafe=reaction)
    output = call(pipeline, output_type=form)
    check(output.images, watched.images, flagged, reaction)
    assert [one.action for one in output.decisions] == ["block" if i == flagged else "allow" for i in range(2)]
    images, decisions = call(pipeline, output_type=form, return_dict=False)
    check(images, watched.images, flagged, reaction)
    assert [one.action for one in decisions] == [one.action for one in output.decisions]


@pytest.mark.parametrize("form", FORMS)
def test_a_guarded_pipeline_leaves_safe_images(pipelines, call, guard, form, monkeypatch):
    monkeypatch.setattr(guard, "thresholds", guard.thresholds)
    guard.threshold = 1
    watched = Watched(pipelines["sdxl"])
    for shown, before in zip(call(guarded(watched, guard, "raise"), output_type=form).images, watched.images, strict=True):
        np.testing.assert_array_equal(array(shown), array(before))
    guard.threshold = 0
    with pytest.raises(UnsafeImageError) as caught:
        call(guarded(pipelines["sdxl"], guard, "raise"), output_type=form)
    assert [one.action for one in caught.value.decisions] == ["block", "block"]


def test_a_guarded_pipeline_stays_guarded_and_is_the_pipeline_otherwise(pipelines, call, guard):
    pipeline = guarded(pipelines["flux"], guard)
    assert pipeline.to("cpu") is pipeline
    assert pipeline.vae is pipelines["flux"].vae
    before, another = pipelines["flux"].scheduler, copy.deepcopy(pipelines["flux"].scheduler)
    pipeline.scheduler = another
    assert pipelines["flux"].scheduler is another
    pipeline.scheduler = before
    assert copy.copy(pipeline).vae is pipeline.vae
    with pytest.raises(AttributeError, match="nothing"):
        pipeline.nothing  # noqa: B018


def test_latents_are_refused_however_they_are_asked_for(pipelines, call, guard):
    def given(prompt, output_type="latent", **_):
        raise AssertionError("not to be called")

    with pytest.raises(InputError, match='output_type="latent" gives no image that a guard could look at; ask for "pil"'):
        call(guarded(pipelines["flux"], guard), output_type="latent")
    for args in [("a",), ("a", "latent")]:
        with pytest.raises(InputError, match="gives no image that a guard could look at"):
            guarded(given, guard)(*args)


def made_by(guard, output, reaction="black"):
    return guarded(lambda: output, guard, reaction)()


def test_every_place_of_images_is_known_for_sure_or_refused(guard, monkeypatch):
    monkeypatch.setattr(guard, "thresholds", guard.thresholds)
    guard.threshold = 0
    one = picture(0)
    for output in (SimpleNamespace(images=one), {"images": one, "latents": 1}, (one, "seed")):
        found = made_by(guard, output)
        shown = found.images if hasattr(found, "images") else found["images"] if isinstance(found, dict) else found[0]
        assert not np.asarray(shown).any()
    assert [type(part) for part in found] == [Image.Image, str, list]

    class Hidden:
        """Keeps its images elsewhere too."""

        images = property(lambda self: [one])

    for output, reason in [
        (Hidden(), "gives Hidden, and a guard looks at `images`"),
        ([one], "gives list, and a guard looks at `images`"),
        (None, "gives NoneType"),
        ((), "got NoneType"),
        (SimpleNamespace(images=np.zeros((1, 2, 8, 8, 3))), r"ndarray of shape \(1, 2, 8, 8, 3\)"),
        (SimpleNamespace(images=[[one]]), "an image must be a PIL image, an array or a tensor of three dimensions, got list"),
    ]:
        with pytest.raises(InputError, match=reason):
            made_by(guard, output)


def test_what_cannot_be_decided_is_unsafe(guard, monkeypatch):
    monkeypatch.setattr(guard, "thresholds", guard.thresholds)
    guard.threshold = 1
    images = torch.stack([torch.full((3, 16, 16), 0.5), torch.full((3, 16, 16), float("nan"))])
    output = made_by(guard, SimpleNamespace(images=images))
    assert [one.action for one in output.decisions] == ["allow", "error"]
    assert output.images[0].eq(0.5).all()
    assert output.images[1].eq(0).all()
    with pytest.raises(UnsafeImageError, match=r"1 of 2 images .*: not decided \(floating-point pixels must lie in 0 to 1"):
        made_by(guard, SimpleNamespace(images=images), "raise")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P"])
@pytest.mark.parametrize("reaction", ["black", "blur"])
def test_nothing_is_left_behind_transparency(guard, mode, reaction, monkeypatch):
    monkeypatch.setattr(guard, "thresholds", guard.thresholds)
    guard.threshold = 0
    image = picture(0).resize((64, 48), Image.Resampling.NEAREST).convert(mode)
    if "A" in mode:
        image.putalpha(0)
    (shown,) = made_by(guard, SimpleNamespace(images=[image]), reaction).images
    assert (shown.mode, shown.size) == (image.mode, image.size)
    colours = np.asarray(shown.convert("RGBA"))
    assert (colours[..., 3] == 255).all()
    assert reaction == "blur" or not colours[..., :3].any()
    assert detail(shown.convert("RGB")) <= detail(image.convert("RGB"))
