"""Parquet files of labelled images: columns as people have them, read lazily, and nothing outside the data set's folder."""

from __future__ import annotations

import io
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, picture
from hydra.utils import instantiate

from guardkit.counterfactual.instructor import TemplateInstructor
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.counterfactual.verifier import NoVerifier
from guardkit.data.budget import check_edits
from guardkit.data.sources.hub import HubSource
from guardkit.data.sources.parquet import ParquetSource
from guardkit.editors.inpaint import InpaintEditor
from guardkit.images import FileContent, read_image
from guardkit.policy import Policy
from guardkit.schema import ImageError, InputError

POLICY = Policy.load(ROOT / "conf/policy/handled_objects.yaml")
TINY = ROOT.parent / "shared/data/tiny_imagenet/val.parquet"


def encoded(seed):
    with io.BytesIO() as file:
        picture(seed, (32, 32)).save(file, "PNG")
        return file.getvalue()


def cell(seed):
    return {"bytes": encoded(seed), "path": f"{seed}.png"}


def table(path, n=6, first=0, image=cell, row_group_size=2, **columns):
    rows = {"image": [image(first + i) for i in range(n)], "label": ["unsafe", "safe"] * (n // 2)} | columns
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: values for name, values in rows.items() if values is not None}), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("image", [cell, encoded], ids=["struct", "binary"])
def test_columns_boxes_and_test_files(tmp_path, compose, image):
    boxes = {"x_min": [0.1] + [None] * 5, "y_min": [0.2] + [None] * 5, "x_max": [0.5] + [None] * 5, "y_max": [0.6] + [None] * 5}
    words = {"category": ["weapons", None] * 3, "caption": ["a knife"] * 6, "group": ["a", "a", "b", None, None, None]}
    table(tmp_path / "set/data/train.parquet", image=image, **boxes, **words)
    test = table(tmp_path / "set/data/test.parquet", n=4, first=50, image=image)
    cfg = compose("train", "source=parquet", f"source.files={tmp_path / 'set'}", f"source.test={test}", "policy=handled_objects")
    loaded = instantiate(cfg.source, _partial_=True, _convert_="all")(policy=POLICY).load()
    assert [record.id for record in loaded.train] == [f"train.parquet/{i}" for i in range(6)]
    assert [record.id for record in loaded.test] == [f"test.parquet/{i}" for i in range(4)]
    assert (loaded.given, loaded.rejected) == (10, [])
    first = loaded.train[0]
    assert (first.label, first.category, first.region, first.caption) == (1, "weapons", (0.1, 0.2, 0.5, 0.6), "a knife")
    assert [record.listed_group for record in loaded.train] == ["a", "a", "b", None, None, None]
    assert loaded.train[0].group == loaded.train[1].group != loaded.train[2].group
    assert [record.region for record in loaded.train[1:]] == [None] * 5
    (tmp_path / "0.png").write_bytes(encoded(0))
    assert first.content.key == FileContent(tmp_path / "0.png").key
    copied = pickle.loads(pickle.dumps(loaded.train[5].content))
    assert (copied.load() == read_image(encoded(5))).all()


def test_classes_without_labels(tmp_path):
    path = table(tmp_path / "a.parquet", label=None, name=["rifle", "cup", "dog", "beer", "rifle", "cup"])
    settings = {"label_column": None, "category_column": "name", "categories": {"rifle": "weapons", "beer": "substances", "dog": None}}
    loaded = ParquetSource(POLICY, [str(path)], **settings).load()
    assert [(record.label, record.category) for record in loaded.train] == [
        (1, "weapons"), (0, None), (1, "substances"), (1, "weapons"), (0, None),
    ]  # fmt: skip
    assert [(one.id, one.reason) for one in loaded.rejected] == [("a.parquet/2", "category 'dog' is left out (null in source.categories)")]


def test_numbers_with_names_are_read_as_the_names(tmp_path):
    """0 would be safe by itself; the table says that it means unsafe."""
    note = b'{"info": {"features": {"label": {"names": ["unsafe", "safe"], "_type": "ClassLabel"}}}}'
    rows = pa.table({"image": [encoded(0), encoded(1)], "label": [0, 1]}).replace_schema_metadata({b"huggingface": note})
    pq.write_table(rows, tmp_path / "a.parquet")
    assert [record.label for record in ParquetSource(POLICY, str(tmp_path / "a.parquet")).load().train] == [1, 0]


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(9))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/near.png").write_bytes(encoded(1))
    (tmp_path / "set/link.png").symlink_to(tmp_path / "secret.png")
    paths = ["near.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "gone.png", None]
    table(tmp_path / "set/a.parquet", image=lambda i: {"bytes": None, "path": paths[i]})
    loaded = ParquetSource(POLICY, str(tmp_path / "set")).load()
    assert [record.id for record in loaded.train] == ["a.parquet/0"]
    outside = "no bytes, and a path that leads outside the data set's folder"
    reasons = {one.id: one.reason for one in loaded.rejected}
    assert [reasons[f"a.parquet/{i}"] for i in (1, 2, 3, 5)] == [outside] * 3 + ["no image in this row"]
    assert loaded.given == 6 == len(loaded.train) + len(loaded.rejected)


def test_a_downloaded_set_reads_no_other_file(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "secret.png").write_bytes(encoded(9))
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}, cell(1)], "label": [1, 0]}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "set/test.parquet")
    loaded = HubSource(POLICY, str(tmp_path / "set")).load()
    (rejected,) = loaded.rejected
    assert rejected.reason == "no bytes, and a path that leads outside the data set's folder"


