"""Shards in, shards out: everything is a row, columns are carried, and a run that is stopped, killed or repeated gives the same folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture

import guardkit
from guardkit import GuardClassifier, InputError, LinearHead, storage
from guardkit.artifacts import fingerprint
from guardkit.data.duplicates import earliest_near
from guardkit.embedding_folder import read_embedding_folder
from guardkit.images import encode_png
from guardkit.local_copies import local_folder
from guardkit.moderation.joining import part_table
from guardkit.shards.base import Shard
from guardkit.shards.output import Output
from guardkit.shards.work import Ledger
from guardkit.storage import opened
from guardkit.storage_errors import StorageError
from guardkit.terminal import one_line

SEEDS = range(6)


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


IMAGES = {seed: encoded(picture(seed)) for seed in SEEDS}


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """As img2dataset writes them, the second cut short by somebody's full disk, and two loose files."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in (0, 1):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for seed in SEEDS:
                key = f"{number:05d}{seed:04d}"
                said = {"caption": f"picture {seed}", "url": f"https://example.org/{seed}", "width": 96, "exif": {"Make": "x"}, "key": key}
                add(tar, f"{key}.png", IMAGES[seed])
                add(tar, f"{key}.txt", said["caption"].encode())
                add(tar, f"{key}.json", json.dumps(said).encode())
        pq.write_table(pa.table({"key": ["a"], "caption": ["b"]}), folder / f"{number:05d}.parquet")
        (folder / f"{number:05d}_stats.json").write_text("{}")
    (folder / "loose.png").write_bytes(IMAGES[0])
    (folder / "notes.md").write_text("no image")
    return folder


