"""Reading untrusted images: pixel values of unusual files, reasons for bad ones, no exception of another kind."""

from __future__ import annotations

import io
import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, picture
from PIL import Image, ImageCms

from guardkit.data.duplicates import near_duplicate_groups, perceptual_hash
from guardkit.images import ArrayContent, FileContent, decode_png, encode_png, read_image
from guardkit.schema import ImageError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_exif_orientation_is_undone():
    upright = np.asarray(picture(1, (64, 32)))
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2)}
    stored |= {6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1)}
    for orientation, pixels in stored.items():
        image = Image.fromarray(np.ascontiguousarray(pixels))
        exif = image.getexif()
        exif[0x0112] = orientation
        for kind in ("PNG", "TIFF"):
            np.testing.assert_array_equal(read_image(encoded(image, kind, exif=exif)), upright, err_msg=f"{kind} {orientation}")


def test_damaged_exif_does_not_cost_the_image():
    broken = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\xff\xff" + bytes(range(40))
    assert read_image(encoded(picture(1), "JPEG", exif=broken)).shape == (64, 96, 3)


def test_transparent_pixels_lie_on_white():
    half = read_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert abs(int(half[0, 0, 0]) - 127) <= 1
    assert (read_image(encoded(Image.new("LA", (2, 2), (0, 0)))) == 255).all()
    assert (read_image(encoded(Image.new("RGB", (2, 2), (10, 20, 30)), transparency=(10, 20, 30))) == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert read_image(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    assert read_image(encoded(palette, "GIF", transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_sixteen_bits_are_scaled():
    ramp = np.array([[0, 257, 32896, 65535]], np.uint16)
    expected = [0, 1, 128, 255]
    assert read_image(encoded(Image.fromarray(ramp)))[0, :, 0].tolist() == expected
    assert read_image(encoded(Image.fromarray(ramp), "TIFF"))[0, :, 0].tolist() == expected
    assert read_image(Image.fromarray(ramp.astype(np.int32)))[0, :, 0].tolist() == expected
    white_is_zero = encoded(Image.fromarray(ramp), "TIFF", tiffinfo={262: 0})
    assert read_image(white_is_zero)[0, :, 0].tolist() == [255 - value for value in expected]
    with pytest.raises(ImageError, match="no defined white"):
        read_image(Image.fromarray(np.array([[70_000]], np.int32)))


def test_cmyk_with_a_profile_of_another_kind_is_read_plainly():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = read_image(encoded(image, "JPEG", quality=95))
    for profile in (srgb, b"no profile"):
        np.testing.assert_array_equal(read_image(encoded(image, "JPEG", quality=95, icc_profile=profile)), plain)


def test_all_ways_to_give_an_image_agree(tmp_path):
    image = picture(2)
    data = encoded(image)
    (tmp_path / "png_called.jpg").write_bytes(data)
    pixels = np.asarray(image)
    for source in (tmp_path / "png_called.jpg", str(tmp_path / "png_called.jpg"), data, bytearray(data), image, pixels):
        read = read_image(source)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, pixels)
    assert read_image(data).flags.writeable
    assert read_image(pixels[..., 0]).shape == pixels.shape
    assert read_image(encoded(image.convert("RGB"), "MPO", save_all=True, append_images=[picture(3)], quality=95)).shape == pixels.shape


def test_max_pixels_holds_for_every_source(tmp_path):
    image = picture(2, (20, 10))
    image.save(tmp_path / "a.png")
    for source in (image, np.asarray(image), encoded(image), tmp_path / "a.png"):
        assert read_image(source, max_pixels=200).shape == (10, 20, 3)
        with pytest.raises(ImageError, match="20x10 is more than 199 pixels"):
            read_image(source, max_pixels=199)


@pytest.mark.parametrize("source", [None, 5, [1], object()])
def test_other_things_than_images_get_a_reason(source):
    with pytest.raises(ImageError, match="must be a path, bytes, a PIL image or an array, got"):
        read_image(source)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="pipe or device"):
        read_image(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="pipe or device"):
        FileContent(tmp_path / "pipe.png").key  # noqa: B018


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_damaged_bytes_raise_nothing_but_image_errors(kind):
    rng = random.Random(kind)
    whole = encoded(picture(4, (40, 30)).convert("P" if kind == "GIF" else "RGB"), kind)
    rejected = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 4, 12])):
            data[rng.randrange(min(len(data), rng.choice([40, 300, len(data)])))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            assert read_image(bytes(data), max_pixels=10**6).dtype == np.uint8
        except ImageError:
            rejected += 1
    assert rejected > 10


def test_threads_leave_the_warning_filters_alone():
    before = list(warnings.filters)
    sources = [encoded(picture(seed), "TIFF") for seed in range(8)] * 20
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(read_image, sources))) == len(sources)
    assert warnings.filters == before


