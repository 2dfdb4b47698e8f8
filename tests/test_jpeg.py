"""JPEG through the quick decoder: Pillow's pixels and Pillow's verdicts, for whole, unusual and damaged files."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image, ImageCms

from guardkit import jpeg
from guardkit.images import read_frames, read_image
from guardkit.schema import ImageError

EXIF_ORIENTATION = 0x0112
decode = jpeg.decode


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def outcome(data, **options):
    try:
        return read_image(data, **options)
    except ImageError as error:
        return str(error)


@pytest.fixture
def both(monkeypatch):
    """What is read of some bytes, what Pillow alone reads of them, and whether the quick decoder gave the first."""
    given = []

    def spy(*arguments):
        given.append(decode(*arguments))
        return given[-1]

    def read(data, **options):
        given.clear()
        monkeypatch.setattr(jpeg, "decode", spy)
        quick = outcome(data, **options)
        monkeypatch.setattr(jpeg, "decode", lambda *_: None)
        return quick, outcome(data, **options), any(one is not None for one in given)

    return read


WAYS = [
    *({"quality": quality, "subsampling": sampling} for quality in (15, 75, 98) for sampling in (0, 1, 2)),
    {"progressive": True},
    {"progressive": True, "subsampling": 0, "restart_marker_blocks": 3},
    {"restart_marker_rows": 1},
    {"optimize": True, "comment": b"\xff\xd9 a comment \xff\xda"},
    {"keep_rgb": True},
    {"quality": 90, "dpi": (300, 300)},
]


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (33, 64), (151, 97)])
def test_pixels_are_pillows_to_the_last_bit(both, size):
    for seed, how in enumerate(WAYS):
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        for image in (picture(seed, size), Image.fromarray(noise)):
            quick, expected, was_quick = both(encoded(image, **how))
            np.testing.assert_array_equal(quick, expected, err_msg=str(how))
            assert was_quick, how
            assert quick.flags.writeable
            assert quick.flags.c_contiguous


def test_every_orientation_is_undone(both):
    upright, exif = picture(1, (96, 61)), Image.Exif()
    for orientation in range(10):  # 0 and 9 mean nothing
        exif[EXIF_ORIENTATION] = orientation
        quick, expected, was_quick = both(encoded(upright, exif=exif))
        np.testing.assert_array_equal(quick, expected)
        assert quick.shape == ((96, 61, 3) if 5 <= orientation <= 8 else (61, 96, 3))
        assert was_quick


def test_what_lies_behind_the_image_is_left_alone(both):
    whole = encoded(picture(1))
    for tail in (b"junk" * 50, whole, b"\xff\xda" * 9):
        quick, expected, was_quick = both(whole + tail)
        np.testing.assert_array_equal(quick, expected)
        assert was_quick
    many = encoded(picture(2), "MPO", save_all=True, append_images=[picture(3)])
    quick, expected, was_quick = both(many)
    np.testing.assert_array_equal(quick, expected)
    assert was_quick
    (frame,) = read_frames(many, np.copy)
    np.testing.assert_array_equal(frame, quick)


def test_unusual_files_are_pillows(both):
    image = picture(1)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    unusual = {
        "grey": encoded(image.convert("L")),
        "CMYK": encoded(image.convert("CMYK")),
        "a colour profile": encoded(image, icc_profile=profile),
        "a type that its name does not say": encoded(image, "PNG"),
    }
    for what, data in unusual.items():
        quick, expected, was_quick = both(data)
        np.testing.assert_array_equal(quick, expected, err_msg=what)
        assert not was_quick, what


def frame_at(data):
    """Where a baseline JPEG says its precision."""
    return data.index(b"\xff\xc0") + 4


def test_damaged_headers_are_pillows_to_judge(both):
    whole = encoded(picture(1))
    at = frame_at(whole)
    cases = {
        "12 bits": whole[:at] + b"\x0c" + whole[at + 1 :],
        "65,500 x 65,500": whole[:at] + b"\x08\xff\xdc\xff\xdc" + whole[at + 5 :],
        "less high than it is": whole[:at] + b"\x08\x00\x21" + whole[at + 3 :],
        "two frames, the second huge": whole[: at - 4]
        + whole[at - 4 : at + 15]
        + whole[at - 4 : at + 1]
        + b"\xff\xdc\xff\xdc"
        + whole[at + 5 :],
        "two scans of one": whole[:-2] + whole[whole.index(b"\xff\xda") :],
        "bytes between segments": whole[: at - 4] + b"\x00\x00" + whole[at - 4 :],
        "no end": whole[:-2],
        "half": whole[: len(whole) // 2],
        "an end too soon": whole[: len(whole) // 2] + b"\xff\xd9",
        "nothing but the header": whole[: whole.index(b"\xff\xda")],
    }
    for what, data in cases.items():
        quick, expected, _ = both(data, max_pixels=10**6)
        assert type(quick) is type(expected), what
        np.testing.assert_array_equal(quick, expected, err_msg=what)


def test_more_scans_than_the_work_allows_are_refused_before_anything_is_decoded(both, monkeypatch):
    data = encoded(picture(1, (300, 200)), progressive=True)
    monkeypatch.setattr("guardkit.limits.MAX_SCANNED", 5 * 300 * 200)
    quick, expected, was_quick = both(data)
    assert quick == expected == "a JPEG of 300x200 in more than 5 scans"
    assert not was_quick


def test_damaged_bytes_are_read_or_refused_as_pillow_does(both):
    rng = random.Random(0)
    files = [encoded(picture(seed, (61, 45)), **how) for seed, how in enumerate(WAYS[7:])]
    tried = refused = was_quick = 0
    for _ in range(400):
        data = bytearray(rng.choice(files))
        at = rng.randrange(2, len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.choice([1, 10, 100])]
            case 2:
                data[at:at] = rng.randbytes(rng.choice([1, 10]))
            case 3:
                data[at : at + 2] = bytes([0xFF, rng.choice([0x00, 0xD9, 0xD0, 0xD3, 0xDA, 0xC4, 0xFF])])
        quick, expected, used = both(bytes(data))
        np.testing.assert_array_equal(quick, expected)
        tried, refused, was_quick = tried + 1, refused + isinstance(quick, str), was_quick + used
    assert refused > 40
    assert was_quick > 100


def test_without_a_decoder_that_agrees_all_is_pillows(both, monkeypatch):
    data = encoded(picture(1))
    jpeg._decoder.cache_clear()
    monkeypatch.setattr("torchvision.io.decode_jpeg", lambda data, mode: torch.zeros(3, 29, 37, dtype=torch.uint8))
    quick, expected, was_quick = both(data)
    monkeypatch.undo()
    jpeg._decoder.cache_clear()
    np.testing.assert_array_equal(quick, expected)
    assert not was_quick
