"""Guards, policies, models and output folders by URL: what is fetched, kept, published and refused."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import call
from conftest import ROOT, picture

from guardkit import GuardClassifier, Policy, local_copies, storage
from guardkit.artifacts import shipped
from guardkit.checks import check_path
from guardkit.data.sources.embeddings import EmbeddingsSource
from guardkit.data.sources.folder import FolderSource
from guardkit.data.sources.pairs import PairsSource
from guardkit.data.sources.parquet import ParquetSource
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.folders import MARK, claim, locked, read_mark
from guardkit.heads import LinearHead
from guardkit.local_copies import local, local_copy, local_folder
from guardkit.publishing import brought_here, working_folder
from guardkit.schema import InputError
from guardkit.storage_errors import StorageError
from guardkit.terminal import printable


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GUARDKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    head = LinearHead.build(scenes_encoder, scenes_policy)
    return GuardClassifier(head, scenes_encoder, scenes_policy, training={"prevalence": 0.5, "experiment": "unpaired"})


@pytest.fixture(autouse=True)
def plain_names(monkeypatch):
    """What one test's copies are called is forgotten by the next."""
    monkeypatch.setattr("guardkit.terminal._names", {})


# --- copies -----------------------------------------------------------------------------------------------------------


def test_an_object_is_fetched_once_for_each_version(bucket, cache, monkeypatch):
    url = f"{bucket}/data/a.bin"
    storage.write(url, b"one")
    path = local_copy(url)
    assert (path.read_bytes(), path.name) == (b"one", "a.bin")
    assert printable(f"{path} is damaged") == f"{url} is damaged"

    def no_more(*args, **kwargs):
        raise AssertionError("it was fetched again")

    with monkeypatch.context() as patch:
        patch.setattr(local_copies, "opened", no_more)
        assert local("weights", url) == local_copy(url) == path
    storage.write(url, b"two")
    assert local_copy(url).read_bytes() == b"two"
    assert path.read_bytes() == b"one"


def test_a_folder_is_fetched_under_its_names(bucket, cache):
    for name in ("a.bin", "deep/er/b.bin", "left-out.txt"):
        storage.write(f"{bucket}/folder/{name}", name.encode())
    folder = local_folder(f"{bucket}/folder", only=lambda name: name.endswith(".bin"))
    assert folder.name == "folder"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {"a.bin", "deep/er/b.bin"}
    assert (folder / "deep/er/b.bin").read_bytes() == b"deep/er/b.bin"
    with pytest.raises(StorageError, match="nothing is not there: no object of that name"):
        local("source.root", f"{bucket}/nothing")


def test_names_that_lead_out_of_the_cache_are_refused(bucket, cache):
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    client.put_object(Bucket=bucket[5:], Key="x/../../escaped", Body=b"1")
    client.close()
    with pytest.raises(StorageError, match="cannot be copied here .path with an empty part, . or .. in it"):
        local_folder(f"{bucket}/x")
    storage.write(f"{bucket}/y/a", b"1")
    storage.write(f"{bucket}/y/a/b", b"1")
    with pytest.raises(StorageError, match="its name is also that of a folder"):
        local_folder(f"{bucket}/y")


def test_copies_make_room_for_newer_ones(bucket, cache, monkeypatch):
    monkeypatch.setenv("GUARDKIT_COPIES_GB", "0.000002")
    paths = []
    for number in range(3):
        storage.write(f"{bucket}/{number}", bytes(900))
        paths.append(local_copy(f"{bucket}/{number}"))
    assert all(path.exists() for path in paths)  # all are in use
    for path in paths[:2]:
        os.utime(path.parent, (1, 1 + paths.index(path)))
    storage.write(f"{bucket}/3", bytes(900))
    paths.append(local_copy(f"{bucket}/3"))
    assert [path.exists() for path in paths] == [False, False, True, True]
    storage.write(f"{bucket}/large", bytes(3000))
    with pytest.raises(StorageError, match="has 3000 bytes, copies here may take 2000; .*GUARDKIT_COPIES_GB"):
        local_copy(f"{bucket}/large")


