"""Each kind of file that is read back, damaged in many ways: refused in one line or made anew, never believed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import embed_records, picture
from tampering import resign, stored, survives, swap, tampered
from test_editors_pipeline import CountingEditor, darker, photograph, pipeline
from test_embeddings import CONTENTS, CountingEncoder, records
from test_sweep import ARMS, World, fitted

from guardkit.counterfactual.pair_dataset import write_pair_dataset
from guardkit.counterfactual.review import REVIEWS, ReviewLog, ReviewQueue
from guardkit.counterfactual.verifier import Verdict
from guardkit.data.sources.embeddings import EmbeddingsSource
from guardkit.data.sources.folder import FolderSource
from guardkit.data.sources.pairs import PairsSource
from guardkit.efficiency.cells import Cell
from guardkit.efficiency.results import CellStore, opened
from guardkit.embeddings import EmbeddingStore
from guardkit.evaluation.judgments import JudgmentStore
from guardkit.policy import Policy
from guardkit.schema import InputError, Judgment
from guardkit.seen import SeenImages
from guardkit.vlm.base import Answer, Question, StoredVLM


def check(path, read, is_right, least):
    """Every mutation of a file is survived; says all that is not."""
    tried = list(tampered(path))
    failed = [f"{what}: {how}" for what, data in tried if (how := survives(path, data, read, is_right))]
    assert not failed, f"{path.name}: {len(failed)} of {len(tried)}:\n" + "\n".join(failed)
    assert len(tried) >= least


# --- folders and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least"), [("manifest.json", 80), ("img_emb/img_emb_1.npy", 25), ("metadata/metadata_0.parquet", 100)])
def test_embedding_folders(tmp_path, scenes_policy, name, least):
    folder = tmp_path / "emb"
    embed_records(records(), CountingEncoder(), folder, shard_size=5)

    def read():
        loaded = EmbeddingsSource(scenes_policy, str(folder)).load()
        assert len(loaded.train) + len(loaded.rejected) == loaded.given
        return {record.embedding.tobytes(): record.label for record in loaded.train}

    expected = read()
    check(folder / name, read, lambda found: found.items() <= expected.items(), least)


def test_a_table_that_unfolds_beyond_all_bounds_is_not_read(scenes_policy, tmp_path):
    # 60,000 times the same long text, which Parquet keeps once
    rows = pa.table({"image_path": pa.DictionaryArray.from_arrays(np.zeros(60_000, np.int32), pa.array(["x" * 20_000]))})
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "img_emb/img_emb_0.npy", np.ones((60_000, 1), np.float16))
    pq.write_table(rows, tmp_path / "metadata/metadata_0.parquet", store_schema=False)
    assert (tmp_path / "metadata/metadata_0.parquet").stat().st_size < 1_000_000
    with pytest.raises(InputError, match="metadata_0.parquet cannot be read as a table .it unfolds to more than 1073741824 bytes"):
        EmbeddingsSource(scenes_policy, str(tmp_path))


@pytest.mark.parametrize(("suffix", "least"), [(".parquet", 40), (".jsonl", 40)])
def test_tables_of_an_image_folder(scenes_policy, tmp_path, suffix, least):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    rows = {"file_name": ["0.png", "1.png", "2.png"], "label": ["safe", "unsafe", "safe"], "category": [None, "hate", None]}
    path = tmp_path / f"metadata{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    else:
        path.write_text("".join(json.dumps(dict(zip(rows, values, strict=True))) + "\n" for values in zip(*rows.values(), strict=True)))

    def read():
        loaded = FolderSource(scenes_policy, str(tmp_path)).load()
        assert len(loaded.train) + len(loaded.rejected) == loaded.given
        return {record.content.key: record.label for record in loaded.train}

    expected = read()
    assert len(expected) == 3
    check(path, read, lambda found: found.items() <= expected.items(), least)


@pytest.fixture
def pairs(scenes_policy, tmp_path):
    folder = tmp_path / "pairs"
    made = pipeline(scenes_policy, CountingEditor(darker))
    write_pair_dataset([replace(photograph(i, None), id=f"{i}.png") for i in range(3)], made, folder, made_from={})
    return folder


@pytest.mark.parametrize(("name", "least"), [("manifest.json", 150), ("metadata.parquet", 200)])
def test_pair_datasets(pairs, scenes_policy, name, least):
    def read():
        loaded = PairsSource(scenes_policy, str(pairs)).load()
        return {record.content.key: (record.label, [twin.key for twin in record.counterfactuals]) for record in loaded.train}

    expected = read()
    assert len(expected) == 3
    check(pairs / name, read, lambda found: found.items() <= expected.items(), least)


def test_reviews(pairs, scenes_policy):
    rows = PairsSource(scenes_policy, str(pairs))._rows
    queue = ReviewQueue(pairs, rows)
    for row in rows:
        queue.submit(row["pair_id"], "ann", "reject")
    expected = ReviewLog(pairs).read()
    # a last line that was cut short is one that a crash kept from being confirmed
    check(pairs / REVIEWS, lambda: ReviewLog(pairs).read(), lambda found: found == expected[: len(found)] and len(found) >= 0, 60)


def test_policies(scenes_policy, tmp_path):
    path = tmp_path / "policy.yaml"
    scenes_policy.save(path)
    small = yaml.safe_load(path.read_text())
    small["categories"] = small["categories"][:1]
    path.write_text(yaml.safe_dump(small))
    expected = Policy.load(path)
    optional = {"description", "source", "safe_texts"}  # what no decision depends on
    assert optional < set(small)

    def is_right(found):
        return {name: value for name, value in found.to_dict().items() if name not in optional} == {
            name: value for name, value in expected.to_dict().items() if name not in optional
        }

    check(path, lambda: Policy.load(path), is_right, 30)


def test_lists_of_training_images(tmp_path):
    path = tmp_path / "training_images.parquet"
    given = records(6)
    vectors = EmbeddingStore(CountingEncoder(), None).embed([record.content for record in given])
    SeenImages.of(zip(["train"] * 4 + ["validation"] * 2, given, vectors, strict=True)).save(path)
    # which rows belong there is said by the hash that the guard's folder has of the file
    check(path, lambda: SeenImages.load(path).table, lambda found: set(found["split"].to_pylist()) <= {"train", "validation"}, 50)


def test_settings_and_cells_of_a_sweep(tmp_path):
    _, expected, _ = fitted(World(), tmp_path, sizes=(4,), seeds=(0, 1), arms=ARMS[:2])
    settings = {"shared": {}, "arms": {}, "heads": {}}

    def read():
        with opened(tmp_path, settings) as store:
            assert store.known(list(expected)) == set(store.get(list(expected)))
            return store.get(list(expected))

    def is_right(found):  # a cell that does not check is not finished
        return all(np.array_equal(one.logits, expected[cell].logits) for cell, one in found.items())

    assert len(read()) == 4
    check(tmp_path / "settings.json", read, is_right, 40)
    check(tmp_path / "cells.sqlite", read, is_right, 8)


# --- entries of stores ----------------------------------------------------------------------------------------------------


def values(value, may_be=()):
    """What an entry that is JSON might hold instead; `may_be` are the fields and values that would be right."""
    whole = json.loads(value)
    parts = whole if isinstance(whole, dict) else dict(enumerate(whole))
    others = (None, True, -0.1, 1.1, math.nan, math.inf, 10**400, "x", [], {})
    for name, right in parts.items():
        for other in others:
            if type(other) is not type(right) and (name, other) not in may_be:
                changed = parts | {name: other}
                yield json.dumps(changed if isinstance(whole, dict) else list(changed.values())).encode()
        less = {key: part for key, part in parts.items() if key != name}
        yield json.dumps(less if isinstance(whole, dict) else list(less.values())).encode()
    yield from (b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, value[:-1], json.dumps([whole]).encode())


def anew(path, key, value, read):
    """Whether an entry was found out, and what came of it."""
    before = stored(path)[key]
    resign(path, key, value)
    try:
        return read()
    finally:
        resign(path, key, before)


def test_stored_vectors(tmp_path):
    store = EmbeddingStore(CountingEncoder(), tmp_path)
    expected = store.embed(CONTENTS)
    (path,) = (tmp_path / "embeddings").glob("*.sqlite")

    def read():
        return EmbeddingStore(CountingEncoder(), tmp_path).embed(CONTENTS)

    check(path, read, lambda found: np.array_equal(found, expected), 8)


def test_stored_edits_and_verdicts(scenes_policy, tmp_path):
    photographs = [photograph(i) for i in range(2)]

    def make():
        made = pipeline(scenes_policy, CountingEditor(darker), tmp_path)
        made.verifier = SimpleNamespace(
            name="fixed", config={"verifier": "fixed"}, verify=lambda candidates: [Verdict(None, 0.75, 0.5) for _ in candidates]
        )
        tries = made.make(photographs, [0, 0])
        return [(one.load().tobytes(), one.verdict) for one in tries], made.n_damaged

    expected, _ = make()
    assert make() == (expected, 0)
    path = tmp_path / "edits.sqlite"
    check(path, lambda: make()[0], lambda found: found == expected, 8)
    entries = stored(path)
    edit, other = sorted(key for key in entries if not key.startswith("verdict:"))
    verdict = next(key for key in entries if key.startswith("verdict:"))
    for value in values(entries[verdict], [("reason", "x"), ("flip_score", None), ("preservation_score", None)]):
        assert anew(path, verdict, value, make) == (expected, 1), value
    head, _, png = entries[edit].partition(b"\n")
    for value in [*values(head, [("reason", "x")]), json.dumps({"reason": None, "has_image": False}).encode()]:
        assert anew(path, edit, value + b"\n" + png, make) == (expected, 1), value
    assert anew(path, edit, head + b"\n", make) == (expected, 1)
    swap(path, edit, other)
    assert make() == (expected, 1)
    assert make() == (expected, 0)


def test_stored_judgments(tmp_path):
    class Guard:
        name, fingerprint, encoder = "looking", "0" * 64, None

        def judge(self, images):
            return [Judgment(0.25) if image.mean() > 1 else Judgment(math.nan, "too dark") for image in images]

    contents = [photograph(0).content, replace_by_black(photograph(1)).content]

    def judge():
        store = JudgmentStore(Guard(), tmp_path)
        return [(repr(one.score), one.reason) for one in store.judge(contents)], store.n_damaged, store.n_asked

    expected = [("0.25", None), ("nan", "too dark")]
    assert judge() == (expected, 0, 2)
    assert judge() == (expected, 0, 0)
    (path,) = (tmp_path / "judgments").glob("*.sqlite")
    check(path, lambda: judge()[0], lambda found: found == expected, 8)
    for content in contents:
        for value in values(stored(path)[content.key]):
            assert anew(path, content.key, value, judge) == (expected, 1, 1), value
    swap(path, contents[0].key, contents[1].key)
    assert judge() == (expected, 1, 1)


def replace_by_black(record):
    from guardkit.images import ArrayContent

    return replace(record, content=ArrayContent(np.zeros((9, 9, 3), np.uint8)))


def test_stored_answers(tmp_path):
    class Model:
        name, config = "model", {"model": "m"}

        def __init__(self):
            self.n = 0

        def ask(self, questions):
            self.n += len(questions)
            return [Answer("a house") if question.seed else Answer(None, "empty reply") for question in questions]

    questions = [Question([], "what is it?", seed=seed) for seed in (0, 1)]

    def ask():
        model = Model()
        return [(one.text, one.reason) for one in StoredVLM(model, tmp_path).ask(questions)], model.n

    expected = [(None, "empty reply"), ("a house", None)]
    assert ask() == (expected, 2)
    assert ask() == (expected, 0)
    path = tmp_path / "answers.sqlite"
    check(path, lambda: ask()[0], lambda found: found == expected, 8)
    for key, before in stored(path).items():
        for value in values(before):
            assert anew(path, key, value, ask) == (expected, 1), value


def test_one_cells_scores_under_the_names_of_all_are_found(tmp_path):
    _, expected, _ = fitted(World(), tmp_path, sizes=(4,), seeds=range(3), arms=ARMS[:2])
    path = tmp_path / "cells.sqlite"
    first, *others = stored(path)
    for other in others:
        swap(path, first, other)
    assert len(CellStore(tmp_path).known(list(expected))) == 1
    _, again, _ = fitted(World(), tmp_path, sizes=(4,), seeds=range(3), arms=ARMS[:2])
    for cell, one in expected.items():
        np.testing.assert_array_equal(again[cell].logits, one.logits)


def test_a_cell_made_with_other_settings_is_another(tmp_path):
    fitted(World(), tmp_path, sizes=(4,), seeds=(0,), arms=ARMS[:1])
    cells = [Cell(ARMS[0].name, "linear", 4, 0)]
    assert CellStore(tmp_path).known(cells) == set(cells)
    (tmp_path / "settings.json").write_text(json.dumps({"shared": {"loss": 2}, "arms": {}, "heads": {}}))
    assert CellStore(tmp_path).known(cells) == set()


@pytest.mark.parametrize("change", ["nan", "shape", "labels", "chosen", "counts", "lost", "cut"])
def test_stored_cells_of_wrong_values_are_fitted_anew(tmp_path, change):
    from safetensors.numpy import load, save

    _, expected, _ = fitted(World(), tmp_path, sizes=(4,), seeds=(0,), arms=ARMS[:1])
    path = tmp_path / "cells.sqlite"
    ((key, value),) = stored(path).items()
    arrays = {name: array.copy() for name, array in load(value).items()}
    match change:
        case "nan":
            arrays["logits"][0] = np.nan
        case "shape":
            arrays["validation_logits"] = arrays["validation_logits"][None]
        case "labels":
            arrays["validation_labels"][0] = 3
        case "chosen":
            arrays["counts"][0] = 99
        case "counts":
            arrays["counts"][2] = -1
        case "lost":
            del arrays["seconds"]
    resign(path, key, value[:-8] if change == "cut" else save(arrays))
    assert CellStore(tmp_path).known(list(expected)) == set()
    _, again, _ = fitted(World(), tmp_path, sizes=(4,), seeds=(0,), arms=ARMS[:1])
    for cell, one in expected.items():
        np.testing.assert_array_equal(again[cell].logits, one.logits)
