"""What a guard remembers of its training images: enough to know them again, and nothing that shows them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guardkit import GuardClassifier
from guardkit.heads import LinearHead
from guardkit.schema import ImageError, InputError, Record
from guardkit.seen import FILE, Known, SeenImages


@dataclass(frozen=True)
class Named:
    key: str

    def load(self):
        raise ImageError("nobody reads it")


class Gone:
    @property
    def key(self):
        raise ImageError("no such file")


def record(key=None, **more):
    return Record("x", 1, None, "a", "x", None if key is None else Named(key), **more)


def unit(n, dim=64, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_an_image_is_known_by_content_looks_group_or_embedding(tmp_path):
    vectors = unit(6)
    seen = SeenImages.of(
        [
            ("train", record("file-1:aa", perceptual_hash=0b1111, listed_group="street"), vectors[0]),
            ("validation", record("file-1:bb"), vectors[1]),
            ("train", record(embedding=vectors[2]), vectors[2]),
            ("unlabelled", record("file-1:cc", listed_group="field"), vectors[3]),
            ("train", Record("x", 1, None, "a", "x", Gone()), None),  # nothing to know it by
        ]
    )
    assert (len(seen), seen.count("train"), seen.count("unlabelled")) == (4, 2, 1)
    seen.save(tmp_path / FILE)
    stored = (vectors[0].astype(np.float16)).astype(np.float32)
    asked = [
        (record("file-2:aa"), 0, Known("train", "content")),  # another reader, the same bytes
        (record("file-1:zz", perceptual_hash=0b0000), 0, Known("train", "near-duplicate")),
        (record("file-1:zz", perceptual_hash=0b11110000), 0, None),
        (record("file-1:zz", listed_group="street"), 0, Known("train", "group")),
        (record("file-1:bb"), 0, Known("validation", "content")),
        (record("file-1:cc"), 0, Known("unlabelled", "content")),
        (record("file-1:zz", listed_group="field"), 0, None),  # its label was not looked at, so nothing was told of the group
        (record(), stored, Known("train", "embedding")),
        (record(), vectors[5], None),
        (record("file-1:zz"), vectors[0], None),  # images that two files hold are told apart by these
        (record("file-1:zz"), vectors[2], Known("train", "embedding")),  # of that one nothing else is known
        (Record("x", 1, None, "a", "x", Gone()), 0, None),
    ]
    table = np.stack([np.broadcast_to(np.float32(vector), (64,)) for _, vector, _ in asked])
    for one in (seen, SeenImages.load(tmp_path / FILE)):
        assert one.find([record for record, _, _ in asked], table) == [known for _, _, known in asked]
    assert seen.find([record("file-1:aa"), record()]) == [Known("train", "content"), None]
    assert replace(record("file-1:aa"), perceptual_hash=7) == record("file-1:aa")


def test_nothing_in_the_file_shows_an_image_or_its_name(tmp_path):
    seen = SeenImages.of([("train", replace(record("file-1:aa", listed_group="Frau Muster"), id="IMG_1234.jpg"), unit(1)[0])])
    seen.save(tmp_path / FILE)
    assert pq.read_table(tmp_path / FILE).column_names == ["split", "content", "perceptual_hash", "listed_group", "sketch"]
    data = (tmp_path / FILE).read_bytes()
    assert b"IMG_1234" not in data
    assert b"Muster" not in data
    many = SeenImages.of([("train", record(f"file-1:{i}", perceptual_hash=i), vector) for i, vector in enumerate(unit(500))])
    many.save(tmp_path / FILE)
    assert (tmp_path / FILE).stat().st_size < 500 * 120


@pytest.fixture(scope="module")
def guard(scenes_policy, scenes_encoder):
    head = LinearHead.build(scenes_encoder, scenes_policy)
    return GuardClassifier(
        head, scenes_encoder, scenes_policy, training_images=SeenImages.of([("train", record("file-1:aa"), unit(1)[0])], near=6)
    )


def test_a_guard_brings_its_list_along(guard, scenes_encoder, tmp_path):
    folder = guard.save_pretrained(tmp_path / "guard")
    loaded = GuardClassifier.from_pretrained(folder, encoder=scenes_encoder).training_images
    assert loaded.near == 6
    assert loaded.table.equals(guard.training_images.table)
    # one without a list leaves none of another guard behind
    other = GuardClassifier(guard.head, guard.encoder, guard.policy)
    assert not (other.save_pretrained(folder) / FILE).exists()
    assert GuardClassifier.from_pretrained(folder, encoder=scenes_encoder).training_images is None


def _columns(**changed):
    columns = {"split": ["train"], "content": [b"0" * 16], "perceptual_hash": [None], "listed_group": [None], "sketch": [None]} | changed
    types = {
        "split": pa.string(),
        "content": pa.binary(16),
        "perceptual_hash": pa.uint64(),
        "listed_group": pa.binary(16),
        "sketch": pa.binary(64),
    }
    return pa.table({name: pa.array(values, types[name]) for name, values in columns.items()}).replace_schema_metadata(
        {"format": "1", "near": "4"}
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (_columns().drop_columns("perceptual_hash"), "is no list of training images"),
        (_columns().replace_schema_metadata({"format": "1", "near": "64"}), "is no list of training images"),
        (_columns().replace_schema_metadata({"format": "1"}), "is no list of training images"),
        (_columns(split=["test"]), r"has the split 'test', expected train, validation, calibration, unlabelled"),
        (_columns(split=[None]), r"has the split 'None'"),
        (_columns(content=[None]), r"has a row by which no image can be known again"),
        (_columns().set_column(2, "perceptual_hash", pa.array(["1"])), "is no list of training images"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, table, message):
    pq.write_table(table, tmp_path / FILE)
    with pytest.raises(InputError, match=message):
        SeenImages.load(tmp_path / FILE)


def test_a_damaged_or_missing_list_is_refused(guard, scenes_encoder, tmp_path):
    folder = guard.save_pretrained(tmp_path / "guard")
    data = bytearray((folder / FILE).read_bytes())
    (folder / FILE).write_bytes(data[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        SeenImages.load(folder / FILE)
    data[len(data) // 2] ^= 1
    (folder / FILE).write_bytes(data)
    with pytest.raises(InputError, match=rf"{FILE} is missing or damaged"):
        GuardClassifier.from_pretrained(folder, encoder=scenes_encoder)
    (folder / FILE).unlink()
    with pytest.raises(InputError, match=rf"{FILE} is missing or damaged"):
        GuardClassifier.from_pretrained(folder, encoder=scenes_encoder)
