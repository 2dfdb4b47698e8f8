"""Data sets of the Hugging Face library: the published schemas, written to disk and read back without a network."""

from __future__ import annotations

import base64
import io
import socket

import datasets
import numpy as np
import pytest
from conftest import ROOT, picture
from hydra.utils import instantiate

from guardkit import Policy
from guardkit.data.sources.hub import HubSource
from guardkit.images import FileContent
from guardkit.schema import ImageError, InputError


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def policy(name):
    return Policy.load(ROOT / f"conf/policy/{name}.yaml")


def encoded(seed, kind="JPEG"):
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def unsafebench(n=12, first=0):
    """Rows in the schema of the data set's card: image, safety_label, category, source, text."""
    features = datasets.Features(
        {"image": datasets.Image()} | {name: datasets.Value("string") for name in ("safety_label", "category", "source", "text")}
    )
    categories = ["Hate", "Illegal activity", "Public and personal health", "Self-harm"]
    rows = {
        "image": [{"bytes": encoded(first + i), "path": f"{i}.jpg"} for i in range(n)],
        "safety_label": ["Unsafe" if i % 3 == 0 else "Safe" for i in range(n)],
        "category": [categories[i % 4] for i in range(n)],
        "source": ["Laion5B" if i % 2 else "Lexica" for i in range(n)],
        "text": [None if i == 0 else f"words {i}" for i in range(n)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def make(compose):
    """make("unsafebench", "source.dataset=...", policy="unsafebench") -> the source that the configuration names."""

    def build(source, *overrides, policy_name="unsafebench"):
        cfg = compose("embed", f"source={source}", f"policy={policy_name}", *overrides)
        return instantiate(cfg.source, _partial_=True, _convert_="all")(policy=policy(policy_name))

    return build


def test_unsafebench_as_published(make, tmp_path):
    datasets.DatasetDict(train=unsafebench(12, 100), test=unsafebench(8)).save_to_disk(tmp_path / "set")
    loaded = make("unsafebench", f"source.dataset={tmp_path / 'set'}").load()
    assert (len(loaded.train), len(loaded.test), loaded.given, loaded.rejected) == (12, 8, 20, [])
    first = loaded.test[0]
    assert (first.id, first.label, first.category, first.source, first.caption) == ("test/0", 1, "hate", "Lexica", "")
    # safe images keep the category they were collected for, as UnsafeBench's tables need it
    assert [record.category for record in loaded.test[:4]] == ["hate", "illegal_activity", "health", "self_harm"]
    assert [record.label for record in loaded.test[:4]] == [1, 0, 0, 1]
    assert {record.source for record in loaded.test} == {"Laion5B", "Lexica"}
    assert first.content.load().shape == (64, 96, 3)


def test_same_bytes_have_the_key_of_a_file(make, tmp_path):
    datasets.DatasetDict(test=unsafebench(2)).save_to_disk(tmp_path / "set")
    loaded = make("unsafebench", f"source.dataset={tmp_path / 'set'}").load()
    (tmp_path / "image.jpg").write_bytes(encoded(0))
    assert loaded.test[0].content.key == FileContent(tmp_path / "image.jpg").key
    assert loaded.train == []


@pytest.mark.parametrize("layout", ["parquet", "imagefolder"])
def test_other_layouts_on_disk(tmp_path, layout):
    folder = tmp_path / "set"
    folder.mkdir()
    if layout == "parquet":
        unsafebench(6).to_parquet(folder / "test-00000.parquet")
        source = HubSource(
            policy("unsafebench"),
            str(folder),
            label_column="safety_label",
            category_column="category",
            categories={"Hate": "hate", "Illegal activity": None, "Public and personal health": "health", "Self-harm": "self_harm"},
        )
    else:
        for split, name, n in (("train", "safe", 2), ("test", "safe", 3), ("test", "weapons", 3)):
            for i in range(n):
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                picture(i).save(folder / split / name / f"{i}.png")
        source = HubSource(policy("handled_objects"), str(folder), labels={"safe": "safe", "weapons": "unsafe"}, category_column="label")
    loaded = source.load()
    assert len(loaded.test) == 6
    unsafe = [record for record in loaded.test if record.label]
    if layout == "parquet":
        assert {record.category for record in unsafe} == {"hate", "self_harm"}
        assert loaded.test[1].category is None
    else:
        assert {record.category for record in unsafe} == {"weapons"}
        np.testing.assert_array_equal(unsafe[0].content.load(), np.asarray(picture(0)))


def test_external_sets_store_base64_and_repeat_by_row(make, tmp_path):
    images = [base64.b64encode(encoded(i, "PNG")).decode() for i in range(3)] + ["1"]
    part = datasets.Dataset.from_dict({"index": list(range(4)), "image": images, "label": [0, 1, 1, 0]})
    datasets.DatasetDict(train=part).save_to_disk(tmp_path / "SMID")
    loaded = make("unsafebench_external", f"source.dataset={tmp_path / 'SMID'}").load()
    assert loaded.test is None
    assert [record.label for record in loaded.train] == [0, 1, 1, 0]
    np.testing.assert_array_equal(loaded.train[3].content.load(), np.asarray(picture(1)))
    assert loaded.train[3].content.key == loaded.train[1].content.key


def test_llavaguard_wants_its_columns_named(make, tmp_path):
    rows = {
        "picture": [{"bytes": encoded(i), "path": None} for i in range(3)],
        "rating": ["Unsafe", "Safe", "Unsafe"],
        "kind": ["O3: Sexual Content", "NA: None applying", "O8: Animal Cruelty"],
    }
    datasets.DatasetDict(test=datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())).save_to_disk(tmp_path / "set")
    given = ["source.image_column=picture", "source.label_column=rating", "source.category_column=kind"]
    loaded = make("llavaguard", f"source.dataset={tmp_path / 'set'}", *given, policy_name="llavaguard").load()
    assert [(record.label, record.category) for record in loaded.test] == [(1, "sexual_content"), (0, None), (1, "animal_cruelty")]


def test_rows_that_cannot_be_used_are_counted(tmp_path, scenes_policy):
    part = datasets.Dataset.from_dict(
        {
            "image": [encoded(0), b"no image", None, encoded(3)],
            "label": [1, 0, 1, None],
        }
    )
    part.save_to_disk(tmp_path / "set")
    loaded = HubSource(scenes_policy, str(tmp_path / "set")).load()
    assert (len(loaded.test), loaded.given) == (1, 4)
    assert [(one.id, one.reason) for one in loaded.rejected] == [
        ("test/3", "no label"),
        ("test/1", "not an image of a known type"),
        ("test/2", "no image in this row"),
    ]
    unchecked = HubSource(scenes_policy, str(tmp_path / "set"), check_images=False).load()
    assert (len(unchecked.test), len(unchecked.rejected)) == (3, 1)
    with pytest.raises(ImageError, match="no image in this row"):
        unchecked.test[2].content.load()


def test_addresses_are_not_fetched(tmp_path, scenes_policy):
    part = datasets.Dataset.from_dict({"url": ["https://example.org/a.jpg", "not base64!"], "label": [1, 0]})
    part.save_to_disk(tmp_path / "set")
    loaded = HubSource(scenes_policy, str(tmp_path / "set"), image_column="url", check_images=False).load()
    with pytest.raises(ImageError, match="web address, and nothing is fetched"):
        loaded.test[0].content.load()
    with pytest.raises(ImageError, match="not base64"):
        loaded.test[1].content.key  # noqa: B018


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_does_not_send_us_elsewhere(tmp_path, scenes_policy, card):
    """The library would fetch what the card of a folder names, from any host, even where the Hub is switched off."""
    datasets.Dataset.from_dict({"image": ["x"], "label": [1]}).to_parquet(tmp_path / "set/test.parquet")
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.2)
        said = f"configs:\n- config_name: default\n  data_files:\n  - split: test\n    path: [http://127.0.0.1:{elsewhere.getsockname()[1]}/x.parquet]\n"
        (tmp_path / "set" / card).write_text(f"---\n{said}---\n" if card.endswith("md") else said)
        with pytest.raises(InputError, match=rf"{card} names 'http://127.0.0.1:.*nothing is fetched from there"):
            HubSource(scenes_policy, str(tmp_path / "set")).load()
        with pytest.raises(TimeoutError):
            elsewhere.accept()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "rating"}, "has no column 'rating'; it has image, safety_label, .*set source.label_column"),
        ({"label_column": "category"}, "has label 'Hate'; allowed are safe, unsafe, 0 and 1"),
        ({"label_column": "category", "labels": {"Hate": "unsafe"}}, "label 'Illegal activity', which source.labels does not list"),
        ({"categories": {"Hate": "hat"}}, r"source.categories\['Hate'\]: category 'hat' is not in policy"),
        ({"labels": {"Safe": "fine"}}, r"source.labels\['Safe'\] has label 'fine'"),
        ({"train_split": "x", "test_split": "y"}, "has the splits test, none of which"),
    ],
)
def test_wrong_settings_are_named(tmp_path, settings, message):
    datasets.DatasetDict(test=unsafebench(4)).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=message):
        HubSource(policy("unsafebench"), str(tmp_path / "set"), **({"label_column": "safety_label"} | settings)).load()


def test_gated_and_missing_sets_say_how_to_get_access(make, monkeypatch):
    def gated(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'yiting/UnsafeBench' is a gated dataset on the Hub. You must be authenticated."
        )

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(
        InputError,
        match=r"is gated: ask for access on https://huggingface.co/datasets/yiting/UnsafeBench, then log in with `hf auth login`",
    ):
        make("unsafebench").load()
    monkeypatch.undo()
    with pytest.raises(InputError, match="there is no such folder"):
        make("unsafebench", "source.dataset=/no/such/folder").load()


def test_without_a_network_the_message_says_what_to_do(make, monkeypatch):
    import huggingface_hub

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"yiting/UnsafeBench cannot be had .*save_to_disk and give source.dataset=FOLDER"):
        make("unsafebench").load()


def test_a_folder_that_is_no_data_set(tmp_path, scenes_policy):
    (tmp_path / "notes.xyz").write_text("nothing")
    with pytest.raises(InputError, match="cannot be loaded as a data set"):
        HubSource(scenes_policy, str(tmp_path)).load()


def test_without_the_extra(monkeypatch, scenes_policy):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'pip install "guardkit\[hub\]"'):
        HubSource(scenes_policy, "a/b").load()
