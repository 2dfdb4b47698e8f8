"""Ways to read images for one model: how far they are apart, and whose way counts when two meet."""

from __future__ import annotations

import io
import logging
import pickle
import re

import cv2
import numpy as np
import pytest
import torch
from conftest import embed_records, picture
from PIL import Image

from guardkit import GuardClassifier, train_guard
from guardkit.artifacts import fingerprint, read_json, write_json
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import prepare_image
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.encoders.ways import drawn_images
from guardkit.heads import LinearHead
from guardkit.images import ArrayContent, BytesContent, FileContent, read_frames, read_image
from guardkit.schema import ImageError, InputError, Record

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1 / 255] * 3}  # so that what is prepared are levels of 255
SIZES = [(224, 224), (225, 300), (301, 224), (500, 400), (90, 70), (640, 101), (1203, 811)]
FILES = drawn_images()
IMAGES = [read_image(data) for data in FILES]


@pytest.fixture(scope="module")
def quick(scenes_encoder):
    return OpenClipEncoder(None, "guardkit:scenes_clip", backend="torchvision", device="cpu", batch_size=scenes_encoder.batch_size)


@pytest.fixture(scope="module")
def guard(scenes_policy, scenes_encoder):
    head = LinearHead(scenes_encoder.dim, len(scenes_policy.categories))
    torch.nn.init.normal_(head.linear.weight, std=3, generator=torch.Generator().manual_seed(0))
    return GuardClassifier(head, scenes_encoder, scenes_policy)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_they_are_at_most_two_levels_apart(mode, interpolation):
    said = {"size": [224, 224], "interpolation": interpolation, "resize_mode": mode, **PLAIN}
    for number, size in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        for image in (np.asarray(picture(number, size)), noise):
            pil, torchvision = (prepare_image(image, {**said, **how}).numpy() for how in ({}, {"backend": "torchvision"}))
            apart = np.abs(pil - torchvision)
            assert apart.max() <= 2.001, size
            assert apart.mean() < 0.1, size
            assert size != (224, 224) or not apart.any()


def test_nothing_moves_where_images_have_the_models_size(scenes_encoder, quick):
    drawn = [np.asarray(picture(seed, (64, 64))) for seed in range(4)]
    np.testing.assert_array_equal(scenes_encoder.encode_images(drawn), quick.encode_images(drawn))


def test_the_way_is_part_of_the_encoder_and_pillows_is_that_of_earlier_versions(scenes_encoder, quick):
    assert scenes_encoder.fingerprint.startswith("90e806c9f9ea")  # as guardkit has always called it
    assert "backend" not in scenes_encoder.preprocessing
    assert OpenClipEncoder(None, "guardkit:scenes_clip", backend="pil").fingerprint == scenes_encoder.fingerprint
    assert quick.preprocessing == {**scenes_encoder.preprocessing, "backend": "torchvision"}
    assert quick.fingerprint != scenes_encoder.fingerprint
    there_and_back = quick.going({"backend": "pil"})
    assert there_and_back.fingerprint == scenes_encoder.fingerprint
    assert there_and_back.model is quick.model
    np.testing.assert_array_equal(there_and_back.encode_images(IMAGES), scenes_encoder.encode_images(IMAGES))
    with pytest.raises(InputError, match="encoder.backend must be one of .*pil, torchvision, got 'cv2'"):
        OpenClipEncoder(None, "guardkit:scenes_clip", backend="cv2")


def test_a_guard_keeps_its_own_way(guard, quick, tmp_path, caplog):
    expected = [one.score for one in guard.predict(IMAGES)]
    folder = guard.save_pretrained(tmp_path / "guard")
    config = read_json(folder / "config.json", "a guard")
    del config["digest"], config["encoder"]["config"]["backend"], config["encoder"]["config"]["decode"]  # as earlier versions wrote it
    write_json(folder / "config.json", config | {"digest": fingerprint(config)})
    for encoder in (None, "guardkit:scenes_clip"):
        loaded = GuardClassifier.from_pretrained(folder, encoder=encoder, batch_size=guard.encoder.batch_size)
        assert [one.score for one in loaded.predict(IMAGES)] == expected
    fast = GuardClassifier(guard.head, quick, guard.policy).save_pretrained(tmp_path / "fast")
    for encoder in (None, "guardkit:scenes_clip"):
        loaded = GuardClassifier.from_pretrained(fast, encoder=encoder)
        assert loaded.encoder.fingerprint == quick.fingerprint
    assert not caplog.records