def test_few_row_groups_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("guardkit.data.sources.parquet._KEPT_BYTES", 10_000)
    table(tmp_path / "a.parquet", n=12)
    loaded = ParquetSource(POLICY, str(tmp_path), check_images=False).load()
    groups = loaded.train[0].content.part._groups
    for record in (*loaded.train, *loaded.train[::-1]):
        record.content.load()
        assert 1 <= len(groups._kept) <= 2
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ImageError, match=r"a\.parquet cannot be read"):
        loaded.train[11].content.load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": "nowhere"}, r"source\.files .*nowhere is not there; give a Parquet file"),
        ({"files": "empty"}, r"source\.files .*empty names no Parquet file"),
        ({"files": "text.parquet"}, r"text\.parquet cannot be read as a Parquet file \(.*\); copy it anew or leave it out"),
        ({"test": "a.parquet"}, r"a\.parquet is given twice in source\.files and source\.test"),
        ({"image_column": "picture"}, r"has no column 'picture'; it has image, label, number; set source\.image_column"),
        ({"image_column": "number"}, r"a\.parquet column number holds int64; expected are encoded images"),
        ({"label_column": "number"}, r"has label 7; allowed are safe, unsafe"),
        ({"group_column": "album"}, r"has no column 'album'.* set source\.group_column"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_input_is_one_line(tmp_path, settings, message):
    table(tmp_path / "a.parquet", number=[7] * 6)
    (tmp_path / "text.parquet").write_text("no table")
    (tmp_path / "empty").mkdir()
    given = {key: str(tmp_path / value) if key in ("files", "test") else value for key, value in settings.items()}
    with pytest.raises(InputError, match=message) as caught:
        ParquetSource(POLICY, **({"files": str(tmp_path / "a.parquet")} | given)).load()
    assert "\n" not in str(caught.value)


# --- photographs whose class is known ----------------------------------------------------------------------------------------

PHOTOS = Policy.load("guardkit:photos")
BOX = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}


def photographs(path, names, first=0, image=cell, **columns):
    boxes = {name: [value] * len(names) for name, value in BOX.items()}
    return table(path, n=len(names), first=first, image=image, label=None, name=names, **(boxes | columns))


@pytest.fixture
def photos(compose, tmp_path):
    """photos(train names, **columns) -> what source=photos holds; the test images are a cannon, a crane and a sock."""

    def load(names, *settings, **columns):
        train = photographs(tmp_path / "train.parquet", names, **columns)
        test = photographs(tmp_path / "val.parquet", ["cannon", "crane", "sock"], first=50)
        cfg = compose("train", "source=photos", f"source.files={train}", f"source.test={test}", "policy=photos", *settings)
        return instantiate(cfg.source, _partial_=True, _convert_="all")(policy=PHOTOS).load()

    return load


def test_the_policy_says_what_a_class_means(photos):
    loaded = photos(["cannon", "tractor", "sock", "syringe", None, "snail"])
    assert [(record.label, record.category, record.caption) for record in loaded.train] == [
        (1, "weapons", "cannon"), (0, "weapons", "tractor"), (0, None, "sock"), (1, "alcohol_and_medicine", "syringe"),
        (0, "venomous_animals", "snail"),
    ]  # fmt: skip
    assert [(record.label, record.category) for record in loaded.test] == [(1, "weapons"), (0, "weapons"), (0, None)]
    assert [(one.id, one.reason) for one in loaded.rejected] == [("train.parquet/4", "no class")]
    assert loaded.train[0].region == (0.1, 0.2, 0.5, 0.6)


def test_no_image_is_decoded_and_none_read_before_it_is_needed(photos, monkeypatch):
    def read(*_, **__):
        raise AssertionError("an image was read")

    monkeypatch.setattr("guardkit.data.sources.parquet._RowGroups.read", read)
    assert len(photos(["cannon", "tractor"] * 20).train) == 40


