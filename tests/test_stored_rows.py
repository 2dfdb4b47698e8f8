"""Folders of embeddings by the million: the same as by the hundred, read bit by bit; labels from a table of their own."""

from __future__ import annotations

import json
import os
from dataclasses import astuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guardkit import Category, EmbeddingsSource, GuardClassifier, Policy, train_guard
from guardkit.data import columns, splits, views
from guardkit.data.sources.texts import as_texts, hashed
from guardkit.embedding_folder import StoredVectors, find_embedding_parts
from guardkit.schema import InputError
from guardkit.seen import SPLITS, sketches
from guardkit.seen_vectors import SeenVectors

WIDTH, N, PARTS = 16, 360, 3
POLICY = Policy("p", "d", tuple(Category(name, "d", (), (), "e", ("unsafe",), ("safe",)) for name in ("weapons", "substances")))


class Stored:
    """In the place of an encoder: vectors are stored."""

    name, dim, batch_size, fingerprint = "none", WIDTH, 4, "1" * 64
    config: dict = {}
    preprocessing: dict = {}

    def preprocess(self, image):
        return image

    def encode_preprocessed(self, images, *, fixed_batch=False, normalize=True):
        return self.encode_images(images)

    def encode_images(self, images):
        return np.eye(len(images), WIDTH, dtype=np.float32)


def rows(n=N, *, is_sorted=False, seed=0):
    """(n, d) float16 vectors, and columns: a third unsafe, some without a label, some groups, some repeated paths and vectors."""
    rng = np.random.default_rng(seed)
    unsafe = np.arange(n) < n // 3 if is_sorted else rng.random(n) < 0.33
    vectors = rng.normal(size=(n, WIDTH))
    vectors[unsafe, 0] += 3
    vectors[5], vectors[n // 2] = vectors[n - 1], vectors[7]
    table = {
        "image_path": [f"{i:04d}.jpg" for i in rng.permutation(n)],
        "label": np.where(unsafe, "unsafe", "safe").astype(object),
        "category": np.where(unsafe, rng.choice(["weapons", "substances"], n), None),
        "caption": [f"caption {i}" for i in range(n)],
        "group": [f"group {i // 2}" if i % 7 == 0 else None for i in range(n)],
    }
    table["label"][rng.integers(n, size=9)] = None
    table["image_path"][3] = table["image_path"][2]
    table["image_path"][4] = None
    return vectors.astype(np.float16), table


def write(folder, vectors, table, numbers=range(PARTS)):
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, places in zip(numbers, np.array_split(np.arange(len(vectors)), len(numbers)), strict=True):
        np.save(folder / f"img_emb/img_emb_{number}.npy", vectors[places])
        some = {name: pa.array([values[i] for i in places]) for name, values in table.items()}
        pq.write_table(pa.table(some), folder / f"metadata/metadata_{number}.parquet")
    return folder


@pytest.fixture
def large(monkeypatch):
    """A few rows are many."""
    monkeypatch.setattr(columns, "LARGE", 40)
    monkeypatch.setattr(views, "BLOCK", 4)
    monkeypatch.setattr(views, "WINDOW", 8)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "rows", *rows())


def everything(loaded):
    return (
        [(*astuple(record)[:8], record.embedding.tobytes(), record.listed_group) for record in (*loaded.train, *loaded.set_aside)],
        list(loaded.rejected),
        loaded.given,
    )


def trained(folder, out=None, **settings):
    source = EmbeddingsSource(POLICY, str(folder), **settings.pop("source", {}))
    settings = {"n_unsafe": "all", "safe_per_unsafe": "all", "batch_size": 8, "trainer": {"max_epochs": 2}} | settings
    return train_guard(source, POLICY, encoder=Stored(), head="linear", output_dir=out, **settings)


# --- columns --------------------------------------------------------------------------------------------------------------


def test_many_rows_say_the_same_as_few(folder, monkeypatch):
    few = everything(EmbeddingsSource(POLICY, str(folder)).load())
    monkeypatch.setattr(columns, "LARGE", 40)
    many = EmbeddingsSource(POLICY, str(folder)).load()
    assert everything(many) == few
    assert columns.is_large(many.train)
    assert many.given == len(many.train) + len(many.rejected)


def test_a_record_is_itself_as_long_as_somebody_holds_it(folder):
    train = EmbeddingsSource(POLICY, str(folder)).load().train
    first = train[0]
    assert train[0] is first
    assert next(iter(train[:3])) is first
    assert [record.id for record in train[2:5]] == [record.id for record in train][2:5]