def test_a_guard_on_the_other_way_says_how_far_its_scores_moved(guard, quick, tmp_path, caplog):
    folder = guard.save_pretrained(tmp_path / "guard")
    with caplog.at_level(logging.WARNING):
        loaded = GuardClassifier.from_pretrained(folder, encoder=quick)
    assert loaded.encoder is quick
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(
        r"trained with backend=pil decode=full dtype=float32 and is given guardkit:scenes_clip with backend=torchvision decode=full dtype=float32: on 8",
        said,
    )
    moved = np.abs(guard.probabilities(guard.encoder.encode_images(IMAGES)) - guard.probabilities(quick.encode_images(IMAGES))).max()
    assert f"moved by up to {moved:.4f};" in said
    assert 0 < moved < 0.05


def test_other_weights_are_refused_on_either_way(guard, tmp_path):
    folder = guard.save_pretrained(tmp_path / "guard")
    for backend in ("pil", "torchvision"):
        with pytest.raises(InputError, match="use the first, or train a guard on the second"):
            GuardClassifier.from_pretrained(folder, encoder=OpenClipEncoder(None, "guardkit:photos_clip", backend=backend))


def test_stored_embeddings_keep_their_way(scenes_policy, scenes_encoder, quick, tmp_path, caplog):
    from guardkit.data.sources.embeddings import EmbeddingsSource

    images = [np.asarray(picture(seed, (120, 90))) for seed in range(40)]
    category = scenes_policy.category_names[0]
    records = [
        Record(f"{i}.png", i % 2, category if i % 2 else None, "test", str(i), ArrayContent(image)) for i, image in enumerate(images)
    ]
    folder = tmp_path / "embeddings"
    embed_records(records, scenes_encoder, folder)
    assert "backend" not in read_json(folder / "manifest.json", "a manifest")["preprocessing"]
    settings = {"arm": "unpaired", "head": "linear", "n_unsafe": 8, "trainer": {"max_epochs": 1, "enable_progress_bar": False}}
    with caplog.at_level(logging.WARNING):
        fitted = train_guard(
            EmbeddingsSource(scenes_policy, str(folder)), scenes_policy, encoder=quick, output_dir=tmp_path / "run", **settings
        )
    assert fitted.guard.encoder.fingerprint == scenes_encoder.fingerprint
    assert (
        "the source's embeddings are of encoder guardkit:scenes_clip with backend=pil decode=full dtype=float32, and so images are read here too"
        in caplog.text
    )


def jpeg(size, **options):
    buffer = io.BytesIO()
    picture(1, size).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((128, 128), (128, 128)), ((255, 600), (255, 600)), ((256, 300), (128, 150)), ((900, 513), (225, 129)), ((4096, 1030), (512, 129))],
)
def test_a_large_file_is_decoded_at_a_fraction_and_never_below_twice_what_the_model_sees(size, expected):
    data = jpeg(size)
    assert read_image(data, at_least=128).shape == (*expected[::-1], 3)
    full = cv2.resize(read_image(data), expected, interpolation=cv2.INTER_AREA)
    assert np.abs(full.astype(int) - read_image(data, at_least=128)).mean() < 3
    (frame,) = read_frames(data, np.copy, at_least=128)
    np.testing.assert_array_equal(frame, read_image(data, at_least=128))


