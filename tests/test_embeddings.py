"""Stores and folders of embeddings: nothing encoded twice, whole after a kill, readable by others, refusing what does not fit."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import FORKS
from conftest import ROOT, embed_records, open_files, picture
from tampering import resign, swap

from guardkit.artifacts import fingerprint, write_json, written
from guardkit.data.sources.embeddings import EmbeddingsSource
from guardkit.embedding_folder import read_embedding_folder
from guardkit.embeddings import EmbeddingStore
from guardkit.folders import is_unfinished
from guardkit.images import ArrayContent, FileContent
from guardkit.schema import ImageError, InputError, Record


class CountingEncoder:
    """A quick encoder: the normalised mean colours of a coarse grid; counts what it encodes."""

    name, batch_size, dim = "counting", 4, 12
    fingerprint = fingerprint("counting")
    config: dict = {"name": "counting"}
    preprocessing: dict = {}

    def __init__(self, pause=0.0):
        self.n, self.pause = 0, pause

    def preprocess(self, image):
        return image

    def encode_preprocessed(self, images, *, fixed_batch=False, normalize=True):
        time.sleep(self.pause)
        self.n += len(images)
        vectors = np.stack(
            [
                np.array(
                    [image[::2, ::2].mean((0, 1)), image[1::2, ::2].mean((0, 1)), image[::3].mean((0, 1)), image[:, ::3].mean((0, 1))]
                ).ravel()
                for image in images
            ]
        )
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors).astype(np.float32)


CONTENTS = [ArrayContent(np.asarray(picture(seed))) for seed in range(11)]


def records(n=11, **changes):
    return [replace(Record(f"{i}.png", i % 2, None, "test", str(i), CONTENTS[i], caption=f"picture {i}"), **changes) for i in range(n)]


def test_nothing_is_encoded_twice(tmp_path):
    first = CountingEncoder()
    vectors = EmbeddingStore(first, tmp_path).embed([*CONTENTS, CONTENTS[3], CONTENTS[3]])
    assert first.n == 11
    np.testing.assert_array_equal(vectors[11], vectors[3])
    second = EmbeddingStore(CountingEncoder(), tmp_path)
    np.testing.assert_array_equal(second.embed(CONTENTS[::-1]), vectors[10::-1])
    assert (second.encoder.n, second.n_found, second.n_encoded) == (0, 11, 0)


@pytest.mark.parametrize("on_disk", [True, False])
def test_two_threads_that_want_the_same_images_encode_them_once(tmp_path, on_disk):
    store = EmbeddingStore(CountingEncoder(pause=0.02), tmp_path if on_disk else None)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(store.embed, [CONTENTS, CONTENTS[::-1]])
    np.testing.assert_array_equal(first, second[::-1])
    assert (store.n_encoded, store.n_found) == (11, 11)


@pytest.mark.parametrize("cold", [[], [2, 5, 7], list(range(11))])
def test_cold_warm_and_partly_warm_agree_to_the_bit(scenes_encoder, tmp_path, cold):
    store = EmbeddingStore(scenes_encoder, tmp_path)
    if cold:
        store.embed([CONTENTS[i] for i in cold])
    np.testing.assert_array_equal(store.embed(CONTENTS), EmbeddingStore(scenes_encoder, None).embed(CONTENTS))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_norms_are_kept_beside_vectors_that_stay_the_same_to_the_bit(scenes_encoder, tmp_path, where):
    cache = tmp_path if where == "disk" else None
    store = EmbeddingStore(scenes_encoder, cache, keep_norms=True)
    vectors, norms = store.embed(CONTENTS), store.norms(CONTENTS[::-1])[::-1]
    assert store.n_encoded == len(CONTENTS)
    np.testing.assert_array_equal(vectors, EmbeddingStore(scenes_encoder, None).embed(CONTENTS))
    images = [content.load() for content in CONTENTS]
    raw = scenes_encoder.encode_images(images, fixed_batch=True, normalize=False)
    np.testing.assert_allclose(vectors * norms[:, None], raw, rtol=1e-5, atol=1e-6)
    assert np.abs(norms - 1).min() > 0.1


def test_vectors_of_earlier_runs_serve_all_who_need_no_norms(tmp_path):
    EmbeddingStore(CountingEncoder(), tmp_path).embed(CONTENTS[:6])
    wants = EmbeddingStore(CountingEncoder(), tmp_path, keep_norms=True)
    vectors = wants.embed(CONTENTS)
    assert (wants.n_encoded, wants.n_found) == (11, 0)
    wants.norms(CONTENTS)
    for keep_norms in (True, False):  # now there is one of everything, and nobody encodes again
        again = EmbeddingStore(CountingEncoder(), tmp_path, keep_norms=keep_norms)
        np.testing.assert_array_equal(again.embed(CONTENTS), vectors)
        assert (again.n_encoded, again.n_found) == (0, 11)


def test_norms_that_nobody_kept_are_not_made_up(tmp_path):
    store = EmbeddingStore(CountingEncoder(), None)
    store.embed(CONTENTS)
    for one in (store, EmbeddingStore(CountingEncoder(), None, keep_norms=True)):
        with pytest.raises(ValueError, match="a store with keep_norms=True has embedded"):
            one.norms(CONTENTS)


def _embed_all(folder):
    EmbeddingStore(CountingEncoder(pause=0.01), Path(folder)).embed(CONTENTS)


def test_several_processes_may_write_at_once(tmp_path):
    workers = [FORKS.Process(target=_embed_all, args=(str(tmp_path),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    store = EmbeddingStore(CountingEncoder(), tmp_path)
    np.testing.assert_array_equal(store.embed(CONTENTS), EmbeddingStore(CountingEncoder(), None).embed(CONTENTS))
    assert store.encoder.n == 0


def n_stored(folder):
    """Rows in the store of embeddings, while another process writes it."""
    for path in folder.rglob("*.sqlite"):
        with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.OperationalError):
            return connection.execute("SELECT COUNT(*) FROM entries").fetchone()[0]
    return 0


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path):
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]; import test_embeddings as t; from pathlib import Path; print('go', flush=True); t.EmbeddingStore(t.CountingEncoder(pause=0.25), Path({str(tmp_path)!r})).embed(t.CONTENTS)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not n_stored(tmp_path):
        time.sleep(0.01)  # until the first of three chunks is there
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = EmbeddingStore(CountingEncoder(), tmp_path)
    vectors = store.embed(CONTENTS)
    assert 0 < store.encoder.n < 11
    np.testing.assert_array_equal(vectors, EmbeddingStore(CountingEncoder(), None).embed(CONTENTS))


def test_files_appear_whole_or_not_at_all(tmp_path):
    def fail():
        with written(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_bad_images_and_bad_encoders_are_named(tmp_path):
    store = EmbeddingStore(CountingEncoder(), None)
    with pytest.raises(ImageError, match="does not exist"):
        store.embed([FileContent(tmp_path / "none.png")])
    broken = CountingEncoder()
    broken.encode_preprocessed = lambda images, fixed_batch: np.full((len(images), 12), np.nan, np.float32)
    with pytest.raises(InputError, match="encoder counting returned embeddings that are not finite unit vectors"):
        EmbeddingStore(broken, None).embed(CONTENTS)


def test_folder_round_trip_and_layout(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    bad = Record("text.png", 0, None, "test", "x", FileContent(tmp_path / "text.png"))
    given = [*records(6), bad, *records(11)[6:]]
    counts = embed_records(given, CountingEncoder(), tmp_path / "out", shard_size=5)
    assert counts == {"given": 12, "written": 11, "rejected": 1}
    array = np.load(tmp_path / "out/img_emb/img_emb_0.npy")
    assert array.dtype == np.float16
    table = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet")
    assert len(table) == len(array) == 5
    assert {"image_path", "label", "category", "caption"} <= set(table.column_names)
    rejected = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert [(one["id"], one["reason"], one["shard"], one["label"]) for one in rejected] == [
        ("text.png", "not an image of a known type", 1, 0)
    ]
    vectors, metadata, manifest = read_embedding_folder(tmp_path / "out")
    np.testing.assert_allclose(vectors, EmbeddingStore(CountingEncoder(), None).embed(CONTENTS), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert metadata.column("image_path").to_pylist() == [f"{i}.png" for i in range(11)]
    assert manifest["encoder_fingerprint"] == CountingEncoder.fingerprint
    other = CountingEncoder()
    other.fingerprint = "f" * 64
    with pytest.raises(InputError, match="made with another encoder"):
        embed_records(records(), other, tmp_path / "out")


def foreign_folder(folder, vectors, table):
    """As clip-retrieval writes it: no manifest, zero-padded numbers, vectors that need not be unit length."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb/img_emb_00.npy", vectors)
    pq.write_table(pa.table(table), folder / "metadata/metadata_00.parquet")
    return folder


