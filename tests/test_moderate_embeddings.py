"""`moderate` over embedding folders: as over the images that they were made of, a part a shard, and nothing is lost."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import picture

import guardkit
from guardkit import GuardClassifier, InputError, LinearHead, Thresholds, storage
from guardkit.moderation.collecting import collect_corrections

N = 12


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    torch.manual_seed(0)
    head = LinearHead.build(scenes_encoder, scenes_policy)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    return GuardClassifier(head, scenes_encoder, scenes_policy, threshold=Thresholds.usual(scenes_policy.category_names, 0.5))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "images"
    folder.mkdir()
    rows = []
    for seed in range(N):
        picture(seed).save(folder / f"{seed:02d}.png")
        data = (folder / f"{seed:02d}.png").read_bytes()
        rows.append({"image": data[:300] if seed == 7 else data, "key": f"k{seed}", "score": seed})
    (folder / "07.png").write_bytes(rows[7]["image"])
    pq.write_table(pa.Table.from_pylist(rows), folder.parent / "rows.parquet")
    return folder


@pytest.fixture(scope="module")
def stored(images, scenes_encoder):
    """Three parts of four images, one of which was cut short."""
    out = images.parent / "vectors"
    guardkit.embed(input=images, encoder=scenes_encoder, output_dir=out, shard_size=4)
    return out


@pytest.fixture(scope="module")
def decided(guard, images):
    guardkit.moderate(guard, images, output_dir=images.parent / "decided")
    return by_id(images.parent / "decided")


def by_id(out):
    return {row["id"]: row for row in pq.read_table(out / "decisions.parquet").to_pylist()}


def foreign(folder, vectors, tables):
    """As clip-retrieval writes it: no manifest, numbers as it likes."""
    for kind in ("img_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    for number, rows in vectors.items():
        np.save(folder / f"img_emb/img_emb_{number:02d}.npy", rows)
    for number, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"metadata/metadata_{number:02d}.parquet")
    return folder


def assert_like(found, decided):
    """But for rounding to half precision, and what only images have."""
    assert found.keys() == decided.keys()
    for name, row in found.items():
        for column, value in decided[name].items():
            if isinstance(value, float):
                assert row[column] == pytest.approx(value, abs=2e-3)
            elif column not in ("sha256", "duplicate_of", "near_duplicate_of"):
                assert row[column] == value
        assert row["sha256"] is row["duplicate_of"] is row["near_duplicate_of"] is row["frame"] is None


def test_stored_vectors_are_decided_as_their_images(guard, stored, decided, tmp_path, monkeypatch):
    out = tmp_path / "out"
    report = guardkit.moderate(guard, stored, output_dir=out)
    assert report.counts == {"given": N, "decided": N - 1, "rejected": 1}
    assert f"{N - 1} decided by stored embeddings" in report.table
    assert_like(by_id(out), decided)
    page = (out / "report.html").read_text()
    assert "there are no pictures of them" in page
    assert "the highest score first.\n" in page
    for control in ("data-id=", 'id="save"', "<button", "blurred"):  # a verdict would be of no known bytes, and lost
        assert control not in page
    # stopped after a part, it goes on
    from guardkit.moderation import deciding

    do, done = deciding.Deciding.do, []

    def stopping(self, shard, tick):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(shard.name)
        return do(self, shard, tick)

    monkeypatch.setattr(deciding.Deciding, "do", stopping)
    with pytest.raises(KeyboardInterrupt):
        guardkit.moderate(guard, stored, output_dir=tmp_path / "again")
    assert done == ["img_emb/img_emb_0.npy", "img_emb/img_emb_1.npy"]
    done.clear()
    monkeypatch.setattr(deciding.Deciding, "do", lambda self, shard, tick: done.append(shard.name) or do(self, shard, tick))
    guardkit.moderate(guard, stored, output_dir=tmp_path / "again")
    assert done == ["img_emb/img_emb_2.npy", "rejected.parquet"]
    for name in ("decisions.parquet", "rejected.parquet", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_columns_are_carried_also_from_a_bucket_and_beside_images(guard, images, decided, scenes_encoder, tmp_path):
    bucket = "memory://moderate-embeddings"
    guardkit.embed(input=images.parent / "rows.parquet", encoder=scenes_encoder, output_dir=f"{bucket}/vectors")
    guardkit.moderate(guard, [f"{bucket}/vectors", images], output_dir=tmp_path / "out", id_column="key")
    found = by_id(tmp_path / "out")
    assert len(found) == 2 * N
    for seed in range(N):
        row, image = found[f"k{seed}"], found[f"images/{seed:02d}.png"]
        assert (row["image_path"], row["input_score"]) == (f"rows.parquet#{seed}", seed)
        assert (row["action"], row["error"]) == (image["action"], image["error"])
    assert list(found)[N - 1] == "k7"  # what was not embedded, after the parts
    assert guardkit.moderate(guard, f"{bucket}/vectors", output_dir=tmp_path / "few", limit=3).counts["given"] == 3
    mark = json.loads(storage.read(f"{bucket}/vectors/.guardkit.json"))
    storage.write(f"{bucket}/vectors/.guardkit.json", json.dumps(mark | {"state": "unfinished"}).encode())
    with pytest.raises(InputError, match="is not complete; run python -m guardkit.embed"):
        guardkit.moderate(guard, f"{bucket}/vectors", output_dir=tmp_path / "x")


def test_a_folder_of_another_tool_and_rows_without_direction(guard, images, decided, scenes_encoder, tmp_path):
    pixels = [np.asarray(picture(seed).convert("RGB")) for seed in range(6)]
    vectors = (3 * scenes_encoder.encode_images(pixels)).astype(np.float16)  # whose length says nothing
    vectors[4], vectors[5, 0] = 0, np.nan
    rows = [{"image_path": f"{seed:02d}.png", "caption": f"picture {seed}"} for seed in range(6)]
    rows[1]["image_path"] = None
    folder = foreign(tmp_path / "laion", {0: vectors[:2], 3: vectors[2:], 7: vectors[:2]}, {0: rows[:2], 3: rows[2:], 9: rows[:1]})
    report = guardkit.moderate(guard, folder, output_dir=tmp_path / "out")
    assert report.counts == {"given": 9, "decided": 4, "rejected": 5}
    found = by_id(tmp_path / "out")
    for name, like in (("00.png", "00.png"), ("img_emb/img_emb_00.npy#1", "01.png"), ("02.png", "02.png"), ("03.png", "03.png")):
        assert found[name]["score"] == pytest.approx(decided[like]["score"], abs=2e-3)
        assert found[name]["caption"] == f"picture {int(like[:2])}"
    assert {row["id"]: row["reason"] for row in pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()} == {
        "04.png": "its vector is zero or not finite",
        "05.png": "its vector is zero or not finite",
        **{f"img_emb/img_emb_07.npy#{row}": "img_emb_07.npy has no metadata of its number" for row in (0, 1)},
        "metadata/metadata_09.parquet#0": "metadata_09.parquet has no vectors of its number",
    }


def test_what_does_not_fit_is_refused_in_a_line(guard, images, stored, scenes_encoder, tmp_path):
    def refused(match, folder=stored, who=guard, **settings):
        with pytest.raises(InputError, match=match) as error:
            guardkit.moderate(who, folder, output_dir=tmp_path / "x", **settings)
        assert "\n" not in str(error.value)

    (tmp_path / "bank.txt").write_text("sha256:" + 64 * "0")
    refused("block_list is of images, and input=.* holds embeddings", block_list=tmp_path / "bank.txt")
    refused("trim_bars is of images", trim_bars=True)
    refused("image_column is of images", [images, stored], image_column="image")
    refused("has no column 'url'; it has image_path", id_column="url")
    refused("guard must be a GuardClassifier", who=object())
    manifest = json.loads((stored / "manifest.json").read_text())
    other = tmp_path / "other"
    rows = [{"image_path": "a"}]
    foreign(other, {0: np.ones((1, scenes_encoder.dim), np.float16)}, {0: rows})
    (other / "manifest.json").write_text(
        json.dumps(manifest | {"n_shards": 1, "given": 1, "written": 1, "rejected": 0, "encoder_fingerprint": "f" * 64})
    )
    refused("holds embeddings of another encoder", other)
    refused(
        r"holds vectors of 3 columns, the guard's encoder .* makes",
        foreign(tmp_path / "narrow", {0: np.ones((1, 3), np.float16)}, {0: rows}),
    )
    whole = np.ones((2, scenes_encoder.dim), np.float32)
    refused("metadata_00.parquet has 1 rows, expected are 2", foreign(tmp_path / "rows", {0: whole}, {0: rows}))
    refused("has vectors and no metadata; write metadata/metadata_<i>.parquet", foreign(tmp_path / "bare", {0: whole}, {}))
    (tmp_path / "bare/img_emb").rename(tmp_path / "bare/metadata")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bare/metadata/metadata_0.parquet")
    shutil.copy(stored / "manifest.json", tmp_path / "bare")
    refused("has metadata/ of an embedding folder, and no vectors in img_emb/; copy", tmp_path / "bare")
    refused("engine must be an engine, such as .*, got 'ray'; names are for the command line", engine="ray")
    for_images = "is an embedding folder, which holds vectors and no images"
    with pytest.raises(InputError, match=for_images):
        guardkit.embed(input=stored, encoder=scenes_encoder, output_dir=tmp_path / "embedded")
    guardkit.moderate(guard, stored, output_dir=tmp_path / "out")
    (tmp_path / "reviews.jsonl").write_text("")
    with pytest.raises(InputError, match=for_images):
        collect_corrections(tmp_path / "out", tmp_path / "reviews.jsonl", stored, guard.policy, output=tmp_path / "c.parquet")