def test_a_path_is_no_url(tmp_path):
    assert check_path("root", (tmp_path / "a b").as_uri()) == tmp_path / "a b"
    assert local("root", str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="root must be a path on this machine, got the URL s3://bucket/x; copy what lies there"):
        check_path("root", "s3://bucket/x")
    with pytest.raises(InputError, match="must be a text where it is a URL, got .*, which has lost a slash"):
        local("root", Path("s3://bucket/x"))


# --- guards, policies, models -----------------------------------------------------------------------------------------


def test_a_guard_goes_to_a_bucket_and_back(guard, bucket, cache):
    url = f"{bucket}/guards/mine"
    assert guard.save_pretrained(url) == url
    back = GuardClassifier.from_pretrained(url)
    images = [np.asarray(picture(seed)) for seed in range(2)]
    assert [one.score for one in back.predict(images)] == [one.score for one in guard.predict(images)]
    guard.save_pretrained(url)  # replaces it
    assert {one.name for one in storage.items(url)} == {"config.json", "model.safetensors", "policy.yaml", "README.md"}
    storage.write(f"{url}/notes.txt", b"somebody's")
    with pytest.raises(InputError, match="guards/mine holds 'notes.txt', which is not a guard's"):
        guard.save_pretrained(url)


def test_the_guard_of_a_training_run_in_a_bucket(guard, bucket, cache, tmp_path):
    for path in guard.save_pretrained(tmp_path / "guard").iterdir():
        storage.upload(path, f"{bucket}/run/guard/{path.name}")
    storage.write(f"{bucket}/run/metrics.json", b"{}")
    assert GuardClassifier.from_pretrained(f"{bucket}/run").policy == guard.policy
    with pytest.raises(InputError, match="nobody is not there"):
        GuardClassifier.from_pretrained(f"{bucket}/nobody")
    storage.write(f"{bucket}/run/guard/model.safetensors", b"damaged")
    with pytest.raises(InputError, match="model.safetensors is missing or damaged"):
        GuardClassifier.from_pretrained(f"{bucket}/run")


def test_a_policy_in_a_bucket(bucket, cache, scenes_policy):
    storage.upload(ROOT / "conf/policy/scenes.yaml", f"{bucket}/policies/mine.yaml")
    assert Policy.load(f"{bucket}/policies/mine.yaml").digest == scenes_policy.digest


def test_a_model_in_a_bucket(bucket, cache, scenes_encoder):
    for path in shipped("guardkit:scenes_clip").iterdir():
        if path.is_file() and path.suffix != ".py":
            storage.upload(path, f"{bucket}/models/clip/{path.name}")
    encoder = OpenClipEncoder(None, f"{bucket}/models/clip")
    assert encoder.fingerprint == scenes_encoder.fingerprint
    assert encoder.config["weights"] == f"{bucket}/models/clip"
    with pytest.raises(InputError, match="models/none is not there"):
        OpenClipEncoder(None, f"{bucket}/models/none")


# --- output folders ---------------------------------------------------------------------------------------------------


def work(url, settings, write, *, replaces=None):
    folder = working_folder(url)
    with locked(folder), brought_here(url), claim(folder, "train", settings, replaces=replaces):
        write(folder)


def test_results_are_published_with_their_mark_last(bucket, cache, monkeypatch):
    url = f"{bucket}/out/run"
    order = []
    upload = storage.upload
    monkeypatch.setattr("guardkit.publishing.upload", lambda path, to: (order.append(path.name), upload(path, to)))
    work(url, {"n": 1}, lambda folder: (folder / "zz.txt").write_text("1"), replaces=["*.txt"])
    assert order == ["zz.txt", MARK]
    assert {one.name for one in storage.items(url)} == {"zz.txt", MARK}
    assert json.loads(storage.read(f"{url}/{MARK}"))["state"] == "finished"
    assert not list((cache / "outputs").iterdir())  # nothing is left here