def test_rows_of_photographs_that_cannot_be_used(photos):
    """No image, a box without area, one outside of the image; found although no image is looked at."""
    loaded = photos(
        ["cannon"] * 6,
        image=lambda i: {"bytes": None, "path": None} if i == 1 else cell(i),
        x_min=[0.1, 0.1, 0.5, 0.1, -0.1, 0.1],
        x_max=[0.5, 0.5, 0.5, 1.2, 0.5, 0.5],
    )
    assert [record.id for record in loaded.train] == ["train.parquet/0", "train.parquet/5"]
    assert {one.id: one.reason for one in loaded.rejected} == {
        "train.parquet/1": "no image in this row",
        "train.parquet/2": "box must satisfy 0 <= min < max <= 1, got 0.5, 0.2, 0.5, 0.6",
        "train.parquet/3": "box must satisfy 0 <= min < max <= 1, got 0.1, 0.2, 1.2, 0.6",
        "train.parquet/4": "box must satisfy 0 <= min < max <= 1, got -0.1, 0.2, 0.5, 0.6",
    }
    assert loaded.given == 9


def test_what_the_data_lack_is_said(photos, caplog):
    photos(["cannon", "sock", "beacon"])
    assert "has no image of beer bottle, pill bottle, syringe, projectile, scorpion, black widow, " in caplog.text
    assert "boa constrictor and 18 more classes, which policy photos names" in caplog.text


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["cannon", "beer_bottle"], [], r"policy 'photos' names the class 'beer bottle', which .* lacks; it has 'beer_bottle': use the same"),
        (["cannon"], ["source.class_column=kind"], r"has no column 'kind'; it has image, name, x_min, .*; set source\.class_column"),
        (["cannon"], ["source.class_column=x_min"], r"column 'x_min' of .* holds none of the classes of policy 'photos', but '0\.1' and the like"),
        (["cannon"], ["source.default_label=safe"], r"source\.class_column=name takes labels from the policy's classes; leave source\.labels"),
    ],
)  # fmt: skip
def test_classes_that_do_not_fit_are_one_line(photos, names, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        photos(names, *settings)
    assert "\n" not in str(caught.value)


def test_a_policy_without_classes_or_look_alikes(tmp_path, caplog):
    path = str(photographs(tmp_path / "a.parquet", ["cannon", "sock"]))
    with pytest.raises(InputError, match="policy 'handled_objects' names none; give its categories classes and look_alikes"):
        ParquetSource(POLICY, path, class_column="name")
    category = {"name": "weapons", "definition": "d", "unsafe_texts": ["a cannon"], "classes": ["cannon"]}
    policy = Policy.from_dict({"name": "mine", "categories": [category]})
    loaded = ParquetSource(policy, path, class_column="name", check_images=False).load()
    assert [(record.label, record.category) for record in loaded.train] == [(1, "weapons"), (0, None)]
    assert "policy mine names no look_alikes for weapons: how often they are flagged will not be known" in caplog.text


def test_without_boxes_an_editor_that_needs_them_says_so(photos):
    records = photos(["cannon"] * 4, **dict.fromkeys(BOX)).train
    pipeline = CounterfactualPipeline(PHOTOS, TemplateInstructor(), InpaintEditor(), NoVerifier(), cache_dir=None)
    with pytest.raises(
        InputError, match=r"none of the 4 images of source=photos can be edited \(4 x no region: editor=inpaint needs a box"
    ):
        check_edits(pipeline, [("images", "counterfactual", records)], "source=photos")


@pytest.mark.skipif(not TINY.is_file(), reason="the photographs are not here")
def test_real_photographs():
    rows = ParquetSource(PHOTOS, str(TINY), class_column="name", check_images=False).load()
    assert (rows.given, len(rows.train), rows.rejected) == (10_000, 10_000, [])
    unsafe = [record for record in rows.train if record.label]
    look_alikes = [record for record in rows.train if record.category and not record.label]
    assert (len(unsafe), len(look_alikes)) == (14 * 50, 15 * 50)
    assert all(record.region is not None for record in rows.train)
    assert rows.train[-1].content.load().shape == (64, 64, 3)


def test_a_column_that_unfolds_to_more_than_its_file_may_hold_is_one_line(scenes_policy, tmp_path):
    """The same megabyte 1,100 times takes a few kilobytes on disk, in a folder whose name is no UTF-8."""
    import os

    folder = os.fsdecode(os.fsencode(tmp_path) + b"/b\xe4d")
    os.mkdir(folder)
    pixels = pa.array([b"\0" * (1 << 20)]).dictionary_encode()
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 1_100, pa.int32()), pixels.dictionary)
    table = pa.table({"image": images.cast(pa.binary()), "label": ["safe", "unsafe"] * 550})
    with open(f"{folder}/small.parquet", "wb") as file:
        pq.write_table(table, file, compression="zstd")
    assert os.stat(f"{folder}/small.parquet").st_size < 1 << 20
    source = ParquetSource(scenes_policy, f"{folder}/small.parquet", check_images=False)
    record = source.load().train[0]
    with pytest.raises(ImageError, match="unfolds to more than"):
        record.content.load()