def test_hashes_tell_texts_apart_and_stay_the_same():
    texts = as_texts(pa.chunked_array([["a", " a ", "b", None, "", "ab", "ba", "x" * 300, "x" * 299 + "y"]]))
    assert texts.to_pylist()[:5] == ["a", "a", "b", "", ""]
    found = hashed(texts).tolist()
    assert found[0] == found[1]
    assert found[3] == found[4]
    assert len(set(found)) == 7
    assert set(found).isdisjoint(set(hashed(texts, 1).tolist()) - {0})
    assert hashed(texts.slice(2, 4)).tolist() == found[2:6]


def test_a_file_that_was_changed_meanwhile_is_not_read_on(folder, monkeypatch):
    monkeypatch.setattr("guardkit.embedding_folder._MAX_OPEN", 1)
    stored = StoredVectors(find_embedding_parts(folder))
    assert np.linalg.norm(stored[0:3], axis=1) == pytest.approx(1)
    assert len(stored[100:300]) == 200
    np.save(folder / "img_emb/img_emb_0.npy", np.ones((N // PARTS, WIDTH + 1), np.float16))
    with pytest.raises(InputError, match="img_emb_0.npy was changed while it was read"):
        stored.take(np.array([0]))


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_file_that_is_written_over_in_its_place_is_not_read_on(tmp_path, order):
    vectors, table = rows()
    folder = write(tmp_path / "rows", np.asarray(vectors, np.float16, order=order), table)
    stored = StoredVectors(find_embedding_parts(folder))
    file = folder / "img_emb/img_emb_1.npy"
    first = int(stored.firsts[1])
    assert np.isfinite(stored[first : first + 2]).all()
    with file.open("r+b") as opened:  # as many bytes, in the file that is open
        opened.seek(-4, 2)
        opened.write(b"\x00\x3c\x00\x3c")
    os.utime(file, ns=(0, 0))
    with pytest.raises(InputError, match="img_emb_1.npy was changed while it was read; start again when nothing writes to the folder"):
        stored.take(np.array([first]))


def test_a_file_that_was_replaced_before_its_first_row_was_read_is_not_read(folder):
    stored = StoredVectors(find_embedding_parts(folder))
    other = np.ones((N // PARTS, WIDTH), np.float16)
    np.save(folder / "new.npy", other)
    os.utime(folder / "new.npy", ns=(0, 0))
    os.replace(folder / "new.npy", folder / "img_emb/img_emb_0.npy")
    with pytest.raises(InputError, match="img_emb_0.npy was changed while it was read"):
        stored.take(np.array([0]))


def test_numbers_of_only_one_side_are_counted_in_a_folder_of_another_tool(tmp_path):
    folder = write(tmp_path / "rows", *rows(), numbers=(10, 2, 1))
    (folder / "metadata/metadata_2.parquet").unlink()
    (folder / "img_emb/img_emb_10.npy").unlink()
    loaded = EmbeddingsSource(POLICY, str(folder)).load()
    reasons = columns.reasons_of(loaded.rejected)
    assert (
        reasons["img_emb_2.npy has no metadata of its number"] == reasons["metadata_10.parquet has no vectors of its number"] == N // PARTS
    )
    assert loaded.given == N == len(loaded.train) + len(loaded.rejected)
    assert [one.id for one in loaded.rejected][-1] == f"metadata_10.parquet row {N // PARTS}"


# --- training -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("large")
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    from guardkit.counterfactual.edits import Edits
    from guardkit.data.datamodule import GuardDataModule
    from guardkit.embeddings import EmbeddingStore

    folder = write(tmp_path / "rows", *rows(1200, is_sorted=True))
    store = EmbeddingStore(Stored(), None)

    def epochs(seed):
        source = EmbeddingsSource(POLICY, str(folder))
        settings = {"n_unsafe": "all", "safe_per_unsafe": "all", "batch_size": 20, "test_share": 0.1, "seed": seed}
        data = GuardDataModule(source, POLICY, store, Edits.of(None).pipeline(POLICY, store, None), **settings)
        return data, [list(data.batches(epoch)) for epoch in (1, 2)]

    data, (first, second) = epochs(0)
    _, (again, _) = epochs(0)
    _, (other, _) = epochs(1)

    def of(batches):
        return np.concatenate([batch["embeddings"].numpy() for batch in batches])

    assert np.array_equal(of(first), of(again))
    assert not np.array_equal(of(first)[:40], of(second)[:40])
    assert not np.array_equal(of(first)[:40], of(other)[:40])
    wanted = np.concatenate([data.choice.train[kind].vectors() for kind in ("unsafe", "natural")])
    assert np.array_equal(np.sort(of(first), axis=0), np.sort(wanted, axis=0))
    # although the folder is sorted by label, every batch has both, in about the same shares
    shares = [float(batch["labels"].mean()) for batch in first]
    assert max(shares) - min(shares) < 0.05
    # and a batch is of rows from all over the folder
    stored = {vector.tobytes(): row for row, vector in enumerate(StoredVectors(find_embedding_parts(folder))[:])}
    places = [stored[vector.tobytes()] for vector in first[0]["embeddings"].numpy()[first[0]["labels"].numpy() == 1]]
    assert np.ptp(places) > 150
    assert len({place // 4 for place in places}) > 4


@pytest.mark.usefixtures("large")
def test_training_on_many_rows_gives_a_guard_that_knows_what_it_saw(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "MOST_TEST", 15)
    report = trained(folder, tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    loaded = EmbeddingsSource(POLICY, str(folder)).load()
    assert metrics["inputs"]["given"] == N
    assert metrics["test"]["auroc"] > 0.9
    assert metrics["n_unsafe"] + metrics["n_safe"] + metrics["test"]["n"] == len(loaded.train)
    assert any("are held out for tests, less than data.test_share=0.3" in note for note in metrics["notes"])
    assert "fewer than 200" in metrics["cross_validated"]["reason"]
    predictions = pq.read_table(tmp_path / "out/predictions.parquet")
    assert set(predictions.column("id").to_pylist()) <= {record.id for record in loaded.train}
    guard = GuardClassifier.from_pretrained(tmp_path / "out/guard", encoder=Stored())
    seen = guard.training_images
    assert len(seen) == len(report.guard.training_images) >= metrics["n_unsafe"] + metrics["n_safe"] - 5  # equal vectors count once
    tested = set(predictions.column("id").to_pylist())
    vectors = np.stack([record.embedding for record in loaded.train]).astype(np.float16).astype(np.float32)
    known = seen.find(list(loaded.train), vectors)
    assert [record.id for record, one in zip(loaded.train, known, strict=True) if one is None] == [
        record.id for record in loaded.train if record.id in tested
    ]


@pytest.mark.usefixtures("large")
def test_bad_vectors_that_nobody_looked_for_are_left_out_and_counted(tmp_path):
    vectors, table = rows()
    vectors[::20], vectors[10] = 0, np.nan
    folder = write(tmp_path / "rows", vectors, table)
    report = trained(folder, source={"check_vectors": False}, trainer={"max_epochs": 4})
    said = " ".join(report.metrics["notes"])
    assert "test images were left out" in said
    assert "chosen images were left out, the first is" in said
    assert report.metrics["test"]["auroc"] > 0.8
    looked = EmbeddingsSource(POLICY, str(folder), check_vectors=True).load()
    assert columns.reasons_of(looked.rejected)[columns.WITHOUT_DIRECTION] > 10


def test_what_looks_at_every_image_says_that_there_are_too_many(folder, monkeypatch):
    from guardkit.evaluation.benchmark import read_benchmark

    monkeypatch.setattr(columns, "LARGE", 40)
    with pytest.raises(InputError, match="split=all of source=embeddings looks at every image by itself, and here are 3"):
        read_benchmark(EmbeddingsSource(POLICY, str(folder)), split="all")
    assert read_benchmark(EmbeddingsSource(POLICY, str(folder))).records


@pytest.mark.usefixtures("large")
def test_a_batch_that_would_not_fit_is_refused(folder):
    with pytest.raises(
        InputError, match=r"would put \d+ unsafe images into 1 batches, allowed are .* give a number as data.safe_per_unsafe"
    ):
        trained(folder, batch_size=500)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("dtype", "order"), [("<f2", "C"), ("<f4", "C"), (">f4", "C"), ("<f2", "F"), ("<f8", "F")])
def test_rows_are_read_as_they_are_stored_whatever_they_are_asked_in(tmp_path, dtype, order):
    vectors, table = rows()
    folder = write(tmp_path / "rows", vectors, table)
    for path in (folder / "img_emb").iterdir():
        np.save(path, np.asarray(np.load(path), dtype, order=order))
    stored = StoredVectors(find_embedding_parts(folder))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    for asked in (np.arange(len(unit)), rng.permutation(len(unit)), np.array([7, 7, 3, len(unit) - 1]), np.zeros(0, int)):
        np.testing.assert_allclose(stored.take(asked), unit[asked], atol=2e-3)


def test_a_long_list_of_rejected_rows_is_cut_and_counted(folder, monkeypatch):
    monkeypatch.setattr(columns, "MAX_LISTED", 3)
    rejected = EmbeddingsSource(POLICY, str(folder)).load().rejected
    listed = columns.listing(rejected)
    assert [one["id"] for one in listed["rejected"]] == [one.id for one in rejected[:3]]
    assert listed["n_rejected"] == len(rejected) == sum(listed["reasons"].values())


# --- labels from a table --------------------------------------------------------------------------------------------------


def labels_file(folder, suffix, paths, **said):
    path = folder / f"labels{suffix}"
    table = pa.table({"file": pa.array(paths, pa.string()), **{name: pa.array(values) for name, values in said.items()}})
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        lines = [
            ",".join(table.column_names),
            *(",".join("" if cell is None else cell for cell in row.values()) for row in table.to_pylist()),
        ]
        path.write_text("\n".join(lines))
    return {"labels_file": str(path), "key_column": "file"}


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("most", [3, 1000])
def test_labels_are_joined_by_key(tmp_path, monkeypatch, suffix, most):
    monkeypatch.setattr(columns, "LARGE", most)
    vectors, _ = rows(8)
    folder = write(tmp_path / "rows", vectors, {"image_path": ["a", "b", "c", "d", "e", "f", None, "h"]}, numbers=(0, 1))
    paths = ["f", "c", "a", "x", None, "b", "b", "d", "d", "e", "y"]
    label = ["unsafe", "safe", "nsfw", "safe", "safe", "safe", "safe", "safe", "unsafe", None, "unsafe"]
    kinds = ["weapons", None, "substances", None, None, None, None, None, None, None, None]
    captions, groups = [f"of {path}" for path in paths], [f"group {path}" for path in paths]
    settings = labels_file(tmp_path, suffix, paths, label=label, category=kinds, caption=captions, group=groups)
    loaded = EmbeddingsSource(POLICY, str(folder), **settings).load()
    assert [(one.id, one.label, one.category, one.caption, one.listed_group) for one in loaded.train] == [
        ("a", 1, "substances", "of a", "group a"),
        ("b", 0, None, "of b", "group b"),
        ("c", 0, None, "of c", "group c"),
        ("f", 1, "weapons", "of f", "group f"),
    ]
    assert {one.id: one.reason for one in loaded.rejected} == {
        "d": "listed as safe and as unsafe",
        "e": "no label",
        "6": f"not in labels{suffix}",
        "h": f"not in labels{suffix}",
    }
    assert loaded.given == 8
    assert loaded.notes == [
        f"2 of the 8 images that labels{suffix} names are not in {folder}, the first is 'x'",
        f"1 rows of labels{suffix} have no key and were passed over",
        f"2 rows of labels{suffix} name an image once more",
    ]


@pytest.mark.parametrize(
    ("said", "settings", "message"),
    [
        ({"label": ["safe", "maybe"]}, {}, r"labels.parquet row 2 has label 'maybe'"),
        ({"other": ["safe", "unsafe"]}, {}, r"labels.parquet has no column of labels; it has file, other"),
        ({"label": ["safe", "unsafe"]}, {"key_column": "path"}, r"has no column 'path'; it has file, label; set source.key_column"),
        ({"label": ["safe", "unsafe"]}, {"label_column": "says"}, r"has no column 'says'"),
        ({"label": ["safe", "unsafe"]}, {"labels_file": "nowhere.parquet"}, r"nowhere.parquet is not there"),
        ({"label": ["safe", "unsafe"]}, {}, r"names none of the 360 images of .*: its first key is 'p', the folder's first image_path '"),
    ],
)
def test_a_table_of_labels_that_does_not_fit_is_one_line(folder, tmp_path, said, settings, message):
    given = labels_file(tmp_path, ".parquet", ["p", "q"], **said) | settings
    with pytest.raises(InputError, match=message):
        EmbeddingsSource(POLICY, str(folder), **given).load()


# --- vectors that were seen -----------------------------------------------------------------------------------------------


def test_vectors_are_known_again_however_they_were_rounded_and_others_are_not(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    seen = SeenVectors.of([("train", sketches(vectors[:2000])), ("validation", sketches(vectors[2000:3000], np.float32))])
    seen.save(tmp_path / "seen.parquet", SPLITS)
    assert (tmp_path / "seen.parquet").stat().st_size < 8 * len(seen) + 2000
    seen = SeenVectors.load(tmp_path / "seen.parquet", SPLITS)
    half = vectors.astype(np.float16).astype(np.float32)
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    for again in (vectors, half):
        found = seen.find(sketches(again), SPLITS)
        assert found == ["train"] * 2000 + ["validation"] * 1000 + [None] * 3000
    moved = vectors[:2000] + 0.05 * rng.normal(size=(2000, 64)).astype(np.float32) / 8
    assert seen.find(sketches(moved), SPLITS).count(None) > 1990
    assert seen.without("train").count("train") == 0
    assert len(seen.joined(seen.without("train"))) == 3000
