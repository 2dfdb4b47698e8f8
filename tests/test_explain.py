"""Which parts of an image a score comes from: what each encoder can do, that maps are those of the formulas, and that they find things."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest
import torch
from conftest import picture
from safetensors.torch import save_file
from test_capabilities import ImagesOnly
from tiny_models import FAMILIES, STATED, write_onnx
from torch.nn import functional

import guardkit
from guardkit import Explanation, GuardClassifier, InputError, OnnxEncoder, OpenClipEncoder, TransformersEncoder
from guardkit.heads import LinearHead, PromptHead
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool, find_region
from guardkit.score_maps import Calibration, ScoreMap

IMAGE = np.asarray(picture(1))  # 96 wide, 64 high
METHODS = ("grad_eclip", "activation", "attention_pooling", "occlusion")


def with_head(encoder, policy, seed=0):
    torch.manual_seed(seed)
    head = LinearHead.build(encoder, policy)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    return GuardClassifier(head, encoder, policy)


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    """Decides by the policy's texts, which the shipped encoder reads well, without a training."""
    return GuardClassifier(PromptHead.build(scenes_encoder, scenes_policy), scenes_encoder, scenes_policy)


# --- what an encoder can do --------------------------------------------------------------------------------------------

VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TOWERS = {  # of open_clip: its vision_cfg, image size, and what it can do beside occlusion
    "class token": (VIT, 32, ["grad_eclip"]),
    "class token, normalised queries": (VIT | {"block_type": "custom", "qk_norm": True}, 32, ["grad_eclip"]),
    "mean of the tokens": (VIT | {"pool_type": "avg"}, 32, []),
    "pooled by attention": (VIT | {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}, 32, ["attention_pooling"]),
    "pooled by attention, in timm": ({"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": ""}, 160, ["attention_pooling"]),
    "class token, in timm": ({"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}, 160, ["grad_eclip"]),
    "convolutions": ({"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}, 160, ["activation"]),
    "convolutions, not to be halved": (
        {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"},
        160,
        ["activation"],
    ),
}


def open_clip_tower(folder, vision, size):
    import open_clip

    vision = vision | {"image_size": size} | ({"timm_model_pretrained": False} if "timm_model_name" in vision else {})
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = open_clip.model.CLIP(embed_dim=32 if vision.get("timm_proj") != "" else 96, vision_cfg=dict(vision), text_cfg=dict(text))
    folder.mkdir(parents=True)
    save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    config = {"embed_dim": model.visual(torch.zeros(1, 3, size, size)).shape[1], "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return OpenClipEncoder(None, f"local-dir:{folder}", device="cpu", batch_size=16)


def transformers_tower(folder, family):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        FAMILIES[family](folder)
    return TransformersEncoder(f"local-dir:{folder}", device="cpu", batch_size=16)


def able(guard, image=IMAGE):
    found = []
    for method in METHODS:
        try:
            explanation = guard.explain(image, method=method)
        except InputError as error:
            found.append(str(error))
            continue
        assert explanation.method == method
        assert explanation.heat.shape == image.shape[:2]
        assert explanation.heat.dtype == np.float32
        assert explanation.heat.min() >= 0
        assert explanation.heat.max() in (0, 1)
        found.append(method)
    can = [one for one in found if one in METHODS]
    for one in set(found) - set(can):
        assert one.endswith(f"; it can do {', '.join(can)}")
    assert guard.explain(image).method == can[0]
    return [one for one in can if one != "occlusion"]


@pytest.mark.parametrize("tower", TOWERS)
def test_what_a_tower_of_open_clip_can_do(tmp_path, scenes_policy, tower):
    vision, size, expected = TOWERS[tower]
    guard = with_head(open_clip_tower(tmp_path / "m", vision, size), scenes_policy)
    assert able(guard) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_of_transformers_can_do(tmp_path, scenes_policy, family):
    expected = "attention_pooling" if family.startswith("siglip") else "activation" if family.endswith("convnext") else "grad_eclip"
    assert able(with_head(transformers_tower(tmp_path, family), scenes_policy)) == [expected]


def test_what_the_shipped_towers_can_do(guard, scenes_policy):
    assert able(guard) == ["activation", "attention_pooling"]
    assert able(with_head(OpenClipEncoder(None, "guardkit:photos_clip"), scenes_policy)) == ["activation"]


def test_whatever_has_no_gradients_is_occluded(tmp_path, scenes_encoder, scenes_policy):
    write_onnx(tmp_path / "m.onnx")
    for encoder in (OnnxEncoder(str(tmp_path / "m.onnx"), preprocess=STATED, output="pooled"), ImagesOnly(scenes_encoder)):
        assert able(with_head(encoder, scenes_policy)) == []


# --- the formulas, once more by hand ------------------------------------------------------------------------------------


def stretched(grid, shape):
    """A map on a square image of the encoder's own proportions."""
    heat = functional.interpolate(grid[None, None].float(), shape, mode="bilinear", align_corners=False)[0, 0].numpy()
    return heat / heat.max()


def test_grad_eclip_of_open_clip_is_the_formula(tmp_path, scenes_policy):
    guard = with_head(open_clip_tower(tmp_path / "m", VIT, 32), scenes_policy)
    image = np.asarray(picture(5, (80, 80)))
    layer, kept = guard.encoder.model.visual.transformer.resblocks[-1].attn, {}

    def keep(_, inputs, outputs):
        kept["x"], kept["out"] = inputs[0].detach(), outputs[0].detach().requires_grad_()
        return (kept["out"], None)

    hook = layer.register_forward_hook(keep)
    embedding = functional.normalize(guard.encoder.model.encode_image(guard.encoder.preprocess(image)[None]), dim=-1)
    hook.remove()
    (wanted,) = torch.autograd.grad(guard.logits(embedding).sum(), kept["out"])
    queries, keys, values = functional.linear(kept["x"][0], layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
    handed_over = functional.linear(values[1:], layer.out_proj.weight) @ wanted[0, 0]
    alike = functional.cosine_similarity(queries[:1], keys[1:])
    alike = (alike - alike.min()) / (alike.max() - alike.min())
    grid = (handed_over * alike).clamp(min=0).view(4, 4).detach()
    np.testing.assert_allclose(guard.explain(image).heat, stretched(grid, (80, 80)), atol=1e-4)


def test_attention_pooling_of_siglip_is_the_gradient_of_its_attention(tmp_path, scenes_policy):
    guard = with_head(transformers_tower(tmp_path, "siglip"), scenes_policy)
    image = np.asarray(picture(5, (80, 80)))
    vision = guard.encoder.model.vision_model
    pool, kept = vision.head, {}
    hook = pool.register_forward_hook(lambda _, inputs, outputs: kept.update(x=inputs[0].detach()))
    vision(pixel_values=guard.encoder.preprocess(image)[None])
    hook.remove()
    layer, width = pool.attention, pool.probe.shape[-1]
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    query, key, value = (
        functional.linear(one, weight[i * width : (i + 1) * width], bias[i * width : (i + 1) * width]).view(-1, layer.num_heads, width // layer.num_heads)
        for i, one in enumerate((pool.probe[0], kept["x"][0], kept["x"][0]))
    )  # fmt: skip
    attention = (torch.einsum("qhe,nhe->hqn", query, key) / math.sqrt(query.shape[2])).softmax(-1).detach().requires_grad_()
    pooled = layer.out_proj(torch.einsum("hqn,nhe->qhe", attention, value).flatten(1))[None]
    pooled = pooled + pool.mlp(pool.layernorm(pooled))
    embedding = functional.normalize(pooled[:, 0], dim=-1)
    np.testing.assert_allclose(embedding.detach().numpy(), guard.encoder.encode_images([image]), atol=1e-5)
    (gradient,) = torch.autograd.grad(guard.logits(embedding).sum(), attention)
    grid = gradient[:, 0].clamp(min=0).mean(0).view(4, 4)
    np.testing.assert_allclose(guard.explain(image).heat, stretched(grid, (80, 80)), atol=1e-4)


# --- that they find things ----------------------------------------------------------------------------------------------


class Red:
    """An encoder with a convolution or two, whose only feature is how red the reddest place is."""

    name, batch_size, dim, config, fingerprint = "red", 8, 2, {}, "7" * 64

    def __init__(self, **how):
        self.preprocessing = {
            "size": [60, 60],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bilinear",
            "resize_mode": "shortest",
        } | how
        self.n_encoded = 0

    def preprocess(self, image):
        from guardkit.encoders.base import prepare_image

        return prepare_image(image, self.preprocessing)

    def _vectors(self, batch):
        colours = torch.tensor([1.0, -0.5, -0.5]).view(1, 3, 1, 1)
        red = functional.conv2d(functional.conv2d(batch, colours.expand(1, 3, 5, 5) / 25, stride=5), torch.ones(1, 1, 1, 1))
        # the angle says how red: a length would be lost
        reddest = red.relu().amax(dim=(2, 3))
        return functional.normalize(torch.cat([torch.ones_like(reddest), reddest], dim=1), dim=1)

    def encode_preprocessed(self, images, *, fixed_batch=False, normalize=True):
        self.n_encoded += len(images)
        return self._vectors(torch.stack(list(images))).numpy()

    def encode_images(self, images, *, fixed_batch=False, normalize=True):
        return self.encode_preprocessed([self.preprocess(image) for image in images])

    def encode_pixels(self, pixels, *, normalize=True, prepared=False):
        assert prepared
        return self._vectors((pixels - 0.5) / 0.5)


def red_guard(policy, **how):
    encoder = Red(**how)
    head = LinearHead(2, len(policy.categories))
    with torch.no_grad():
        head.linear.weight.zero_()[:, 1] = 5
    return GuardClassifier(head, encoder, policy)


def spotted(height, width, top, left, side):
    image = np.full((height, width, 3), 120, np.uint8)
    image[top : top + side, left : left + side] = (250, 10, 10)
    return image


@pytest.mark.parametrize("method", ["occlusion", "activation"])
@pytest.mark.parametrize(("height", "width", "top", "left"), [(120, 120, 20, 80), (120, 240, 70, 130), (400, 100, 210, 10)])
def test_a_planted_thing_is_found(scenes_policy, method, height, width, top, left):
    explanation = red_guard(scenes_policy).explain(spotted(height, width, top, left, 24), method=method)
    heat = explanation.heat
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert top <= y < top + 24
    assert left <= x < left + 24
    assert heat[top : top + 24, left : left + 24].mean() > 0.5
    far = np.ones_like(heat, bool)
    far[max(0, top - 40) : top + 64, max(0, left - 40) : left + 64] = False
    assert heat[far].max() < 0.1


def test_what_the_crop_cuts_away_is_cold(scenes_policy):
    image = spotted(120, 240, 40, 5, 30)  # the model sees the columns from 60 to 180
    heat = red_guard(scenes_policy).explain(image, method="occlusion").heat
    assert heat.shape == (120, 240)
    assert not heat.any()
    image[40:70, 100:130] = (250, 10, 10)
    heat = red_guard(scenes_policy).explain(image, method="occlusion").heat
    assert not heat[:, :60].any()
    assert not heat[:, 180:].any()
    assert heat[55, 115] > 0.5


@pytest.mark.parametrize("how", [{"resize_mode": "squash"}, {"resize_mode": "longest"}, {"resize": [70, 70]}])
def test_every_preprocessing_is_undone(scenes_policy, how):
    heat = red_guard(scenes_policy, **how).explain(spotted(120, 200, 50, 120, 30), method="occlusion").heat
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert 50 <= y < 80
    assert 120 <= x < 150


@pytest.mark.parametrize("method", ["activation", "occlusion"])
def test_in_drawn_scenes_the_box_of_the_feature_is_hotter_than_chance(guard, method):
    pool = ScenePool("test")
    lifts, hits, areas = [], [], []
    for i in range(8):
        scene = pool.scene(1, i)
        heat = guard.explain(SceneContent(scene, 96).load(), method=method).heat
        x_min, y_min, x_max, y_max = (round(96 * one) for one in find_region(scene))
        inside = heat[y_min:y_max, x_min:x_max]
        areas.append(inside.size / heat.size)
        lifts.append(inside.sum() / heat.sum() / areas[-1])
        hits.append(inside.max() == 1)
    assert np.mean(lifts) > 2  # 1 is chance
    assert np.mean(hits) > 3 * np.mean(areas)


# --- what it gives ------------------------------------------------------------------------------------------------------


def test_score_and_category_are_those_of_predict(guard):
    image = SceneContent(ScenePool("test").scene(1, 0), 96).load()
    decision = guard.predict(image)[0]
    whole, part = guard.explain(image), guard.explain(image, "violence")
    assert isinstance(whole, guardkit.Explanation)
    assert (whole.category, part.category) == (None, "violence")
    assert whole.score == pytest.approx(decision.score, abs=1e-6)
    assert part.score == pytest.approx(decision.categories["violence"], abs=1e-6)
    assert np.abs(whole.heat - part.heat).max() > 0.1
    assert np.array_equal(whole.image, image)
    assert "array" not in repr(whole)


def test_calibration_changes_the_score_and_not_the_map(guard):
    bent = ScoreMap("isotonic", (-1.0, 0.0, 1.0), (-0.2, 0.0, 3.0), (0.1, 2.0))
    calibrated = GuardClassifier(guard.head, guard.encoder, guard.policy, calibration=Calibration(bent))
    for method in ("activation", "attention_pooling", "occlusion"):
        before, after = guard.explain(IMAGE, method=method), calibrated.explain(IMAGE, method=method)
        assert np.array_equal(before.heat, after.heat)
    assert before.score != after.score
    assert after.score == pytest.approx(calibrated.predict(IMAGE)[0].score, abs=1e-6)


def test_a_picture_for_people(guard):
    explanation = guard.explain(IMAGE)
    overlay = explanation.overlay()
    assert overlay.shape == IMAGE.shape
    assert overlay.dtype == np.uint8
    cold = explanation.heat == 0
    assert cold.any()
    assert np.ptp(overlay[cold], axis=1).max() == 0  # grey
    y, x = np.unravel_index(explanation.heat.argmax(), explanation.heat.shape)
    assert overlay[y, x, 0] > overlay[y, x, 2] + 40  # yellow
    hot, grey = np.ones((3, 700_000), np.float32), np.zeros((3, 700_000, 3), np.uint8)  # more than is worked on at once
    wide = Explanation(heat=hot, method="occlusion", category=None, score=0.5, image=grey).overlay()
    assert (wide == wide[0, 0]).all()


@pytest.mark.parametrize("size", [(4000, 3000), (2000, 40), (1, 1), (3, 300)])
def test_any_size_takes_as_many_forwards(scenes_policy, size):
    image = np.asarray(picture(2, size))
    guard = red_guard(scenes_policy)
    assert guard.explain(image, method="occlusion").heat.shape == (size[1], size[0])
    assert guard.encoder.n_encoded == 1 + 107


def test_a_head_that_says_nothing_gives_no_heat(scenes_encoder, scenes_policy, tmp_path):
    for encoder in (scenes_encoder, open_clip_tower(tmp_path / "m", VIT, 32)):
        head = LinearHead(encoder.dim, len(scenes_policy.categories))
        torch.nn.init.zeros_(head.linear.weight)
        explanation = GuardClassifier(head, encoder, scenes_policy).explain(IMAGE)
        assert explanation.method != "occlusion"
        assert not explanation.heat.any()
        assert explanation.overlay().shape == IMAGE.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGE, "gore"), "^category must be one of hate, violence.*, got 'gore'$"),
        ((IMAGE, None, "gradcam"), "^method must be one of auto, grad_eclip, activation, attention_pooling, occlusion, got 'gradcam'$"),
        ((b"no image",), "^not an image of a known type$"),
        (("nowhere.jpg",), "^file does not exist$"),
        (([IMAGE],), "^an image must be a path"),
    ],
)
def test_what_cannot_be_explained_is_said_in_one_line(guard, arguments, message):
    image, category, method = (*arguments, None, None)[:3]
    with pytest.raises(InputError, match=message):
        guard.explain(image, category, method=method or "auto")


def test_a_score_that_is_none_has_no_explanation(scenes_encoder, scenes_policy):
    broken = with_head(scenes_encoder, scenes_policy)
    with torch.no_grad():
        broken.head.linear.weight.fill_(1e38)
    with pytest.raises(InputError, match="^the image has no finite score: the guard's weights"):
        broken.explain(IMAGE)


# --- what it leaves alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["class token", "pooled by attention", "convolutions"])
def test_the_model_is_as_it_was_and_others_may_use_it_meanwhile(tmp_path, scenes_policy, tower):
    vision, size, _ = TOWERS[tower]
    guard = with_head(open_clip_tower(tmp_path / "m", vision, size), scenes_policy)
    before, first = guard.encoder.encode_images([IMAGE] * 3), guard.explain(IMAGE)
    seen, stop = [], threading.Event()

    def use():
        while not stop.is_set():
            seen.append(guard.encoder.encode_images([IMAGE] * 3))

    thread = threading.Thread(target=use)
    thread.start()
    again = [guard.explain(IMAGE) for _ in range(5)]
    stop.set()
    thread.join()
    assert seen
    assert all(np.array_equal(one, before) for one in seen)
    assert all(np.array_equal(one.heat, first.heat) for one in again)
    assert not any(value.requires_grad for value in guard.encoder.model.parameters())


def test_it_works_where_gradients_are_switched_off(tmp_path, scenes_policy):
    guard = with_head(open_clip_tower(tmp_path / "m", VIT, 32), scenes_policy)
    expected = guard.explain(IMAGE)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert np.array_equal(guard.explain(IMAGE).heat, expected.heat)