def test_a_second_run_replaces_goes_on_or_is_refused(bucket, cache, caplog):
    url = f"{bucket}/out"
    work(url, {"n": 1}, lambda folder: (folder / "a.txt").write_text("1"), replaces=["*.txt"])
    with caplog.at_level(logging.INFO):
        work(url, {"n": 2}, lambda folder: (folder / "b.txt").write_text("2"), replaces=["*.txt"])
    assert f"{url}: replaces an earlier run with other settings" in printable(caplog.text)
    assert {one.name for one in storage.items(url)} == {"b.txt", MARK}
    with pytest.raises(InputError, match="holds results of guardkit train that were made with another n;"):
        work(url, {"n": 3}, lambda folder: None)
    assert not list((cache / "outputs").iterdir())  # nothing is left here
    seen = []
    work(url, {"n": 2}, lambda folder: seen.extend(path.name for path in folder.glob("*.txt")))
    assert seen == ["b.txt"]  # what goes on with stored work finds it
    storage.write(f"{bucket}/others/notes.txt", b"somebody's")
    with pytest.raises(InputError, match="others holds objects that guardkit did not write .notes.txt.; choose another output_dir"):
        work(f"{bucket}/others", {}, lambda folder: None)


def test_what_a_run_that_was_ended_has_done_is_kept(bucket, cache):
    url = f"{bucket}/out"

    def ended(folder):
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(url, {}, ended)
    assert storage.items(url) == []
    work(url, {}, lambda folder: (folder / "whole.txt").write_text((folder / "half.txt").read_text() + "whole"))
    assert storage.read(f"{url}/whole.txt") == b"halfwhole"


def test_a_place_that_somebody_else_writes_to_meanwhile(bucket, cache):
    url = f"{bucket}/out"
    with pytest.raises(StorageError, match="was changed while this run was at work; its results are kept in"):
        work(url, {}, lambda folder: storage.write(f"{url}/other.txt", b"1"))
    assert read_mark(working_folder(url))["state"] == "finished"


def test_an_upload_that_fails_leaves_the_mark_unfinished(bucket, cache, monkeypatch):
    url = f"{bucket}/out"
    upload = storage.upload

    def breaks(path, to):
        if path.name == "b.txt":
            raise StorageError("the line is down")
        upload(path, to)

    def both(folder):
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text(name)

    with monkeypatch.context() as patch:
        patch.setattr("guardkit.publishing.upload", breaks)
        with pytest.raises(StorageError, match="the line is down"):
            work(url, {}, both)
    assert json.loads(storage.read(f"{url}/{MARK}"))["state"] == "unfinished"
    with pytest.raises(InputError, match="made with another n;"):
        work(url, {"n": 2}, both)
    work(url, {}, lambda folder: None)  # nothing is made twice
    assert storage.read(f"{url}/b.txt") == b"b.txt"


