"""Everyday edits: what each does to pixels, the same every time, in growing strength, on images of any size."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROOT, picture

from guardkit.images import ArrayContent
from guardkit.robustness.perturbations import EDITS, STRENGTHS, PerturbedContent, gaussian_noise, perturb
from guardkit.schema import InputError

IMAGE = np.asarray(picture(3, (120, 90)))
RANDOM = ("crop", "border", "watermark", "screenshot")
RNG = np.random.default_rng(0)
TEXTURED = np.clip(IMAGE.astype(int) + RNG.integers(-40, 41, IMAGE.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_images_and_repeatable(edit):
    before = IMAGE.copy()
    for strength in STRENGTHS:
        once, again = perturb(IMAGE, edit, strength, seed=5), perturb(IMAGE.copy(), edit, strength, seed=5)
        assert once.dtype == np.uint8
        assert once.ndim == 3
        assert once.shape[2] == 3
        assert once.flags.c_contiguous
        np.testing.assert_array_equal(once, again)
        assert once.shape != IMAGE.shape or (once != IMAGE).any()
    np.testing.assert_array_equal(IMAGE, before)
    seeds = {perturb(IMAGE, edit, 4, seed=seed).tobytes() for seed in range(6)}
    assert (len(seeds) > 1) == (edit in RANDOM)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 200), (300, 4)])
def test_edits_take_images_of_any_size(edit, shape):
    for strength in STRENGTHS:
        assert perturb(np.full((*shape, 3), 7, np.uint8), edit, strength).size


@pytest.mark.parametrize("edit", ["jpeg", "resize", "blur", "grey", "watermark", "mosaic"])
def test_a_larger_strength_changes_more(edit):
    changes = [np.abs(perturb(TEXTURED, edit, strength).astype(float) - TEXTURED).mean() for strength in STRENGTHS]
    assert changes == sorted(changes)
    assert changes[0] > 0
    assert changes[-1] > 1.25 * changes[0]


def test_what_is_random_stays_in_place_when_the_strength_grows():
    colours = {tuple(perturb(IMAGE, "border", strength, seed=2)[0, 0]) for strength in STRENGTHS}
    assert len(colours) == 1
    pages = {tuple(perturb(IMAGE, "screenshot", strength, seed=2)[-40, 0]) for strength in STRENGTHS}
    assert len(pages) == 1


def test_crop_and_border_have_the_stated_size():
    assert perturb(IMAGE, "crop", 5).shape == (54, 72, 3)
    assert any((perturb(IMAGE, "crop", 5) == IMAGE[top : top + 54, left : left + 72]).all() for top in range(37) for left in range(49))
    bordered = perturb(IMAGE, "border", 3)
    assert bordered.shape == (90 + 36, 120 + 36, 3)
    np.testing.assert_array_equal(bordered[18:-18, 18:-18], IMAGE)
    assert (bordered[:18] == bordered[0, 0]).all()


def test_flips_are_the_five_kinds():
    kinds = [perturb(IMAGE, "flip", strength) for strength in STRENGTHS]
    expected = [IMAGE[:, ::-1], np.rot90(IMAGE, 3), IMAGE[::-1], IMAGE[::-1, ::-1], IMAGE.swapaxes(0, 1)]
    for kind, wanted in zip(kinds, expected, strict=True):
        np.testing.assert_array_equal(kind, wanted)


def test_grey_takes_the_colour_out():
    grey = perturb(IMAGE, "grey", 5)
    assert (grey == grey[:, :, :1]).all()
    np.testing.assert_allclose(grey[:, :, 0], IMAGE @ [0.299, 0.587, 0.114], atol=0.51)
    half = perturb(IMAGE, "grey", 2).astype(float)
    np.testing.assert_allclose(half, (IMAGE.astype(float) + (IMAGE @ [0.299, 0.587, 0.114])[:, :, None]) / 2, atol=0.51)


def test_jpeg_keeps_colours_and_is_what_pillow_reads():
    import io

    from PIL import Image

    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 220
    assert np.abs(perturb(red, "jpeg", 5).astype(int) - red).max() < 20
    data = io.BytesIO()
    Image.fromarray(TEXTURED).save(data, "JPEG", quality=30)
    other = np.asarray(Image.open(data)).astype(float)
    ours = perturb(TEXTURED, "jpeg", 3).astype(float)
    # two JPEG libraries may round differently
    assert np.abs(ours - other).mean() < 0.1 * np.abs(ours - TEXTURED).mean()


def test_mosaic_blocks_and_blur():
    blocks = perturb(TEXTURED, "mosaic", 5)  # round(0.065 * 90) = 6
    assert (blocks.reshape(15, 6, 20, 6, 3) == blocks[::6, ::6].reshape(15, 1, 20, 1, 3)).all()
    np.testing.assert_allclose(blocks[0, 0], TEXTURED[:6, :6].mean(axis=(0, 1)), atol=0.51)
    step = np.zeros((80, 80, 3), np.uint8)
    step[:, 40:] = 255
    profile = np.diff(perturb(step, "blur", 5)[40, :, 0].astype(float))  # 0.04 * 80 = 3.2 pixels
    mean = (np.arange(79) * profile).sum() / profile.sum()
    std = ((np.arange(79) - mean) ** 2 * profile).sum() / profile.sum()
    assert std**0.5 == pytest.approx(3.2, rel=0.05)


def test_a_screenshot_holds_the_image_and_watermarks_are_white():
    for strength, share in zip(STRENGTHS, EDITS["screenshot"].values, strict=True):
        screen = perturb(IMAGE, "screenshot", strength)
        assert screen.shape[1] == round(120 / share)
        assert screen.shape[0] >= 2 * screen.shape[1]
        left = (screen.shape[1] - 120) // 2
        assert any((screen[top : top + 90, left : left + 120] == IMAGE).all() for top in range(screen.shape[0] - 90))
    dark = np.zeros((200, 200, 3), np.uint8)
    marked = perturb(dark, "watermark", 3)
    assert marked.max() == 128  # half of white
    assert 0.01 < (marked > 0).mean() < 0.4


def test_noise_has_the_stated_deviation_and_scales():
    grey = np.full((100, 100, 3), 128, np.uint8)
    for std in (4, 16):
        difference = gaussian_noise(grey, std, seed=1).astype(float) - 128
        assert difference.std() == pytest.approx((std**2 + 1 / 12) ** 0.5, rel=0.02)
        assert abs(difference.mean()) < 0.3
    np.testing.assert_allclose(
        gaussian_noise(grey, 16, seed=1).astype(float) - 128, 4 * (gaussian_noise(grey, 4, seed=1).astype(float) - 128), atol=2.6
    )
    np.testing.assert_array_equal(gaussian_noise(grey, 0), grey)
    assert (gaussian_noise(grey, 8, seed=1) != gaussian_noise(grey, 8, seed=2)).any()


def test_edited_contents_load_what_perturb_gives_and_have_keys_of_their_own():
    original = ArrayContent(IMAGE)
    content = PerturbedContent(original, "jpeg", 3, 1)
    np.testing.assert_array_equal(content.load(), perturb(IMAGE, "jpeg", 3, seed=1))
    np.testing.assert_array_equal(PerturbedContent(original, "noise", 8, 1).load(), gaussian_noise(IMAGE, 8, seed=1))
    others = [
        original,
        ArrayContent(IMAGE.reshape(120, 90, 3)),
        content,
        PerturbedContent(original, "blur", 3, 1),
        PerturbedContent(original, "jpeg", 4, 1),
        PerturbedContent(original, "jpeg", 3, 2),
        PerturbedContent(ArrayContent(TEXTURED), "jpeg", 3, 1),
    ]
    assert len({one.key for one in others}) == len(others)
    assert ArrayContent(IMAGE.copy()).key == original.key
    np.testing.assert_array_equal(original.load(), IMAGE)


@pytest.mark.parametrize(
    ("edit", "strength", "message"),
    [
        ("sepia", 1, "there is no edit 'sepia'; there are jpeg, crop, .*screenshot"),
        ("jpeg", 6, "strength of an edit must be one of 1, 2, 3, 4, 5, got 6"),
        ("jpeg", 0, "got 0"),
    ],
)
def test_unknown_edits_are_refused(edit, strength, message):
    with pytest.raises(InputError, match=message):
        perturb(IMAGE, edit, strength)
    with pytest.raises(InputError, match="at least 0 of 255 levels, got -1"):
        gaussian_noise(IMAGE, -1)


def test_the_page_states_every_parameter():
    page = (ROOT / "docs/robustness.md").read_text()
    for name, edit in EDITS.items():
        assert f"| `{name}` | {edit.parameter} | {', '.join(f'{value:g}' for value in edit.values)} |" in page