def test_a_folder_that_another_tool_wrote(tmp_path, scenes_policy):
    vectors = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float16)
    table = {"image_path": ["a", "b", "c", "d"], "verdict": ["safe", "unsafe", "safe", "unsafe"], "kind": [None, "hate", None, None]}
    folder = foreign_folder(tmp_path / "f", vectors, table)
    loaded = EmbeddingsSource(scenes_policy, str(folder), label_column="verdict", category_column="kind").load()
    assert [(record.id, record.label, record.category) for record in loaded.train] == [
        ("a", 0, None),
        ("b", 1, "hate"),
        ("c", 0, None),
        ("d", 1, None),
    ]
    assert loaded.encoder_fingerprint is None
    with pytest.raises(
        InputError, match="has no column 'label'; it has image_path, verdict, kind; set source.label_column, or .* source.labels_file"
    ):
        EmbeddingsSource(scenes_policy, str(folder)).load()


def test_rows_of_one_image_count_once_and_contradictions_never(tmp_path, scenes_policy):
    vectors = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    table = {"image_path": ["a", "b", "a", "c", "c", "d"], "label": [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]}
    loaded = EmbeddingsSource(scenes_policy, str(foreign_folder(tmp_path / "f", vectors, table))).load()
    assert [(record.id, record.label) for record in loaded.train] == [("a", 1), ("b", 0), ("d", 1)]
    assert [(one.id, one.reason) for one in loaded.rejected] == [
        ("a", "duplicate row"),
        ("c", "listed as safe and as unsafe"),
        ("c", "listed as safe and as unsafe"),
    ]
    assert loaded.given == 6 == len(loaded.train) + len(loaded.rejected)