def test_a_command_from_bucket_to_bucket(guard, bucket, tmp_path):
    guard.save_pretrained(f"{bucket}/guard")
    asked = ["source=scenes", "source.n_train=40", "source.n_test=40", "max_fpr=0.2", f"guard={bucket}/guard"]
    done = call("guardkit.calibrate", *asked, f"output_dir={bucket}/new", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"{bucket}/new"
    assert {"calibration.json", "guard/config.json", MARK, ".hydra/config.yaml"} <= {one.name for one in storage.items(f"{bucket}/new")}
    assert GuardClassifier.from_pretrained(f"{bucket}/new").history
    assert not [text for one in storage.items(f"{bucket}/new") if (text := storage.read(one.url)) and b"the-tests-secret" in text]
    assert not list(tmp_path.glob("s3:*"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://nobody-has-it/x", "there is no bucket 'nobody-has-it'"),
        ("s3://KEY:hush@bucket/x", "output_dir is a s3:// URL with credentials in it"),
        ("https://example.org/x", "https:// is no object storage"),
    ],
)
def test_places_where_no_results_can_go(url, said, bucket, cache):
    with pytest.raises(InputError, match=said) as error:
        work(url, {}, lambda folder: None)
    assert "hush" not in str(error.value)


# --- sources ----------------------------------------------------------------------------------------------------------


def load(source):
    loaded = source.load()
    assert loaded.given == len(loaded.train) + len(loaded.test or []) + len(loaded.rejected)
    return loaded


def uploaded(folder, url):
    for path in folder.rglob("*"):
        if path.is_file():
            storage.upload(path, f"{url}/{path.relative_to(folder).as_posix()}")


@pytest.fixture
def photos(tmp_path):
    """Class folders with good and bad images."""
    folder = tmp_path / "photos"
    for number in range(6):
        path = folder / ("safe" if number % 2 else "violence/deep") / f"{number} ä.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (folder / "safe/broken.png").write_bytes(b"no image")
    (folder / "safe/notes.txt").write_text("x")
    (folder / "safe/.hidden.png").write_bytes(b"x")
    (folder / "LICENSE").write_text("x")
    return folder


def test_class_folders_in_a_bucket_are_read_as_on_disk(photos, bucket, cache, scenes_policy):
    uploaded(photos, f"{bucket}/photos")
    here, there = load(FolderSource(scenes_policy, str(photos))), load(FolderSource(scenes_policy, f"{bucket}/photos"))
    assert [(one.id, one.label, one.category, one.group, one.content.key) for one in there.train] == [
        (one.id, one.label, one.category, one.group, one.content.key) for one in here.train
    ]
    assert there.rejected == here.rejected
    assert {one.id for one in there.rejected} == {"safe/broken.png", "safe/notes.txt"}
    assert (there.train[0].content.load() == here.train[0].content.load()).all()
    assert str(there.train[0].content) == f"{bucket}/photos/{there.train[0].id}"
    assert not cache.exists()  # images are read where they lie


def test_a_table_of_images_in_a_bucket(photos, bucket, cache, scenes_policy):
    names = ["safe/1 a\u0308.png", "violence\\deep\\0 ä.png", "../x.png", "/abs.png", "gone.png", "safe/broken.png"]
    rows = "".join(f"{name},{label}\n" for name, label in zip(names, (0, 1, 0, 0, 1, 0), strict=True))
    (photos / "metadata.csv").write_text(f"file_name,label\n{rows}", encoding="utf-8")
    uploaded(photos, f"{bucket}/photos")
    here, there = load(FolderSource(scenes_policy, str(photos))), load(FolderSource(scenes_policy, f"{bucket}/photos"))
    assert [one.id for one in there.train] == [one.id for one in here.train] == ["safe/1 ä.png", "violence/deep/0 ä.png"]
    assert sorted(there.rejected, key=str) == sorted(here.rejected, key=str)


def test_names_in_a_bucket_that_are_no_names(photos, bucket, cache, scenes_policy):
    import boto3

    uploaded(photos, f"{bucket}/photos")
    client = boto3.client("s3", region_name="us-east-1")
    for key in ("safe/../../escaped.png", "safe//empty.png", "safe/\x07.png"):
        client.put_object(Bucket=bucket[5:], Key=f"photos/{key}", Body=(photos / "safe/1 ä.png").read_bytes())
    client.close()
    rejected = {one.id: one.reason for one in load(FolderSource(scenes_policy, f"{bucket}/photos")).rejected}
    assert rejected["safe/../../escaped.png"] == rejected["safe//empty.png"] == "path with an empty part, . or .. in it"
    assert rejected["safe/\x07.png"].startswith("control character")


def test_an_image_that_changes_or_goes_after_it_was_listed(photos, bucket, cache, scenes_policy):
    uploaded(photos, f"{bucket}/photos")
    source = FolderSource(scenes_policy, f"{bucket}/photos")
    storage.delete(f"{bucket}/photos/safe/1 ä.png")
    storage.upload(photos / "safe/5 ä.png", f"{bucket}/photos/safe/3 ä.png")
    rejected = {one.id: one.reason for one in load(source).rejected}
    assert rejected["safe/1 ä.png"] == "file does not exist any more"
    assert rejected["safe/3 ä.png"] == "it has changed since it was listed"
    with pytest.raises(InputError, match="source.root .*/nothing is not there, or empty"):
        FolderSource(scenes_policy, f"{bucket}/nothing")


def test_tables_and_embeddings_in_a_bucket(photos, bucket, cache, scenes_policy, tmp_path):
    images = [(photos / f"{folder} ä.png").read_bytes() for folder in ("safe/1", "violence/deep/0", "safe/3", "violence/deep/2")]
    for number, part in enumerate((slice(0, 2), slice(2, 4))):
        (tmp_path / "tables/deep").mkdir(parents=True, exist_ok=True)
        table = pa.table({"image": images[part], "label": [0, 1]})
        pq.write_table(table, tmp_path / ("tables/deep" if number else "tables") / f"{number}.parquet")
    uploaded(tmp_path / "tables", f"{bucket}/tables")
    here = load(ParquetSource(scenes_policy, str(tmp_path / "tables")))
    there = load(ParquetSource(scenes_policy, f"{bucket}/tables"))
    assert [one.id for one in there.train] == [one.id for one in here.train]
    assert {one.content.key for one in there.train} == {one.content.key for one in here.train}
    apart = load(ParquetSource(scenes_policy, [f"{bucket}/tables/0.parquet", f"{bucket}/tables/deep/1.parquet"]))
    assert [one.id for one in apart.train] == [one.id for one in here.train]

    (tmp_path / "stored/img_emb").mkdir(parents=True)
    (tmp_path / "stored/metadata").mkdir()
    vectors = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float16)
    np.save(tmp_path / "stored/img_emb/img_emb_0.npy", vectors)
    pq.write_table(pa.table({"image_path": list("abcd"), "label": [0, 1, 0, 1]}), tmp_path / "stored/metadata/metadata_0.parquet")
    uploaded(tmp_path / "stored", f"{bucket}/stored")
    stored = load(EmbeddingsSource(scenes_policy, f"{bucket}/stored"))
    assert [(one.id, one.label) for one in stored.train] == [("a", 0), ("b", 1), ("c", 0), ("d", 1)]
    storage.write(f"{bucket}/stored/img_emb/img_emb_0.npy", b"damaged")
    with pytest.raises(InputError) as error:
        EmbeddingsSource(scenes_policy, f"{bucket}/stored")
    assert printable(str(error.value)).startswith(f"{bucket}/stored/img_emb/img_emb_0.npy is not an array")


