"""FolderSource on untrusted folders: every input is a record or is rejected, and ids and groups hold."""

from __future__ import annotations

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import picture

from guardkit.data.sources.folder import FolderSource
from guardkit.policy import Policy
from guardkit.schema import InputError

GOOD = "g0.png,unsafe\ng1.png,safe\n"


@pytest.fixture
def policy():
    names = ("weapons", "substances")
    category = {"definition": "d", "covered": ["c"], "not_covered": ["n"], "edit": "e", "unsafe_texts": ["u"], "safe_texts": ["s"]}
    return Policy.from_dict({"name": "p", "description": "d", "categories": [{"name": name, **category} for name in names]})


@pytest.fixture
def root(tmp_path):
    """Five different images, g0.png to g4.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        picture(i).save(folder / f"g{i}.png")
    return folder


def load(policy, root, text=None, **options):
    if text is not None:
        (root / "metadata.csv").write_text(text, encoding="utf-8")
    loaded = FolderSource(policy, str(root), **options).load()
    assert loaded.given == len(loaded.train) + len(loaded.rejected)
    assert len({record.id for record in loaded.train}) == len(loaded.train)
    return loaded


def reasons(loaded):
    return {item.id: item.reason for item in loaded.rejected}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../images/g2.png", "path outside the folder"),
        ("sub/../../secret.png", "path outside the folder"),
        ("/etc/hostname", "absolute path"),
        ("a\0b.png", "not a usable path"),
        ("x" * 5000 + ".png", "cannot be read"),
        ("circle.png", "link"),  # how the loop is called depends on the version of Python
        ("sub", "is a folder"),
        ("pipe.png", "pipe or device"),
        ("none.png", "does not exist"),
    ],
    ids=lambda value: value[:20].replace("\0", "0"),
)
def test_names_that_lead_nowhere_are_rejected(policy, root, name, reason):
    (root / "sub").mkdir()
    os.symlink("circle.png", root / "circle.png")
    os.mkfifo(root / "pipe.png")
    (rejected,) = load(policy, root, f"file_name,label\n{GOOD}{name},safe\n").rejected
    assert reason in rejected.reason


def test_one_file_spelled_twice_is_one_record(policy, root):
    (root / "sub").mkdir()
    loaded = load(policy, root, f"file_name,label\n{GOOD}g2.png,unsafe\n./g2.png,safe\nsub/../g1.png,safe\n")
    assert [record.id for record in loaded.train] == ["g0.png", "g1.png"]
    assert [(item.id, item.reason) for item in loaded.rejected] == [
        ("g2.png", "listed as safe and as unsafe"),
        ("g2.png", "listed as safe and as unsafe"),
        ("g1.png", "duplicate row"),
    ]


def test_rows_that_disagree_are_told_from_rows_that_repeat(policy, root):
    rows = "file_name,label,category\ng0.png,unsafe,weapons\ng1.png,safe,\ng1.png,safe,\ng0.png,unsafe,substances\n,safe,\n,unsafe,\n"
    loaded = load(policy, root, rows)
    assert [(record.id, record.category) for record in loaded.train] == [("g0.png", "weapons"), ("g1.png", None)]
    assert reasons(loaded) == {
        "g1.png": "duplicate row",
        "g0.png": "duplicate row that says something else; the first counts",
        "row 5": "no file name",
        "row 6": "no file name",
    }


def test_groups_join_what_is_listed_together_and_what_looks_alike(policy, root):
    picture(1).save(root / "copy_of_g1.jpg", quality=80)
    rows = "file_name,label,group\ng0.png,unsafe,7\ng1.png,safe,7\ng2.png,safe,\ng3.png,unsafe,\ng4.png,safe,8\ncopy_of_g1.jpg,unsafe,9\n"
    group = {record.id: record.group for record in load(policy, root, rows).train}
    assert group == {
        "g0.png": "g0.png",
        "g1.png": "g0.png",
        "copy_of_g1.jpg": "g0.png",
        "g2.png": "g2.png",
        "g3.png": "g3.png",
        "g4.png": "g4.png",
    }
    unchecked = {record.id: record.group for record in load(policy, root, check_images=False).train}
    assert unchecked == {**group, "copy_of_g1.jpg": "copy_of_g1.jpg"}


@pytest.mark.parametrize("missing", ["", None])
def test_missing_cells_do_not_make_a_group_or_a_box(policy, root, missing):
    rows = [{"file_name": f"g{i}.png", "label": int(i < 2), "group": missing, "category": missing, "x_min": None} for i in range(4)]
    rows = [{**row, "y_min": None, "x_max": None, "y_max": None} for row in rows]
    rows[0] |= {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 1.0}
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load(policy, root)
    assert len({record.group for record in loaded.train}) == 4
    assert [record.region for record in loaded.train] == [(0.1, 0.2, 0.5, 1.0), None, None, None]


def test_nan_is_a_missing_cell(policy, root):
    nan = float("nan")
    table = pa.table({"file_name": ["g0.png", "g1.png"], "label": [1, 0], "group": [nan, nan], **{name: [0.1, nan] for name in ("x_min", "y_min")},
                      **{name: [0.9, nan] for name in ("x_max", "y_max")}})  # fmt: skip
    pa.parquet.write_table(table, root / "metadata.parquet")
    loaded = load(policy, root)
    assert [record.region for record in loaded.train] == [(0.1, 0.1, 0.9, 0.9), None]
    assert len({record.group for record in loaded.train}) == 2


@pytest.mark.parametrize("box", ["0.1,,,", "0.1,0.1,0.1,0.5", "0,0,1,1.01", "-0.1,0,1,1", "a,b,c,d", "inf,0,1,1"])
def test_boxes_that_are_none_are_rejected(policy, root, box):
    text = f"file_name,label,x_min,y_min,x_max,y_max\ng0.png,unsafe,0,0,1,1\ng1.png,safe,,,,\ng2.png,unsafe,{box}\n"
    assert list(reasons(load(policy, root, text))) == ["g2.png"]


def test_a_csv_is_read_as_text(policy, root):
    first = "file_name,label,caption,weight\n" + "".join(f"none{i}.png,safe,,1\n" for i in range(3))
    text = first + 'g0.png,unsafe,"two\nlines, one cell",heavy\ng1.png,0,x,\n'
    (root / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    loaded = load(policy, root)
    assert [(record.label, record.caption.split()[0]) for record in loaded.train] == [(1, "two"), (0, "x")]


def test_json_lines_may_begin_with_the_mark_of_windows(policy, root):
    text = "".join(f'{{"file_name": "g{i}.png", "label": {i % 2}}}\r\n' for i in range(3))
    (root / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [record.label for record in load(policy, root).train] == [0, 1, 0]


def test_a_safe_image_may_be_listed_with_a_category_of_another_policy(policy, root):
    loaded = load(policy, root, "file_name,label,category\ng0.png,unsafe,weapons\ng1.png,safe,kitchen\ng2.png,safe,weapons\n")
    assert [record.category for record in loaded.train] == ["weapons", None, "weapons"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,label\n", "has no rows"),
        ("", "cannot be read as a table"),
        ("file_name,label\ng0.png,safe,1\n", "cannot be read as a table"),
        ("file_name,label,label\ng0.png,safe,unsafe\n", "has the column 'label' more than once"),
        ("file,label\ng0.png,safe\n", "has no column 'file_name'; it has file, label; set source.file_column"),
        ("file_name,label\ng0.png,maybe\n", r"row 1 has label 'maybe'; allowed are safe, unsafe, .*source.labels=\{maybe: unsafe, ...\}"),
        (
            "file_name,label\na.png,unsafe\nb.png,safe\n",
            r"no image that can be used \(2 of 2 inputs were rejected, the first is a.png: file does not exist\)",
        ),
    ],
)
def test_unusable_metadata_is_one_line(policy, root, text, message):
    with pytest.raises(InputError, match=message) as caught:
        load(policy, root, text)
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_be_meant_are_refused(policy, root):
    (root / "list.txt").write_text("file_name,label\n" + GOOD)
    (root / "broken.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(InputError, match=r"must be a .csv, .parquet or .jsonl"):
        load(policy, root, metadata="list.txt")
    with pytest.raises(InputError, match=r"broken.parquet cannot be read as a table"):
        load(policy, root, metadata="broken.parquet")
    with pytest.raises(InputError, match=r"names the folder '\.\.'"):
        FolderSource(policy, str(root), categories={"..": "weapons"})
    with pytest.raises(InputError, match="category 'gambling' is not in policy 'p'"):
        FolderSource(policy, str(root), categories={"cars": "gambling"})
    with pytest.raises(InputError, match=r"'safe', a label and no category; .* else give source.labels=\{cars: safe\}"):
        FolderSource(policy, str(root), categories={"cars": "safe"})
    with pytest.raises(InputError, match="is not a folder"):
        FolderSource(policy, str(root / "g0.png"))


def test_folders_account_for_every_file(policy, tmp_path):
    for i, name in enumerate(["weapons/a.PNG", "weapons/deep/b.png", "safe/c.png", "beside.png", "safe/.hidden.png", "safe/.trash/d.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / name)
    for name in ("README.md", "LICENSE", "notes.txt", "safe/list.doc"):
        (tmp_path / name).write_text("x")
    (tmp_path / "safe/more").symlink_to(tmp_path / "weapons/deep")
    (tmp_path / "safe/alias.png").symlink_to(tmp_path / "weapons/a.PNG")
    picture(9).save(os.fsencode(tmp_path) + b"/safe/caf\xe9.png", "PNG")
    loaded = load(policy, tmp_path)
    assert {record.id for record in loaded.train} == {"weapons/a.PNG", "weapons/deep/b.png", "safe/c.png", "safe/alias.png"}
    assert reasons(loaded) == {
        "beside.png": "no label: not in the folder of a class",
        "notes.txt": "not an image: its name ends in .txt",
        "safe/list.doc": "not an image: its name ends in .doc",
        "safe/more": "link to a folder, which is not followed",
        "safe/caf\\udce9.png": "its name is not valid UTF-8",
    }
    group = {record.id: record.group for record in loaded.train}
    assert group["safe/alias.png"] == group["weapons/a.PNG"]


def test_a_mapping_may_name_folders_by_number(policy, tmp_path):
    for i, name in enumerate(["0", "1"]):
        (tmp_path / name).mkdir()
        picture(i).save(tmp_path / name / "a.png")
    loaded = load(policy, tmp_path, categories={0: "weapons"})
    assert {record.id: (record.label, record.category) for record in loaded.train} == {
        "0/a.png": (1, "weapons"),
        "1/a.png": (0, None),
    }
    (tmp_path / "unsafe").mkdir()
    picture(2).save(tmp_path / "unsafe" / "a.png")
    with pytest.raises(
        InputError, match="has the folder 'unsafe', which source.categories does not list; .*list it as {unsafe: CATEGORY} or rename it"
    ):
        load(policy, tmp_path, categories={0: "weapons"})


def test_an_unknown_folder_is_named_with_the_remedy(policy, tmp_path):
    for name in ("safe", "automobile"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "a.png")
    with pytest.raises(InputError, match=r"'automobile'.*weapons, substances.*source.categories=\{automobile: CATEGORY\}"):
        load(policy, tmp_path)
    (tmp_path / "truck").mkdir()
    with pytest.raises(
        InputError, match=r"has the folders 'automobile', 'truck'; .*source.categories=\{automobile: CATEGORY, truck: CATEGORY\}"
    ):
        load(policy, tmp_path)
    shutil.rmtree(tmp_path / "safe")
    with pytest.raises(
        InputError,
        match=r"has no table \(metadata.csv, .*\) and no class folder, but the folders 'automobile', 'truck'; without a table, folders must",
    ) as caught:
        load(policy, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path} has no table (")


def test_folders_that_source_categories_misses_are_named_together(policy, tmp_path):
    for name in ("0", "unsafe", "weapons"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "a.png")
    with pytest.raises(
        InputError,
        match="has the folders 'unsafe', 'weapons', which source.categories does not list; .*which the names deny: "
        "list them as {unsafe: CATEGORY, weapons: CATEGORY} or rename them",
    ):
        load(policy, tmp_path, categories={0: "weapons"})
    with pytest.raises(
        InputError, match="source.categories names the folders 'cars', 'boats', which .* does not have; it has 0, unsafe, weapons"
    ):
        load(policy, tmp_path, categories={"cars": "weapons", "boats": "weapons"})


def test_class_folders_that_are_left_out_say_so(policy, tmp_path):
    for i, name in enumerate(("cars", "guns", "dogs")):
        (tmp_path / name).mkdir()
        picture(i).save(tmp_path / name / "a.png")
    loaded = load(policy, tmp_path, categories={"guns": "weapons", "cars": None})
    assert {record.id: record.label for record in loaded.train} == {"guns/a.png": 1, "dogs/a.png": 0}
    assert reasons(loaded) == {"cars/a.png": "category 'cars' is left out (null in source.categories)"}
    loaded = load(policy, tmp_path, labels={"guns": "unsafe", "dogs": "safe", "cars": None})
    assert reasons(loaded) == {"cars/a.png": "label 'cars' is left out (null in source.labels)"}


def test_categories_are_read_in_any_case_and_spelling(root):
    """As label words are: in tables and as folders."""
    category = {"definition": "d", "unsafe_texts": ["u"]}
    spelled = Policy.from_dict({"name": "p", "categories": [{"name": name, **category} for name in ("weapons", "self_harm")]})
    table = "file_name,label,category\ng0.png,unsafe,Weapons\ng1.png,unsafe, Self-Harm \ng2.png,unsafe,SELF HARM\ng3.png,safe,Kitchen\n"
    found = {record.id: record.category for record in load(spelled, root, table).train}
    assert found == {"g0.png": "weapons", "g1.png": "self_harm", "g2.png": "self_harm", "g3.png": None}
    with pytest.raises(InputError, match="category 'weapon' is not in policy 'p'"):
        load(spelled, root, "file_name,label,category\ng0.png,unsafe,weapon\n")
    (root / "metadata.csv").unlink()
    for i, folder in enumerate(("Weapons", "Self Harm", "Safe")):
        (root / folder).mkdir()
        (root / f"g{i}.png").rename(root / folder / f"g{i}.png")
    found = {record.id: (record.label, record.category) for record in load(spelled, root).train}
    assert found == {"Weapons/g0.png": (1, "weapons"), "Self Harm/g1.png": (1, "self_harm"), "Safe/g2.png": (0, None)}