@pytest.mark.parametrize(
    ("vectors", "labels", "message"),
    [
        (
            np.full((2, 3), np.nan),
            ["safe", "unsafe"],
            r"no row that can be used \(2 of 2 inputs were rejected, the first is a: its vector is zero or not finite",
        ),
        (np.ones((3, 3)), ["safe", "unsafe"], "has 2 rows, expected are 3"),
        (np.ones((2, 3)), ["safe", "maybe"], "row 2 has label 'maybe'"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, scenes_policy, vectors, labels, message):
    folder = foreign_folder(tmp_path / "f", vectors, {"image_path": ["a", "b"], "label": labels})
    with pytest.raises(InputError, match=message):
        EmbeddingsSource(scenes_policy, str(folder)).load()
    with pytest.raises(InputError, match="is no embedding folder"):
        read_embedding_folder(tmp_path)


def test_embeddings_of_another_encoder_are_not_trained_on(compose, tmp_path):
    from guardkit.runs.train import run

    embed_records(records(), CountingEncoder(), tmp_path / "emb")
    manifest = json.loads((tmp_path / "emb/manifest.json").read_text())
    assert manifest["dim"] == 12
    cfg = compose("train", "experiment=unpaired", "source=embeddings", f"source.root={tmp_path / 'emb'}")
    with pytest.raises(InputError, match=r"12-d embeddings of encoder .*guardkit:scenes_clip .256-d"):
        run(cfg, {}, tmp_path / "run")


class CountedContent:
    """A picture that counts how often it is loaded; it may be bad."""

    def __init__(self, seed, *, bad=False):
        self.key, self.bad, self.loads, self._seed = f"counted:{seed}", bad, 0, seed

    def load(self):
        self.loads += 1
        if self.bad:
            raise ImageError("bad luck")
        return np.asarray(picture(self._seed))


def test_unreadable_images_cost_no_second_look(tmp_path):
    contents = [CountedContent(i, bad=i in (0, 5, 6, 7, 8, 9)) for i in range(14)]
    given = [Record(f"{i}.png", 0, None, "test", str(i), content) for i, content in enumerate(contents)]
    store = EmbeddingStore(CountingEncoder(), tmp_path)
    readable, vectors, rejected = store.embed_readable(given)
    assert [record.id for record in readable] == [f"{i}.png" for i in (1, 2, 3, 4, 10, 11, 12, 13)]
    assert [(one.id, one.reason) for one in rejected] == [(f"{i}.png", "bad luck") for i in (0, 5, 6, 7, 8, 9)]
    assert [content.loads for content in contents] == [1] * 14
    np.testing.assert_array_equal(vectors, store.embed([record.content for record in readable]))
    assert (store.n_encoded, store.n_found) == (8, 8)


def test_the_unreadable_image_is_named(tmp_path):
    store = EmbeddingStore(CountingEncoder(), None)
    with pytest.raises(
        ImageError, match=rf"^{re.escape(str(tmp_path))}/none.png cannot be read \(file does not exist\); .*source.check_images=true"
    ):
        store.embed([CONTENTS[0], FileContent(tmp_path / "none.png"), CONTENTS[1]])
    with pytest.raises(ImageError, match=r"cannot be read \(bad luck\)"):
        store.embed([*CONTENTS[:5], CountedContent(0, bad=True)])
    assert store.n_encoded == 5  # what could be read is kept


def test_reading_ahead_overlaps_encoding():
    """Images of the next chunk are read while one is encoded: each waits for the other, so one after the other would never end."""
    read_ahead = threading.Event()

    class Read(CountedContent):
        def load(self):
            if self._seed >= 4:
                read_ahead.set()
            return super().load()

    class Waiting(CountingEncoder):
        def encode_preprocessed(self, images, **how):
            assert read_ahead.wait(60), "nothing was read while the first chunk was encoded"
            return super().encode_preprocessed(images, **how)

    given = [Record(str(i), 0, None, "test", str(i), Read(i)) for i in range(24)]
    EmbeddingStore(Waiting(), None).embed_readable(given)


@pytest.mark.parametrize(
    "value",
    [b"\0", np.zeros(12, "<f4"), np.full(12, np.nan, "<f4"), np.full(12, 3, "<f4"), np.ones(11, "<f4"), b"x" * 49],
    ids=["short", "zero", "nan", "long vector", "other width", "odd bytes"],
)
def test_a_stored_value_that_is_no_vector_of_the_encoder_is_made_again(tmp_path, value):
    expected = EmbeddingStore(CountingEncoder(), tmp_path).embed(CONTENTS)
    (path,) = (tmp_path / "embeddings").glob("*.sqlite")
    resign(path, CONTENTS[2].key, bytes(value))
    for n_damaged in (1, 0):
        again = EmbeddingStore(CountingEncoder(), tmp_path)
        np.testing.assert_array_equal(again.embed(CONTENTS), expected)
        assert again.n_damaged == again.encoder.n == n_damaged


def test_another_images_vector_is_not_taken(tmp_path):
    expected = EmbeddingStore(CountingEncoder(), tmp_path).embed(CONTENTS)
    (path,) = (tmp_path / "embeddings").glob("*.sqlite")
    swap(path, CONTENTS[0].key, CONTENTS[1].key)
    again = EmbeddingStore(CountingEncoder(), tmp_path)
    np.testing.assert_array_equal(again.embed(CONTENTS), expected)
    assert again.n_damaged == 1


def test_what_another_tool_wrote_is_not_overwritten(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float16)
    folder = foreign_folder(tmp_path / "f", vectors, {"image_path": ["a", "b"]})
    with pytest.raises(InputError, match=r"holds files that guardkit embed did not write .img_emb, metadata"):
        embed_records(records(), CountingEncoder(), folder)
    np.testing.assert_array_equal(np.load(folder / "img_emb/img_emb_00.npy"), vectors)


def test_an_interrupted_folder_is_not_taken_for_whole_and_goes_on(tmp_path):
    class Interrupted(CountingEncoder):
        def encode_preprocessed(self, images, **options):
            if self.n >= 6:
                raise KeyboardInterrupt
            return super().encode_preprocessed(images, **options)

    with pytest.raises(KeyboardInterrupt):
        embed_records(records(), Interrupted(), tmp_path / "out", shard_size=3)
    with pytest.raises(InputError, match="is not complete; run python -m guardkit.embed with output_dir="):
        read_embedding_folder(tmp_path / "out")
    other = CountingEncoder()
    other.fingerprint = "f" * 64
    with pytest.raises(InputError, match="made with another encoder"):
        embed_records(records(), other, tmp_path / "out")
    again = CountingEncoder()
    assert embed_records(records(), again, tmp_path / "out", shard_size=3) == {"given": 11, "written": 11, "rejected": 0}
    assert again.n == 5  # the first six were in the folder
    assert [len(np.load(path)) for path in sorted((tmp_path / "out/img_emb").iterdir())] == [3, 3, 3, 2]
    assert len(read_embedding_folder(tmp_path / "out")[0]) == 11
    assert not is_unfinished(tmp_path / "out")
    # a finished folder is gone on with too, and only what changed is made anew
    changed = records()
    changed[4] = replace(changed[4], label=1 - changed[4].label)
    assert embed_records(changed, again, tmp_path / "out", shard_size=3)["written"] == 11
    assert again.n == 8
    assert read_embedding_folder(tmp_path / "out")[1]["label"].to_pylist() == [one.label for one in changed]


@pytest.mark.parametrize("shard_size", [1, 4, 11, 50])
def test_a_part_is_what_could_be_read_of_a_shard(tmp_path, shard_size):
    given = [Record(f"{i}.png", 0, None, "test", str(i), CountedContent(i, bad=i % 3 == 0)) for i in range(20)]
    counts = embed_records(given, CountingEncoder(), tmp_path / "out", shard_size=shard_size)
    assert counts == {"given": 20, "written": 13, "rejected": 7}
    sizes = [len(np.load(tmp_path / f"out/img_emb/img_emb_{i}.npy")) for i in range(-(-20 // shard_size))]
    assert sizes == [sum(i % 3 > 0 for i in range(first, min(20, first + shard_size))) for first in range(0, 20, shard_size)]
    vectors, table, manifest = read_embedding_folder(tmp_path / "out")
    assert [(one["given"], one["written"]) for one in manifest["shards"]] == [
        (min(20, first + shard_size) - first, n) for first, n in zip(range(0, 20, shard_size), sizes, strict=True)
    ]
    assert table.column("image_path").to_pylist() == [f"{i}.png" for i in range(20) if i % 3]
    np.testing.assert_allclose(
        vectors, EmbeddingStore(CountingEncoder(), None).embed([CountedContent(i) for i in range(20) if i % 3]), atol=1e-3
    )


def test_nothing_readable_is_a_whole_folder_without_embeddings(tmp_path):
    given = [Record("a", 0, None, "test", "a", CountedContent(0, bad=True))]
    counts = embed_records(given, CountingEncoder(), tmp_path / "out")
    assert counts == {"given": 1, "written": 0, "rejected": 1}
    with pytest.raises(InputError, match="out holds no embeddings"):
        read_embedding_folder(tmp_path / "out")


def test_embeddings_are_not_embedded_again():
    bare = Record("x", 1, None, "embeddings", "x", None, embedding=np.ones(3, np.float32))
    with pytest.raises(InputError, match="x of source embeddings is an embedding already"):
        EmbeddingStore(CountingEncoder(), None).embed_readable([bare])


def break_shard(folder, how):
    first = folder / "img_emb/img_emb_0.npy"
    if how == "empty":
        first.write_bytes(b"")
    elif how == "pickle":
        np.save(first, np.array([{"a": 1}] * 4, dtype=object), allow_pickle=True)
    elif how == "whole numbers":
        np.save(first, np.ones((4, 12), int))
    elif how == "width":
        np.save(first, np.ones((4, 13), np.float16))
    elif how == "twice":
        np.save(folder / "img_emb/img_emb_00.npy", np.ones((4, 12)))
    elif how == "lost":
        (folder / "img_emb/img_emb_2.npy").unlink()
        (folder / "metadata/metadata_2.parquet").unlink()
    elif how == "half lost":
        (folder / "metadata/metadata_1.parquet").unlink()
    elif how == "types":
        table = pq.read_table(folder / "metadata/metadata_1.parquet")
        pq.write_table(table.set_column(1, "label", pa.array(["unsafe"] * 4)), folder / "metadata/metadata_1.parquet")
    else:
        (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "img_emb_0.npy is not an array of numbers"),
        ("pickle", "img_emb_0.npy is not an array of numbers"),
        ("whole numbers", "img_emb_0.npy must hold floating-point numbers, got int64"),
        ("width", "img_emb_1.npy has 12 columns, earlier shards 13"),
        ("twice", "has no number of its own"),
        ("lost", "has 2 shards, its manifest.json says 3"),
        ("half lost", r"has shards \[1\] in only one of img_emb/ and metadata/"),
        ("types", "tables of .*metadata do not fit each other"),
        ("manifest", "manifest.json is damaged"),
    ],
)
def test_a_damaged_folder_says_where(tmp_path, how, message):
    embed_records(records(), CountingEncoder(), tmp_path / "out", shard_size=4)
    break_shard(tmp_path / "out", how)
    with pytest.raises(InputError, match=message):
        read_embedding_folder(tmp_path / "out")


def test_a_stopped_store_ends_after_its_chunk():
    from concurrent.futures import CancelledError
    from contextlib import ExitStack

    encoder = CountingEncoder()
    store = EmbeddingStore(encoder, None)
    whole = encoder.encode_preprocessed
    with ExitStack() as stack:
        encoder.encode_preprocessed = lambda images, fixed_batch: (stack.enter_context(store.stopping()), whole(images))[1]
        with pytest.raises(CancelledError):
            store.embed(CONTENTS)
    assert encoder.n == 4
    encoder.encode_preprocessed = lambda images, fixed_batch: whole(images)
    store.embed(CONTENTS)
    assert encoder.n == len(CONTENTS)


def test_a_store_that_may_only_be_read_is_read(shared):
    folder, become_a_guest = shared
    expected = EmbeddingStore(CountingEncoder(), folder / "cache").embed(CONTENTS[:8])
    become_a_guest()
    store = EmbeddingStore(CountingEncoder(), folder / "cache")
    assert np.array_equal(store.embed(CONTENTS[:8]), expected)
    assert store.encoder.n == 0
    assert np.array_equal(store.embed(CONTENTS)[:8], expected)
    assert store.encoder.n == len(CONTENTS) - 8  # kept in memory
    store.embed(CONTENTS)
    assert store.encoder.n == len(CONTENTS) - 8


def test_a_store_leaves_nothing_open(tmp_path):
    store = EmbeddingStore(CountingEncoder(), tmp_path)
    store.embed(CONTENTS)
    with pytest.raises(ImageError):
        store.embed([*CONTENTS, FileContent(tmp_path / "none.png")])
    assert not [path for path in open_files() if path.startswith(str(tmp_path))]