def test_a_reduced_file_is_upright_and_as_strictly_judged():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(jpeg((900, 513), exif=exif), at_least=128).shape == (225, 129, 3)
    whole = jpeg((900, 513))
    for options in ({"max_pixels": 900 * 512}, {"at_least": 128, "max_pixels": 900 * 512}):
        with pytest.raises(ImageError, match="900x513 is more than 460800 pixels"):
            read_image(whole, **options)
    with pytest.raises(ImageError, match="damaged image"):
        read_image(whole[: len(whole) // 2], at_least=128)


def test_reduced_decoding_is_part_of_the_encoder_and_the_same_everywhere(scenes_encoder, guard, tmp_path, caplog):
    from guardkit.moderation.stream import Moderator, Options
    from guardkit.shards.base import Given

    reduced = OpenClipEncoder(None, "guardkit:scenes_clip", decode="reduced", device="cpu", batch_size=scenes_encoder.batch_size)
    assert reduced.at_least == 128
    assert reduced.preprocessing == {**scenes_encoder.preprocessing, "decode": "reduced"}
    assert len({reduced.fingerprint, scenes_encoder.fingerprint}) == 2
    path = tmp_path / "a.jpg"
    path.write_bytes(FILES[0])
    contents = [FileContent(path), *(BytesContent(data, "b", 10**8) for data in FILES)]
    vectors = EmbeddingStore(reduced, None).embed(contents)
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert 1e-4 < np.abs(vectors - EmbeddingStore(scenes_encoder, None).embed(contents)).max() < 0.1
    here = GuardClassifier(guard.head, reduced, guard.policy)
    scores = here.probabilities(vectors)[1:, 0]
    np.testing.assert_allclose([one.score for one in here.predict(FILES)], scores, atol=1e-6)
    decided = Moderator(here, Options(), []).decide([Given(str(n), data) for n, data in enumerate(FILES)])
    np.testing.assert_allclose([one.decision.score for one in decided], scores, atol=1e-6)
    folder = here.save_pretrained(tmp_path / "guard")
    assert GuardClassifier.from_pretrained(folder).encoder.fingerprint == reduced.fingerprint
    assert not caplog.records
    GuardClassifier.from_pretrained(folder, encoder=scenes_encoder)
    moved = np.abs(guard.probabilities(guard.encoder.encode_images(IMAGES)) - here.probabilities(vectors[1:])).max()
    assert (
        "trained with backend=pil decode=reduced dtype=float32 and is given guardkit:scenes_clip with backend=pil decode=full"
        in caplog.text
    )
    assert f"moved by up to {moved:.4f};" in caplog.text


def test_bfloat16_is_another_encoder_of_the_same_model(scenes_encoder, guard, tmp_path, caplog):
    with pytest.raises(InputError, match="encoder.dtype must be one of float32, bfloat16, got 'float16'"):
        OpenClipEncoder(None, "guardkit:scenes_clip", dtype="float16")
    cast = OpenClipEncoder(None, "guardkit:scenes_clip", dtype="bfloat16", device="cpu", batch_size=5)
    plain = cast.going({"dtype": "float32"})
    assert (plain.fingerprint, plain.model) == (scenes_encoder.fingerprint, cast.model)
    assert cast.fingerprint != plain.fingerprint
    assert pickle.loads(pickle.dumps(cast)).fingerprint == cast.fingerprint
    here, there = cast.encode_images(IMAGES), plain.encode_images(IMAGES)
    assert 1e-4 < np.abs(here - there).max() < 0.1
    alone = np.concatenate([cast.encode_images([image], fixed_batch=True) for image in IMAGES])
    np.testing.assert_array_equal(cast.encode_images(IMAGES, fixed_batch=True), alone)
    np.testing.assert_array_equal(cast.encode_texts(["a red hand"]), plain.encode_texts(["a red hand"]))
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cast.encode_pixels(pixels), plain.encode_pixels(pixels))

    folder = GuardClassifier(guard.head, cast, guard.policy).save_pretrained(tmp_path / "guard")
    for encoder in (None, "guardkit:scenes_clip"):
        loaded = GuardClassifier.from_pretrained(folder, encoder=encoder, batch_size=5)
        assert loaded.encoder.dtype == "bfloat16"
        np.testing.assert_array_equal(loaded.encoder.encode_images(IMAGES), here)
    assert not caplog.records
    GuardClassifier.from_pretrained(folder, encoder=plain)
    moved = np.abs(guard.probabilities(here) - guard.probabilities(there)).max()
    assert "decode=full dtype=bfloat16 and is given guardkit:scenes_clip with backend=pil decode=full dtype=float32" in caplog.text
    assert f"moved by up to {moved:.4f};" in caplog.text


def test_a_model_that_does_not_compute_in_bfloat16_says_so():
    cast = OpenClipEncoder(None, "guardkit:scenes_clip", dtype="bfloat16", device="cpu")
    for weight in cast.model.visual.parameters():
        weight.mul_(1e38)
    with pytest.raises(InputError, match="does not compute in bfloat16 .*not finite.*; take encoder.dtype=float32"):
        cast.encode_images(IMAGES[:1])