def test_what_pillow_warns_about_is_read_or_rejected_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    assert read_image(encoded(picture(1, (50, 40)))).shape == (40, 50, 3)  # a warning of Pillow's would be an error here
    with pytest.raises(ImageError, match="more than 3000 pixels"):
        read_image(encoded(picture(1, (100, 40))))


def test_png_helpers_refuse_what_would_not_come_back():
    for wrong in (np.zeros((4, 4, 3), np.uint16), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"must be \(h, w, 3\) uint8"):
            encode_png(wrong)
    data = encode_png(np.asarray(picture(5)))
    for damaged in (b"", data[:50], data[: len(data) // 2]):
        with pytest.raises(ImageError):
            decode_png(damaged)


def test_array_content_is_named_by_shape_and_values():
    array = np.asarray(picture(6, (8, 4)))
    assert ArrayContent(array).key == ArrayContent(array.copy()).key
    assert ArrayContent(array).key == ArrayContent(np.asfortranarray(array)).key
    assert ArrayContent(array).key != ArrayContent(array.reshape(8, 4, 3)).key
    assert ArrayContent(array).key != ArrayContent(array + 1).key
    np.testing.assert_array_equal(ArrayContent(array).load(), array)


def test_file_content_of_nothing_has_no_key(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        FileContent(tmp_path / "none.png").key  # noqa: B018
    assert FileContent(tmp_path / "a", 5) == FileContent(tmp_path / "a", 5)


def textured(seed):
    """A drawn picture with coarse and fine structure, as photographs have."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((160, 120), Image.Resampling.BICUBIC) for n in (4, 12)
    ]
    return Image.blend(*layers, 0.4)


def copies(image):
    yield image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    yield Image.open(io.BytesIO(encoded(image, "JPEG", quality=60)))
    yield image.point(lambda value: min(255, int(value * 1.03 + 3)))


def test_copies_are_grouped():
    originals = [textured(seed) for seed in range(30)]
    hashes = [perceptual_hash(read_image(one)) for image in originals for one in (image, *copies(image))]
    groups = near_duplicate_groups(np.array(hashes, np.uint64)).reshape(-1, 4)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0].tolist())) == 30


def test_images_without_structure_are_grouped_only_with_their_equals():
    stripes = []
    for seed in range(30):
        column = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 1), dtype=np.uint8))
        stripes.append(np.asarray(column.resize((1, 90), Image.Resampling.BICUBIC).resize((120, 90)).convert("RGB")))
    blank = [np.full((40, 60, 3), value, np.uint8) for value in range(0, 250, 10)]
    images = [*stripes, *blank, blank[3][:20, :20], stripes[2].copy()]
    groups = near_duplicate_groups(np.array([perceptual_hash(image) for image in images], np.uint64))
    assert len(set(groups.tolist())) == 55
    assert groups[-2] == groups[33]
    assert groups[-1] == groups[2]


def test_crowded_bands_are_grouped_rightly():
    rng = np.random.default_rng(3)
    # all share 40 bits, so every band but two is one bucket; what is near follows from comparing all
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64) & np.uint64(0xFFFFFF)
    for distance in (0, 1, 4, 7, 15):
        groups = near_duplicate_groups(hashes, distance)
        near = np.array([[(int(a) ^ int(b)).bit_count() <= distance for b in hashes] for a in hashes])
        reach = near
        while (reach @ reach != reach).any():
            reach = reach @ reach
        np.testing.assert_array_equal(groups[:, None] == groups[None], reach)
    assert near_duplicate_groups(np.zeros(0, np.uint64)).tolist() == []
    with pytest.raises(ValueError, match=r"max_distance must lie in \[0, 15\], got 16"):
        near_duplicate_groups(hashes, 16)


def test_copies_of_real_photographs_are_grouped():
    root = ROOT.parent / "shared/data/photos"
    if not root.is_dir():
        pytest.skip("the photographs are not here")
    images = [Image.fromarray(read_image(path)) for path in sorted(root.glob("*.jpg"))[::6]]
    hashes = [perceptual_hash(read_image(one)) for image in images for one in (image, *copies(image))]
    groups = near_duplicate_groups(np.array(hashes, np.uint64)).reshape(-1, 4)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0].tolist())) == len(images)