def files_of(folder):
    """Every file but the lock, by its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_shard_in_is_a_part_out_with_its_keys_and_fields(scenes_encoder, shards, tmp_path):
    counts = guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=tmp_path / "out")
    assert counts == {"given": 14, "written": 13, "rejected": 1}
    vectors, table, manifest = read_embedding_folder(tmp_path / "out")
    assert [(one["shard"], one["given"], one["written"]) for one in manifest["shards"]] == [
        ("00000.tar", 6, 6),
        ("00001.tar", 6, 6),
        ("shards/, files 1 to 2", 2, 1),
    ]
    rows = table.to_pylist()
    assert [row["image_path"] for row in rows[:2]] == ["00000.tar/000000000.png", "00000.tar/000000001.png"]
    assert [(row["caption"], row["url"], row["width"], row["exif"], row["key"]) for row in rows[6:8]] == [
        (f"picture {seed}", f"https://example.org/{seed}", 96, '{"Make": "x"}', f"00001000{seed}") for seed in (0, 1)
    ]
    plain = scenes_encoder.encode_images([np.asarray(picture(seed).convert("RGB")) for seed in SEEDS])
    np.testing.assert_allclose(vectors[:6], plain, atol=2e-3)
    np.testing.assert_array_equal(vectors[:6], vectors[6:12])
    rejected = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert rejected == [{"id": "notes.md", "reason": "not an image of a known type", "shard": 2}]
    assert not (tmp_path / "out/.shards").exists()


def test_parquet_tar_and_files_give_the_same_vectors(scenes_encoder, shards, tmp_path):
    table = pa.Table.from_pylist([{"image": {"bytes": IMAGES[seed], "path": None}, "label": seed % 2, "id": f"p{seed}"} for seed in SEEDS])
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "files").mkdir()
    for seed in SEEDS:
        (tmp_path / f"files/{seed}.png").write_bytes(IMAGES[seed])
    (tmp_path / "list.txt").write_text("".join(f"files/{seed}.png\n" for seed in SEEDS))
    found = {}
    for name in ("shards/00000.tar", "rows.parquet", "files", "list.txt"):
        guardkit.embed(input=tmp_path / name, encoder=scenes_encoder, output_dir=tmp_path / f"out/{name}", shard_size=4)
        found[name], rows, _ = read_embedding_folder(tmp_path / f"out/{name}")
        if name == "rows.parquet":
            assert rows["label"].to_pylist() == [seed % 2 for seed in SEEDS]
            assert rows["image_path"].to_pylist() == [f"rows.parquet#{seed}" for seed in SEEDS]
    for vectors in found.values():
        np.testing.assert_array_equal(vectors, found["files"])


@pytest.mark.parametrize("limit", [1, 6, 7, 13, 99])
def test_a_limit_counts_inputs_over_all_shards(scenes_encoder, shards, tmp_path, limit):
    counts = guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=tmp_path / "out", limit=limit)
    assert counts["given"] == min(limit, 14)
    assert counts["written"] + counts["rejected"] == counts["given"]


def test_a_finished_folder_is_kept_and_what_changed_is_made_anew(scenes_encoder, shards, tmp_path, caplog):
    out = tmp_path / "out"
    guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=out)
    before = files_of(out)
    when = (out / "img_emb/img_emb_0.npy").stat().st_mtime_ns
    guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=out)
    assert files_of(out) == before
    assert (out / "img_emb/img_emb_0.npy").stat().st_mtime_ns == when
    (out / "img_emb/img_emb_0.npy").write_bytes(b"cut")
    (shards / "loose.png").write_bytes(IMAGES[3])
    guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=out)
    assert "img_emb/img_emb_0.npy is gone or not as it was written; 00000.tar is worked on anew" in caplog.text
    assert "1 of 3 shards changed since they were worked on, the first is shards/, files 1 to 2; they are worked on anew" in caplog.text
    guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh")
    # fewer shards than before: nothing is left of the others
    for name in ("00001.tar", "00001.parquet", "00001_stats.json"):
        (shards / name).unlink()
    guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=out)
    assert len(read_embedding_folder(out)[0]) == 7


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:40_000]), "the shard ends here"),
        (lambda path: path.write_bytes(b"no tar" * 1000), "the shard ends here"),
        (lambda path: path.write_bytes(b""), "the shard ends here"),
    ],
    ids=["cut", "no tar", "empty"],
)
def test_what_can_be_read_of_a_damaged_shard_is_kept(scenes_encoder, shards, tmp_path, break_it, reason):
    break_it(shards / "00001.tar")
    counts = guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=tmp_path / "out")
    assert counts["written"] + counts["rejected"] == counts["given"]
    rejected = {row["id"]: row["reason"] for row in pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()}
    assert reason in rejected["00001.tar"]


def test_a_tar_with_evil_names_writes_nowhere(scenes_encoder, tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        add(tar, "../../up.png", IMAGES[0])
        add(tar, "/etc/absolute.png", IMAGES[1])
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"special_{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    counts = guardkit.embed(input=tmp_path / "evil.tar", encoder=scenes_encoder, output_dir=tmp_path / "out")
    assert counts == {"given": 6, "written": 2, "rejected": 4}
    assert {row["reason"] for row in pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()} == {"no regular file in the shard"}
    assert {path.name for path in tmp_path.iterdir()} == {"evil.tar", "out"}


def test_rows_of_parquet_without_an_image_are_rejected_with_what_they_say(scenes_encoder, tmp_path):
    rows = [{"image": IMAGES[0], "user": 1}, {"image": None, "user": 2}, {"image": b"", "user": 3}, {"image": b"no image", "user": 4}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    counts = guardkit.embed(input=tmp_path / "rows.parquet", encoder=scenes_encoder, output_dir=tmp_path / "out")
    assert counts == {"given": 4, "written": 1, "rejected": 3}
    assert [(row["reason"], row["user"]) for row in pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()] == [
        ("no image in this row", 2),
        ("empty file", 3),
        ("not an image of a known type", 4),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either source, .* or input, .*; got both or neither"),
        ({"input": "nowhere"}, "input=nowhere is not there"),
        ({"input": ["."], "output_dir": "out"}, "lies within input="),
        ({"input": "x.tar", "max_pixels": 0}, "max_pixels must be"),
        ({"input": "empty"}, "holds nothing to embed"),
    ],
)
def test_a_wrong_setting_is_one_line(scenes_encoder, tmp_path, monkeypatch, settings, message):
    (tmp_path / "here/empty").mkdir(parents=True)
    (tmp_path / "here/x.tar").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match=message):
        guardkit.embed(encoder=scenes_encoder, **{"output_dir": tmp_path / "elsewhere"} | settings)


@pytest.mark.parametrize("distance", [0, 4, 9])
def test_the_earliest_near_hash_is_found(distance):
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2**64, 40, np.uint64)
    flips = np.array([sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 8), replace=False)) for _ in range(400)], np.uint64)
    hashes = centres[rng.integers(0, 40, 400)] ^ flips
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance
    expected = [int(row[:i].argmax()) if row[:i].any() else -1 for i, row in enumerate(near)]
    assert earliest_near(hashes, distance).tolist() == expected
    assert earliest_near(hashes[:0], distance).tolist() == []


def test_a_bucket_in_and_a_bucket_out_give_the_same_rows(scenes_encoder, scenes_policy, shards, bucket, tmp_path, monkeypatch):
    for path in shards.iterdir():
        storage.upload(path, f"{bucket}/in/{path.name}")
    for seed in SEEDS:
        storage.write(f"{bucket}/loose/{seed}.png", IMAGES[seed])
    storage.write(f"{bucket}/list.txt", f"loose/1.png\n{bucket}/loose/gone.png\n{bucket}/in/00000.tar\nloose/2.png\n".encode())
    for place, out in ((shards, tmp_path / "out"), (f"{bucket}/in", f"{bucket}/out")):
        assert guardkit.embed(input=place, encoder=scenes_encoder, output_dir=out) == {"given": 14, "written": 13, "rejected": 1}
    vectors, table, manifest = read_embedding_folder(tmp_path / "out")
    brought = local_folder(f"{bucket}/out")
    again, same, remote = read_embedding_folder(brought)
    np.testing.assert_array_equal(vectors, again)
    assert table.equals(same)
    rows = [[{**one, "version": ""} for one in about["shards"]] for about in (manifest, remote)]
    assert rows[0] == [{**one, "shard": one["shard"].replace("in/", "shards/")} for one in rows[1]]
    assert not [one.name for one in storage.items(f"{bucket}/out") if one.name.startswith(".shards")]
    # it is kept, and what is gone is made again
    versions = {one.name: one.version for one in storage.items(f"{bucket}/out")}
    storage.delete(f"{bucket}/out/img_emb/img_emb_1.npy")
    made = []
    encode = type(scenes_encoder).encode_preprocessed
    monkeypatch.setattr(
        type(scenes_encoder), "encode_preprocessed", lambda self, images, **kw: made.append(len(images)) or encode(self, images, **kw)
    )
    guardkit.embed(input=f"{bucket}/in", encoder=scenes_encoder, output_dir=f"{bucket}/out")
    assert made == [6]
    assert {one.name: one.version for one in storage.items(f"{bucket}/out")} == versions
    counts = guardkit.embed(input=f"{bucket}/list.txt", encoder=scenes_encoder, output_dir=tmp_path / "listed")
    assert counts == {"given": 9, "written": 8, "rejected": 1}
    assert pq.read_table(tmp_path / "listed/rejected.parquet")["reason"].to_pylist() == ["file does not exist"]
    guard = GuardClassifier(LinearHead.build(scenes_encoder, scenes_policy), scenes_encoder, scenes_policy)
    for place, out in ((shards, tmp_path / "decided"), (f"{bucket}/in", f"{bucket}/decided")):
        guardkit.moderate(guard, place, output_dir=out)
    with opened(f"{bucket}/decided/decisions.parquet") as file:
        assert pq.read_table(file).equals(pq.read_table(tmp_path / "decided/decisions.parquet"))
    assert sorted(one.name for one in storage.items(f"{bucket}/decided")) == [
        ".guardkit.json", "decisions.parquet", "rejected.parquet", "report.html"
    ]  # fmt: skip
    with pytest.raises(InputError, match="holds the results of guardkit moderate, not of embed"):
        guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=f"{bucket}/decided")
    with pytest.raises(InputError, match="lies within input="):
        guardkit.embed(input=f"{bucket}/in", encoder=scenes_encoder, output_dir=f"{bucket}/in/out")
    with pytest.raises(InputError, match="is not there; give a folder"):
        guardkit.embed(input=f"{bucket}/nowhere", encoder=scenes_encoder, output_dir=tmp_path / "x")


@pytest.mark.parametrize(
    "change",
    [{"given": None}, {"given": "x"}, {"given": -1}, {"given": 2}, {"files": {}}, {"files": {"../victim": 1}}, {"files": {"/victim": 1}}],
)
def test_what_an_entry_of_the_ledger_says_is_not_believed(tmp_path, change):
    (tmp_path / "victim").write_text("x")
    ledger, shard = Ledger(Output(tmp_path / "out")), Shard(0, "a", "1", [], 1)
    with ledger.output.written("part") as part:
        part.write_text("x")
    ledger.note(shard, {"given": 1, "files": {"part": 1}})
    assert list(ledger.find([shard])) == [0]
    ledger.note(shard, {"given": 1, "files": {"part": 1}} | change)
    assert ledger.find([shard]) == {}


def test_a_line_that_means_nothing_is_a_row_and_no_password_is_kept(scenes_encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((70, 70, 3), np.uint8)))
    (tmp_path / "list.txt").write_text("a.png\nfoo://x/y.png\nhttps://who:letmein@host/x.jpg\ns3://who:letmein@bucket/x.jpg\n")
    counts = guardkit.embed(input=tmp_path / "list.txt", encoder=scenes_encoder, output_dir=tmp_path / "out")
    assert counts == {"given": 4, "written": 1, "rejected": 3}
    rejected = {row["id"]: row["reason"] for row in pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()}
    assert list(rejected) == ["row 2", "row 3", "row 4"]
    assert "foo:// is a protocol that fsspec does not know" in rejected["row 2"]
    assert "with credentials in it" in rejected["row 3"]
    assert "letmein" not in "".join(rejected.values())


def not_utf8(n):
    data = pa.array([b"\xff"] * n)
    return pa.Array.from_buffers(pa.string(), n, [None, *data.buffers()[1:]])


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (not_utf8(2), ["\\xff"] * 2),
        (pa.array([2**52, None], pa.timestamp("ms")), [str(2**52), None]),
        (pa.array([2**30] * 2, pa.int32()).cast(pa.date32()), [str(2**30)] * 2),
        (pa.array([2**60] * 2, pa.duration("s")), [str(2**60)] * 2),
        (pa.array([1, 1], pa.timestamp("ms", tz="Mars/Olympus")), ["1", "1"]),
    ],
    ids=["text", "time", "date", "duration", "zone"],
)
def test_values_that_python_has_not_are_kept_as_text(scenes_encoder, tmp_path, values, kept):
    images = pa.StructArray.from_arrays([pa.array([IMAGES[0], IMAGES[1]]), not_utf8(2)], names=["bytes", "path"])
    pq.write_table(
        pa.Table.from_arrays([images, values, pa.array([1, 2]), pa.array([3, 4])], ["image", "odd", "n", "n"]), tmp_path / "x.parquet"
    )
    counts = guardkit.embed(input=tmp_path / "x.parquet", encoder=scenes_encoder, output_dir=tmp_path / "out")
    assert counts == {"given": 2, "written": 2, "rejected": 0}
    table = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet")
    assert table["odd"].to_pylist() == kept
    assert table["n"].to_pylist() == [1, 2]
    assert table["input_n"].to_pylist() == [3, 4]


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.png", "x.txt", "x.jsonl"])
def test_a_pipe_is_not_waited_for(scenes_encoder, tmp_path, name):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / name)
    counts = guardkit.embed(input=tmp_path / "in", encoder=scenes_encoder, output_dir=tmp_path / "out")
    assert counts == {"given": 1, "written": 0, "rejected": 1}
    assert "is a pipe or device, not a file" in pq.read_table(tmp_path / "out/rejected.parquet")["reason"][0].as_py()
    if name.endswith((".txt", ".jsonl")):
        with pytest.raises(InputError, match="is a pipe or device, not a file"):
            guardkit.embed(input=tmp_path / "in" / name, encoder=scenes_encoder, output_dir=tmp_path / "listed")


@pytest.mark.parametrize("name", ["img_emb/img_emb_0.npy", "metadata/metadata_0.parquet", ".guardkit.json"])
def test_a_pipe_in_an_embedding_folder_is_one_line(scenes_encoder, scenes_policy, shards, tmp_path, name):
    guardkit.embed(input=shards / "00000.tar", encoder=scenes_encoder, output_dir=tmp_path / "vectors")
    (tmp_path / "vectors" / name).unlink()
    os.mkfifo(tmp_path / "vectors" / name)
    guard = GuardClassifier(LinearHead.build(scenes_encoder, scenes_policy), scenes_encoder, scenes_policy)
    with pytest.raises((InputError, OSError), match="is a pipe or device, not a file"):
        guardkit.moderate(guard, tmp_path / "vectors", output_dir=tmp_path / "out")


@pytest.mark.parametrize("out", ["s3a://{}/in/out", "S3A://{}/in/out"])
def test_another_name_of_the_protocol_is_no_other_place(scenes_encoder, shards, bucket, out):
    storage.upload(shards / "00000.tar", f"{bucket}/in/00000.tar")
    with pytest.raises(InputError, match="lies within input="):
        guardkit.embed(input=f"{bucket}/in", encoder=scenes_encoder, output_dir=out.format(bucket.removeprefix("s3://")))
    assert [one.name for one in storage.items(f"{bucket}/in")] == ["00000.tar"]


def test_a_name_that_is_none_of_ours_among_the_notes_of_a_run_stops_nobody(scenes_encoder, shards, bucket):
    system, place = storage._system(f"{bucket}/out")
    for name in ("../x.json", "a//b.json"):
        system.pipe_file(f"{place}/.shards/{name}", b"{}")
    mark = {"command": "embed", "settings": fingerprint({"encoder": scenes_encoder.fingerprint}), "state": "unfinished", "files": []}
    storage.write(f"{bucket}/out/.guardkit.json", json.dumps(mark).encode())
    assert guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=f"{bucket}/out")["written"] == 13
    assert json.loads(storage.read(f"{bucket}/out/.guardkit.json"))["state"] == "finished"


def test_a_damaged_part_in_a_bucket_is_named_as_it_is_there(bucket):
    storage.write(f"{bucket}/out/.shards/000000_0000.parquet", b"x" * 40)
    with Output(f"{bucket}/out").here([".shards/000000_0000.parquet"]) as paths, pytest.raises(InputError) as caught:
        part_table(paths[0])
    assert one_line(caught.value).startswith(f"{bucket}/out/.shards/000000_0000.parquet cannot be read")


def test_a_storage_that_fails_ends_the_run_in_one_line_and_the_next_one_goes_on(scenes_encoder, shards, bucket, tmp_path, monkeypatch):
    from guardkit.shards import files

    for path in shards.iterdir():
        storage.upload(path, f"{bucket}/in/{path.name}")
    read = files.opened

    def failing(url, **options):
        if url.endswith("00001.tar"):
            raise StorageError(f"{url} cannot be read (503 SlowDown); try again later")
        return read(url, **options)

    monkeypatch.setattr(files, "opened", failing)
    with pytest.raises(InputError, match="503 SlowDown"):
        guardkit.embed(input=f"{bucket}/in", encoder=scenes_encoder, output_dir=tmp_path / "out")
    assert (tmp_path / "out/.shards/000000.json").is_file()
    with pytest.raises(InputError, match="is not complete; run"):
        read_embedding_folder(tmp_path / "out")
    monkeypatch.setattr(files, "opened", read)
    # an entry that was changed is none
    noted = json.loads((tmp_path / "out/.shards/000000.json").read_text())
    noted["entry"] |= {"written": 5}
    (tmp_path / "out/.shards/000000.json").write_text(json.dumps(noted))
    assert guardkit.embed(input=f"{bucket}/in", encoder=scenes_encoder, output_dir=tmp_path / "out")["written"] == 13


class Elsewhere:
    """An engine whose workers outlive it, as jobs of a cluster do when the command is killed."""

    name, is_here = "slurm", False

    def run(self, task, items):
        self.orphan, self.items = pickle.loads(pickle.dumps(task)), items
        for place, item in enumerate(items):
            yield place, task(item)


def test_workers_of_a_run_that_is_over_write_no_more(scenes_encoder, shards, tmp_path):
    out, engine = tmp_path / "out", Elsewhere()
    guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=out, engine=engine)
    before = files_of(out)
    with pytest.raises(InputError, match="this run is over, or another one works there now"):
        engine.orphan(engine.items[0])
    assert files_of(out) == before
    assert not (out / ".shards").exists()

    def late(old, output, elsewhere):
        with old.written("b") as path:
            path.write_text("b")
            output.begin(".shards", "other work", elsewhere=elsewhere)

    # one that was begun since, while it wrote
    for elsewhere in (True, False):
        output = Output(tmp_path / f"next_{elsewhere}")
        output.begin(".shards", "work", elsewhere=True)
        old = pickle.loads(pickle.dumps(output))
        with old.written("a") as path:
            path.write_text("a")
            output.begin(".shards", "work", elsewhere=elsewhere)  # the same again

        with pytest.raises(InputError, match="nothing more is written by this one"):
            late(old, output, elsewhere)
        assert set(files_of(output.folder)) - {".shards/run.json"} == {"a"}
        with output.written("b") as path:
            path.write_text("of the later one")


@pytest.mark.parametrize("change", [{"files": {}}, {"written": 5}, {"rejected": -1, "written": 7}, {"given": None}, {"written": "6"}])
def test_what_a_manifest_says_of_a_shard_is_not_believed(scenes_encoder, shards, tmp_path, change):
    out = tmp_path / "out"
    guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=out)
    before = files_of(out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][0] |= change
    (out / "manifest.json").write_text(json.dumps(manifest))
    guardkit.embed(input=shards, encoder=scenes_encoder, output_dir=out)
    assert files_of(out) == before