def test_pairs_in_a_bucket(photos, bucket, cache, scenes_policy, tmp_path):
    for number in (1, 3):
        shutil.copy(photos / f"safe/{number} ä.png", photos / f"safe/{number} ä_edited.png")
    uploaded(photos / "safe", f"{bucket}/pairs")
    assert len(load(PairsSource(scenes_policy, f"{bucket}/pairs")).train) == 2


def test_a_storage_that_breaks_down_ends_the_run_and_rejects_nothing(photos, bucket, cache, scenes_policy, monkeypatch):
    uploaded(photos, f"{bucket}/photos")
    source = FolderSource(scenes_policy, f"{bucket}/photos")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"retries": {"total_max_attempts": 1}}})
    with pytest.raises(StorageError, match="the storage cannot be reached"):
        source.load()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["-m", "seed=0,1", "output_dir=s3://bucket/x"], "a multirun writes into a folder on this machine, got output_dir=s3://bucket/x"),
        (["output_dir=s3://KEY:hush@bucket/x"], "output_dir is a s3:// URL with credentials in it"),
    ],
)
def test_places_that_a_command_refuses_at_once(asked, said, tmp_path):
    done = call("guardkit.train", *asked, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr
    assert "hush" not in done.stderr
    assert not list(tmp_path.iterdir())
