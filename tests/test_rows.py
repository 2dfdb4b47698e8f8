"""Rows of any source: one rule for labels, categories and what cannot be used; the same image stands on one side only."""

from __future__ import annotations

import io
import json
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture

from guardkit import Policy
from guardkit.data.duplicates import near_equal_groups
from guardkit.data.grouping import content_key, load_source
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.embeddings import EmbeddingsSource
from guardkit.data.sources.folder import FolderSource
from guardkit.data.sources.hub import HubSource
from guardkit.data.sources.pairs import PairsSource
from guardkit.data.splits import split_test
from guardkit.images import ArrayContent
from guardkit.schema import InputError, Record


@pytest.fixture(scope="module")
def policy():
    category = {"definition": "d", "covered": [], "not_covered": [], "edit": "e", "unsafe_texts": ["u"], "safe_texts": ["s"]}
    return Policy.from_dict(
        {"name": "p", "description": "d", "categories": [{"name": name, **category} for name in ("weapons", "substances")]}
    )


@pytest.fixture
def root(tmp_path):
    """Six different images, g0.png to g5.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        picture(i).save(folder / f"g{i}.png")
    return folder


def png(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def reasons(loaded):
    return {one.id: one.reason for one in loaded.rejected}


def unit(n, d=16, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embedding_folder(folder, *parts):
    """Parts of (vectors, table), as another tool writes them."""
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, (vectors, table) in enumerate(parts):
        np.save(folder / f"img_emb/img_emb_{number}.npy", vectors)
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{number}.parquet")
    return str(folder)


@pytest.fixture
def make(policy, tmp_path):
    """make(kind, said, classes=None, **settings) -> a source of that kind over rows with these labels and categories."""

    def build(kind, said, classes=None, **settings):
        n = len(said)
        columns = {"label": said} | ({"category": classes} if classes else {})
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        if kind == "folder":
            folder = place
            folder.mkdir()
            for i in range(n):
                picture(i).save(folder / f"{i}.png")
            pq.write_table(pa.table({"file_name": [f"{i}.png" for i in range(n)], **columns}), folder / "metadata.parquet")
            return FolderSource(policy, str(folder), **settings)
        if kind == "hub":
            import datasets

            rows = {"image": [png(i) for i in range(n)], **columns}
            datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(place)
            return HubSource(policy, str(place), **({"category_column": "category"} if classes else {}), **settings)
        table = {"image_path": [str(i) for i in range(n)], **columns}
        return EmbeddingsSource(policy, embedding_folder(place, (unit(n), table)), **settings)

    return build


KINDS = ["folder", "hub", "embeddings"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["NSFW", " sfw", "Unsafe", "SAFE ", None, ""], [1, 0, 1, 0]),
        (["yes", "No", "TRUE", "false", " ", "1.0"], [1, 0, 1, 0, 1]),
        ([True, False, None], [1, 0]),
        ([1.0, 0.0, float("nan")], [1, 0]),
        ([1, 0, -1], [1, 0]),
        (["unsafe", "safe", "nan", "None", "<NA>", "N/A"], [1, 0]),  # a missing cell that became text
    ],
)
def test_label_words_and_missing_labels_mean_the_same_in_every_source(make, kind, labels, expected):
    loaded = load_source(make(kind, labels))
    assert [record.label for record in loaded.train] == expected
    assert len(loaded.rejected) == len(labels) - len(expected)
    assert all(reason.startswith("no label") for reason in reasons(loaded).values())
    assert loaded.given == len(loaded.train) + len(loaded.rejected)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_categories_are_translated_in_every_source(make, kind):
    cells = ["bad", "good", "unclear", "other"], ["Guns", "Cats", "Cats", "Cats"]
    source = make(kind, *cells, labels={"Bad": "unsafe", "unclear": None}, default_label="safe", categories={"Guns": "weapons"})
    loaded = source.load()
    assert [(record.label, record.category) for record in loaded.train] == [(1, "weapons"), (0, None), (0, None)]
    assert list(reasons(loaded).values()) == ["label 'unclear' is left out (null in source.labels)"]


@pytest.mark.parametrize("kind", KINDS)
def test_unsafe_images_of_a_category_that_the_policy_does_not_speak_of_are_left_out(make, kind):
    cells = ["unsafe", "unsafe", "safe", "unsafe", None], ["weapons", "gambling", "gambling", None, "gambling"]
    loaded = load_source(make(kind, *cells, categories={"gambling": None}))
    assert [(record.label, record.category) for record in loaded.train] == [(1, "weapons"), (0, None), (1, None)]
    assert list(reasons(loaded).values()) == ["category 'gambling' is left out (null in source.categories)", "no label"]
    assert loaded.given == 5
    without_labels = make(
        kind, [None, None, None], ["weapons", "gambling", "dogs"], categories={"weapons": "weapons", "gambling": None}, label_column=None
    )
    loaded = load_source(without_labels)
    assert [(record.label, record.category) for record in loaded.train] == [(1, "weapons"), (0, None)]
    assert list(reasons(loaded).values()) == ["category 'gambling' is left out (null in source.categories)"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_label_names_the_row_and_the_setting(make, kind):
    with pytest.raises(InputError, match=r"has label 'maybe'; allowed are safe, unsafe, .*source.labels=\{maybe: unsafe, ...\}"):
        make(kind, ["safe", "maybe"]).load()


@pytest.mark.parametrize("kind", KINDS)
def test_labels_follow_from_classes_where_categories_are_listed(make, kind):
    source = make(
        kind, ["", "", "", ""], ["rifle", "cat", "", "rum"], label_column=None, categories={"rifle": "weapons", "rum": "substances"}
    )
    assert [(record.label, record.category) for record in source.load().train] == [(1, "weapons"), (0, None), (1, "substances")]
    with pytest.raises(InputError, match=r"has the class 'weapons', which source.categories does not list; .*the name denies"):
        make(kind, [""] * 2, ["weapons", "cat"], label_column=None, categories={"rum": "substances"}).load()


def test_yaml_reads_yes_as_true_and_the_table_says_yes(make):
    source = make("folder", ["yes", "no", "no"], labels={True: "safe", False: "unsafe"})
    assert [record.label for record in source.load().train] == [0, 1, 1]


def test_spreadsheets_leave_blank_rows_and_columns(policy, root):
    text = "\ufefffile_name;label;;\r\n" + "".join(f"g{i}.png;{'unsafe' if i % 2 else 'safe'}{';;' * (i < 3)}\r\n" for i in range(6))
    (root / "metadata.csv").write_text(text + ";;;\r\n;;;\r\n", encoding="utf-8", newline="")
    loaded = FolderSource(policy, str(root)).load()
    assert (len(loaded.train), loaded.rejected) == (6, [])
    (root / "metadata.csv").write_text("file_name,label\ng0.png,safe\n", encoding="utf-16")
    with pytest.raises(InputError, match="not in UTF-8: save it as CSV UTF-8"):
        FolderSource(policy, str(root)).load()


def test_columns_of_other_names(policy, root):
    (root / "list.csv").write_text("image,verdict,kind\ng0.png,unsafe,weapons\ng1.png,safe,\n")
    columns = {"file_column": "image", "label_column": "verdict", "category_column": "kind"}
    loaded = FolderSource(policy, str(root), metadata="list.csv", **columns).load()
    assert [(record.label, record.category) for record in loaded.train] == [(1, "weapons"), (0, None)]
    with pytest.raises(InputError, match=r"has no column 'genre'; it has image, verdict, kind; set source.category_column"):
        FolderSource(policy, str(root), metadata="list.csv", **columns | {"category_column": "genre"}).load()


def test_a_table_under_another_name_is_suggested(policy, root):
    (root / "labels.csv").write_text("file_name,label\ng0.png,safe\n")
    with pytest.raises(InputError, match="if labels.csv lists the images, set source.metadata=labels.csv"):
        FolderSource(policy, str(root)).load()
    (root / "pictures").mkdir()
    with pytest.raises(InputError, match="has no table .* and no class folder, but the folder 'pictures'.*set source.metadata=labels.csv"):
        FolderSource(policy, str(root)).load()


def test_class_folders_in_any_case_and_with_names_of_their_own(policy, tmp_path):
    for i, name in enumerate(["Safe", "NSFW", "weapons", "fine"]):
        (tmp_path / name).mkdir()
        picture(i).save(tmp_path / name / "a.png")
    loaded = FolderSource(policy, str(tmp_path), labels={"fine": "safe"}).load()
    assert {record.id: (record.label, record.category) for record in loaded.train} == {
        "Safe/a.png": (0, None), "NSFW/a.png": (1, None), "weapons/a.png": (1, "weapons"), "fine/a.png": (0, None),
    }  # fmt: skip


def test_names_from_other_systems_find_their_files(policy, root):
    (root / "ä").mkdir()
    picture(9).save(root / "ä" / "é.png")
    apart = unicodedata.normalize("NFD", "ä\\é.png")
    (root / "metadata.csv").write_text(
        f"file_name,label\n{apart},unsafe\nä/é.png,unsafe\n.\\g0.png,safe\n..\\g1.png,safe\n", encoding="utf-8"
    )
    loaded = FolderSource(policy, str(root)).load()
    assert [record.id for record in loaded.train] == ["ä/é.png", "g0.png"]
    assert reasons(loaded) == {"ä/é.png": "duplicate row", "..\\g1.png": "file does not exist"}


def test_a_link_that_leads_outside_says_so(policy, root, tmp_path):
    picture(9).save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "metadata.csv").write_text("file_name,label\ng0.png,safe\nlink.png,unsafe\n")
    assert reasons(FolderSource(policy, str(root)).load()) == {"link.png": "link that leads outside the folder; put a copy in its place"}


# --- the same image on one side only ------------------------------------------------------------------------------------


def hub(folder, policy, **splits):
    import datasets

    datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"image": [png(i) for i, _ in rows], "label": [y for _, y in rows]})
            for name, rows in splits.items()
        }
    ).save_to_disk(folder)
    return HubSource(policy, str(folder))


def shared(train, test):
    seen = {content_key(record) for record in train}
    return [record.id for record in test if content_key(record) in seen]


def test_equal_images_share_a_group_in_hub_pairs_and_embeddings(policy, tmp_path):
    (tmp_path / "pairs").mkdir()
    for i in range(24):
        picture(i // 3).save(tmp_path / "pairs" / f"{i}.png")
        picture(100 + i).save(tmp_path / "pairs" / f"{i}_edited.png")
    vectors = np.repeat(unit(8), 3, axis=0)
    vectors[1::3] = vectors[1::3].astype(np.float16)
    table = {"image_path": [f"{i % 3}/{i}" for i in range(24)], "label": [i // 3 % 2 for i in range(24)]}
    sources = [
        hub(tmp_path / "hub", policy, train=[(i // 3, i // 3 % 2) for i in range(24)]),
        PairsSource(policy, str(tmp_path / "pairs")),
        EmbeddingsSource(policy, embedding_folder(tmp_path / "emb", (vectors, table))),
    ]
    for source in sources:
        loaded = source.load()
        assert len(loaded.train) == 24
        assert len({record.group for record in loaded.train}) == 8, source.name
        assert shared(*split_test(loaded.train, 0.3, 0)) == []


def test_pairs_whose_counterfactuals_are_the_same_image_share_a_group(policy, tmp_path):
    for i in range(24):
        picture(i).save(tmp_path / f"{i}.png")
        picture(100 + i // 3, (96, 72)).resize((96 - i, 72 - i)).save(tmp_path / f"{i}_edited.png")
    loaded = PairsSource(policy, str(tmp_path)).load()
    assert len(loaded.train) == 24
    assert len({record.group for record in loaded.train}) == 8


def test_training_rows_that_are_test_rows_leave_the_training_pool(policy, tmp_path):
    source = hub(tmp_path / "set", policy, train=[(i, i % 2) for i in range(8)], test=[(i, i % 2) for i in range(6, 12)])
    loaded = load_source(source)
    assert (len(loaded.train), len(loaded.test), loaded.given) == (6, 6, 14)
    assert reasons(loaded) == {f"train/{i}": f"the same image as, or listed together with, the test image test/{i - 6}" for i in (6, 7)}
    assert shared(loaded.train, loaded.test) == []


def test_a_source_of_somebody_else_is_checked_too(policy):
    class Theirs:
        name, asked = "theirs", {}

        def load(self):
            contents = [ArrayContent(np.asarray(picture(i % 4))) for i in range(8)]
            records = [Record(str(i), i % 2, None, "theirs", str(i), content) for i, content in enumerate(contents)]
            bad = [
                Record("bad", 1, None, "theirs", "bad", ArrayContent(np.zeros((2, 2, 7), np.uint8))),
                Record("nan", 1, None, "theirs", "nan", None, embedding=np.full(4, np.nan, np.float32)),
                Record("zero", 1, None, "theirs", "zero", None, embedding=np.zeros(4, np.float32)),
            ]
            return Loaded([*records, *bad], None, [], 11)

    loaded = load_source(Theirs())
    assert (len(loaded.train), len({record.group for record in loaded.train})) == (8, 4)
    assert list(reasons(loaded)) == ["bad", "nan", "zero"]
    assert all(record.perceptual_hash is not None for record in loaded.train)


def test_vectors_that_differ_by_rounding_are_told_from_others():
    vectors = unit(2000, 64) + 0.3  # as narrow a cone as encoders give
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = near_equal_groups([*vectors, *vectors.astype(np.float16), *(vectors + 1e-5)])
    assert len(set(groups.tolist())) == 2000
    np.testing.assert_array_equal(groups[:2000], groups[2000:4000])
    np.testing.assert_array_equal(groups[:2000], groups[4000:])


# --- embedding folders --------------------------------------------------------------------------------------------------


def test_rows_without_a_direction_are_rejected_and_empty_parts_passed_over(policy, tmp_path):
    vectors = unit(6).astype(np.float16)
    vectors[2], vectors[4], vectors[5, 0] = np.nan, 0, np.inf
    table = {"image_path": list("abcdef"), "label": [0, 1, 0, 1, 0, 1]}
    none = {"image_path": pa.array([], pa.string()), "label": pa.array([], pa.int64())}
    folder = embedding_folder(tmp_path / "e", (np.zeros((0, 16), np.float16), none), (vectors, table), (np.zeros(0, np.float32), none))
    loaded = EmbeddingsSource(policy, folder).load()
    assert [record.id for record in loaded.train] == ["a", "b", "d"]
    assert reasons(loaded) == dict.fromkeys("cef", "its vector is zero or not finite")
    assert loaded.given == 6
    with pytest.raises(InputError, match="all its parts are empty"):
        EmbeddingsSource(policy, embedding_folder(tmp_path / "none", (np.zeros((0, 16), np.float16), none)))


def test_paths_that_repeat_across_parts_are_different_images_unless_their_vectors_are_equal(policy, tmp_path):
    vectors, more = unit(3), unit(3, seed=1)
    more[1] = vectors[1].astype(np.float16)
    paths = ["0", "1", "0#2"]
    folder = embedding_folder(
        tmp_path / "e", (vectors, {"image_path": paths, "label": [0, 1, 0]}), (more, {"image_path": ["0", "1", "0"], "label": [1, 1, 1]})
    )
    loaded = EmbeddingsSource(policy, folder).load()
    assert [(record.id, record.label) for record in loaded.train] == [("0", 0), ("1", 1), ("0#2", 0), ("0#3", 1)]
    assert [(one.id, one.reason) for one in loaded.rejected] == [("1", "duplicate row"), ("0#3", "duplicate row")]


# --- images without labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["flat", "some", "hub"])
def test_images_without_labels_are_embedded_and_not_trained_on(compose, policy, tmp_path, caplog, root, layout):
    from guardkit.runs.embed import run as embed_source

    settings = ["source=folder", f"source.root={root}", "policy=handled_objects"]
    if layout == "some":
        rows = "g0.png,safe\ng1.png,\ng2.png,unsafe\ng3.png,\ng4.png,safe\ng5.png,unsafe\nnone.png,\n"
        (root / "metadata.csv").write_text("file_name,label\n" + rows)
    elif layout == "hub":
        import datasets

        datasets.Dataset.from_dict({"image": [png(i) for i in range(6)]}).save_to_disk(tmp_path / "set")
        settings = ["source=hub", f"source.dataset={tmp_path / 'set'}", "policy=handled_objects"]
    out = tmp_path / "out"
    counts = embed_source(compose("embed", *settings), out)
    n_bad = int(layout == "some")
    assert counts == {"given": 6 + n_bad, "written": 6, "rejected": n_bad}
    assert not any(": rejected (no label" in message for message in caplog.messages)  # what is embedded is not called rejected
    table = pq.read_table(out / "metadata/metadata_0.parquet")
    assert sorted(table["label"].to_pylist(), key=str) == ([0, 0, 1, 1, None, None] if layout == "some" else [None] * 6)
    assert [one["id"] for one in pq.read_table(out / "rejected.parquet").to_pylist()] == ["none.png"] * n_bad
    if layout == "some":
        loaded = EmbeddingsSource(policy, str(out)).load()
        assert (len(loaded.train), set(reasons(loaded).values())) == (4, {"no label"})
    else:
        with pytest.raises(InputError, match=r"no row that can be used \(6 of 6 inputs were rejected, .*: no label"):
            EmbeddingsSource(policy, str(out)).load()


def test_training_counts_what_it_could_not_use(compose, tmp_path, root):
    from guardkit.runs.train import run

    for i in range(6, 30):
        picture(i).save(root / f"g{i}.png")
    (root / "g7.png").write_bytes(b"gone")
    rows = "".join(f"g{i}.png,{['safe', 'unsafe'][i % 2] if i != 4 else ''}\n" for i in range(30))
    (root / "metadata.csv").write_text("file_name,label\n" + rows)
    settings = [
        "source=folder",
        f"source.root={root}",
        "policy=handled_objects",
        "editor=none",
        "experiment=unpaired",
        "trainer.max_epochs=2",
    ]
    run(compose("train", *settings), {}, tmp_path / "run")
    inputs = json.loads((tmp_path / "run/metrics.json").read_text())["inputs"]
    assert inputs["given"] == 30
    assert {one["id"]: one["reason"] for one in inputs["rejected"]} == {"g4.png": "no label", "g7.png": "not an image of a known type"}


@pytest.mark.parametrize("command", ["train", "sweep", "synthesize"])
def test_a_folder_without_table_and_class_folders_says_that_first(compose, tmp_path, root, command):
    from importlib import import_module

    run = import_module(f"guardkit.runs.{command}").run
    settings = ["source=folder", f"source.root={root}", "policy=handled_objects", "editor=none"]
    given = ({},) if command != "synthesize" else ()
    with pytest.raises(InputError) as caught:
        run(compose(command, *settings), *given, tmp_path / "run")
    assert str(caught.value).startswith(
        f"{root} has no table (metadata.csv, metadata.parquet, metadata.jsonl) and no class folders, so that "
    )
    assert "which of its 6 images are unsafe; write metadata.csv" in str(caught.value)
    assert "folders called safe, unsafe or like a category of policy 'handled_objects' (weapons, " in str(caught.value)


def test_a_source_without_labels_says_why_it_cannot_be_trained_on(compose, tmp_path, root):
    from guardkit.runs.train import run

    (root / "metadata.csv").write_text("file_name\n" + "".join(f"g{i}.png\n" for i in range(6)))
    settings = ["source=folder", f"source.root={root}", "policy=handled_objects", "editor=none"]
    with pytest.raises(
        InputError,
        match=r"^source=folder has no labelled image that can be used \(6 of 6 inputs were rejected, the first is g0.png: no label\)",
    ):
        run(compose("train", *settings), {}, tmp_path / "run")
