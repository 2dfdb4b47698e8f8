"""Objects in object storage: a real S3 server on this machine, memory://, file://, and a storage that has a bad day."""

import asyncio
import io
import json
import os
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_storage import FaultyStorage

from guardkit import storage
from guardkit.schema import InputError
from guardkit.storage_errors import ChangedError, MissingError, StorageError


@pytest.fixture(params=["s3", "memory", "file"])
def place(request, tmp_path):
    """An empty place in each kind of storage."""
    if request.param == "s3":
        return request.getfixturevalue("bucket") + "/place"
    return f"memory://{request.node.name}/place" if request.param == "memory" else (tmp_path / "a place").as_uri()


@pytest.fixture
def faulty(bucket, s3_server, monkeypatch):
    """A bucket behind a server that fails as it is told, with short waits."""
    from fsspec.config import conf

    server = FaultyStorage(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *args: sleep(min(seconds, 0.01), *args))  # between tries
    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 0.3, "retries": {"mode": "standard", "total_max_attempts": 2}}})
    server.bucket = bucket
    yield server
    server.close()


# --- URLs -------------------------------------------------------------------------------------------------------------


def test_a_url_is_told_from_a_path():
    assert all(map(storage.is_url, ["s3://bucket/x", "S3://b/x", "hf://datasets/a/b", "file:///x", "memory://x", "http://x"]))
    assert not any(map(storage.is_url, ["C:\\x", "c:/x", "./a", "/a", "a//b", "s3:x", "hf-hub:a/b", "guardkit:scenes", "", None, 3]))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://x.org/a.tar", "http:// is no object storage; fetch it first"),
        ("https://x.org/a.tar", "https:// is no object storage"),
        ("s3://", "names no bucket; give s3://bucket/folder"),
        ("s4://bucket/x", "s4:// is a protocol that fsspec does not know; use s3://, gs://"),
        ("s3://bucket/../other", "path with an empty part, . or .. in it"),
        ("s3://bucket/a\nb", "control character"),
    ],
)
def test_urls_that_are_no_storage(url, said):
    with pytest.raises(InputError) as error:
        storage.check_url("input", url)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["s3://KEY:hush@bucket/x", "s3://hush@bucket/x", "abfs://a:hush@host/x"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(InputError, match="credentials in it.*AWS_PROFILE") as error:
        storage.item(url)
    assert "hush" not in str(error.value)


def test_a_storage_whose_package_is_missing(monkeypatch):
    import fsspec

    def missing(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(InputError, match=r's3:// needs the package s3fs; pip install "guardkit\[cloud\]"'):
        storage.item("s3://bucket/x")


def test_google_storage_goes_to_its_file_system(monkeypatch):
    """No network: only which class is asked is seen."""
    gcsfs = pytest.importorskip("gcsfs")
    from fsspec.config import conf

    monkeypatch.setitem(conf, "gs", {"token": "anon", "project": "p"})
    monkeypatch.setattr(gcsfs.GCSFileSystem, "info", lambda self, path: {"type": "file", "size": 3, "etag": path})
    assert storage.item("gs://bucket/a.tar") == storage.Item("gs://bucket/a.tar", "a.tar", 3, "bucket/a.tar-3")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a dataset with two files needs."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        if "/tree/" in self.path:
            files = [{"type": "file", "path": f"sub/{name}", "oid": f"oid-{name[-5]}", "size": 3} for name in ("a.bin", "deep/b.bin")]
            body = json.dumps([*files, {"type": "directory", "path": "sub/deep", "oid": "d", "size": 0}])
        else:
            body = self.path[-5:-2] if "/resolve/" in self.path else json.dumps({"id": "org/name", "tags": [], "siblings": []})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


@pytest.mark.parametrize("revision", ["", "@abc123"])
def test_files_on_the_hub(revision, monkeypatch):
    from fsspec.config import conf

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setitem(conf, "hf", {"endpoint": f"http://127.0.0.1:{server.server_port}"})
    url = f"hf://datasets/org/name{revision}/sub"
    assert storage.items(url) == [
        storage.Item(f"{url}/a.bin", "a.bin", 3, "oid-a-3"),
        storage.Item(f"{url}/deep/b.bin", "deep/b.bin", 3, "oid-b-3"),
    ]
    assert [storage.read(one.url, version=one.version) for one in storage.items(url)] == [b"a.b", b"b.b"]
    server.shutdown()
    server.server_close()


def test_the_hub_that_is_switched_off():
    with pytest.raises(StorageError, match="hf://datasets/org/name/a.tar cannot be read .*; "):
        storage.item("hf://datasets/org/name/a.tar")


# --- objects ----------------------------------------------------------------------------------------------------------


def test_objects_are_written_listed_read_and_deleted(place):
    data = {"b/2.bin": b"two", "a.bin": b"", "b/10 ä%?.bin": os.urandom(100_000), "c": b"see"}
    for name, value in data.items():
        storage.write(storage.joined(place, name), value)
    listed = storage.items(place)
    assert [one.name for one in listed] == sorted(data)
    assert [one.size for one in listed] == [len(data[name]) for name in sorted(data)]
    for one in listed:
        assert storage.read(one.url, version=one.version) == data[one.name]
        assert storage.item(one.url) == storage.Item(one.url, one.name.split("/")[-1], one.size, one.version)
    assert storage.items(storage.joined(place, "b"))[0].name == "10 ä%?.bin"
    assert storage.exists(storage.joined(place, "b"))
    assert storage.item(storage.joined(place, "b")) is None
    with pytest.raises(StorageError, match="has 100000 bytes, allowed are 10"):
        storage.read(storage.joined(place, "b/10 ä%?.bin"), limit=10)
    storage.delete(storage.joined(place, "c"))
    storage.delete(storage.joined(place, "c"))
    assert not storage.exists(storage.joined(place, "c"))
    assert storage.items(storage.joined(place, "nothing")) == []
    with pytest.raises(MissingError, match=r"c cannot be read \(.*\); "):
        storage.read(storage.joined(place, "c"))


def test_a_file_is_uploaded_whole_and_nothing_after_an_error(place, tmp_path):
    data = os.urandom(20_000_000)
    with storage.written(storage.joined(place, "x/large.bin")) as temporary:
        temporary.write_bytes(data)

    def interrupted():
        with storage.written(storage.joined(place, "x/other.bin")) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        interrupted()
    assert [(one.name, one.size) for one in storage.items(place)] == [("x/large.bin", len(data))]
    assert storage.read(storage.joined(place, "x/large.bin")) == data


def test_a_tar_is_streamed_and_a_table_sought_in(place):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for number in range(20):
            info = tarfile.TarInfo(f"{number}.bin")
            info.size = 1_000_000
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    storage.write(storage.joined(place, "a.tar"), packed.getvalue())
    with storage.opened(storage.joined(place, "a.tar"), ahead=True) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        assert [(one.name, tar.extractfile(one).read()[-1:]) for one in tar] == [(f"{n}.bin", bytes([n])) for n in range(20)]
    table = pa.table({"n": np.arange(1000), "image": [os.urandom(100) for _ in range(1000)]})
    with storage.written(storage.joined(place, "a.parquet")) as temporary:
        pq.write_table(table, temporary, row_group_size=100)
    with storage.opened(storage.joined(place, "a.parquet")) as file, pq.ParquetFile(file) as opened:
        assert opened.read_row_group(7).equals(table.slice(700, 100))


def test_many_threads_read_one_object(place):
    data = os.urandom(3_000_000)
    storage.write(storage.joined(place, "a"), data)
    found = []
    threads = [threading.Thread(target=lambda: found.append(storage.read(storage.joined(place, "a")))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [data] * 6


def test_names_that_no_file_may_have(bucket):
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    for key in ("x/../e", "x//d", "x/\x01c", "x/ok", "x/folder/"):
        client.put_object(Bucket=bucket[5:], Key=key, Body=b"1" if key[-1] != "/" else b"")
    client.close()
    listed = {one.name: storage.unusable_name(one.name) for one in storage.items(f"{bucket}/x")}
    assert listed == {
        "../e": "path with an empty part, . or .. in it",
        "/d": "absolute path, where one relative to the folder was expected",
        "\x01c": "control character in the name, or not valid UTF-8",
        "ok": None,
    }


def test_a_file_url_is_a_path(tmp_path):
    assert storage.local_path((tmp_path / "a b%").as_uri()) == tmp_path / "a b%"
    assert storage.local_path("s3://bucket/x") is None


def test_an_object_that_changes(place):
    url = storage.joined(place, "a")
    storage.write(url, b"a" * 30_000_000)
    before = storage.item(url)
    if not url.startswith("file"):
        with storage.opened(url) as file:
            file.read(10)
            storage.write(url, b"b" * 30_000_000)
            with pytest.raises(ChangedError, match="changed while it was read"):
                file.read()
    storage.write(url, b"b" * 20)
    with pytest.raises(ChangedError, match="changed while it was read"):
        storage.read(url, version=before.version)


# --- a bad day --------------------------------------------------------------------------------------------------------


def test_no_such_bucket(bucket):
    for ask in (storage.items, storage.item, storage.read):
        with pytest.raises(MissingError, match="there is no bucket 'nobody-has-it'"):
            ask("s3://nobody-has-it/x")
    with pytest.raises(MissingError, match=r"cannot be written \(there is no bucket"):
        storage.write("s3://nobody-has-it/x", b"")


def test_a_word_for_a_key_is_no_secret_that_is_struck_out(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "bucket")
    with pytest.raises(StorageError, match="there is no bucket 'guardkit-nowhere'"):
        storage.read("s3://guardkit-nowhere/x")


def test_no_credentials_no_profile_no_server(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="no credentials were found"):
        storage.items(bucket)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="AWS_PROFILE names a profile that there is not"):
        storage.items(bucket)


def test_no_server(faulty, monkeypatch):
    faulty.close()
    with pytest.raises(StorageError, match="the storage cannot be reached"):
        storage.items(faulty.bucket)


@pytest.mark.parametrize(
    ("status", "said"), [(403, "access denied.*check the credentials"), (503, "answers SlowDown|answers 503"), (404, "is not there")]
)
def test_a_storage_that_refuses(faulty, status, said):
    storage.write(f"{faulty.bucket}/a", b"1")
    faulty.behaviour = lambda method, path, number: status
    for ask in (storage.read, storage.items if status != 404 else storage.read):
        with pytest.raises(StorageError, match=said) as error:
            ask(f"{faulty.bucket}/a")
        assert "the-tests" not in str(error.value)


def test_a_small_object_takes_two_requests(faulty):
    storage.write(f"{faulty.bucket}/a", b"1" * 1000)
    faulty.asked.clear()
    assert storage.read(f"{faulty.bucket}/a") == b"1" * 1000
    assert [method for method, _ in faulty.asked] == ["HEAD", "GET"]


def test_a_storage_that_is_busy_for_a_moment(faulty):
    faulty.behaviour = lambda method, path, number: 503 if number == 0 else None
    storage.write(f"{faulty.bucket}/a", b"1")
    assert storage.read(f"{faulty.bucket}/a") == b"1"
    assert [one.name for one in storage.items(faulty.bucket)] == ["a"]


def test_a_storage_that_stalls(faulty):
    storage.write(f"{faulty.bucket}/a", b"1")
    faulty.behaviour = lambda method, path, number: "stall"
    start = time.monotonic()
    with pytest.raises(StorageError, match="does not answer in time"):
        storage.items(faulty.bucket)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("how", ["cut", "short"])
def test_a_body_that_is_cut_short(faulty, how):
    data = os.urandom(300_000)
    storage.write(f"{faulty.bucket}/a", data)
    faulty.behaviour = lambda method, path, number: how if method == "GET" and number == 0 else None
    if how == "cut":  # the client sees that bytes are missing, and asks again
        assert storage.read(f"{faulty.bucket}/a") == data
    faulty.behaviour = lambda method, path, number: how if method == "GET" else None
    with pytest.raises(StorageError, match="cut short|bytes are missing"):
        storage.read(f"{faulty.bucket}/a")
