"""`moderate`: folders, shards, Parquet files and lists; every input is a row, bad ones fail closed, and a stopped run goes on."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import call
from conftest import picture
from PIL import Image

import guardkit
from guardkit import Band, GuardClassifier, InputError, LinearHead, Thresholds

SEEDS = range(8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    """It blocks some of the pictures, reviews some and allows some."""
    torch.manual_seed(0)
    head = LinearHead.build(scenes_encoder, scenes_policy)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    made = GuardClassifier(head, scenes_encoder, scenes_policy)
    scores = sorted(one.score for one in made.predict([picture(seed) for seed in SEEDS]))
    bands = dict.fromkeys(scenes_policy.category_names, Band.at(0.5))
    made.thresholds = Thresholds(Band((scores[2] + scores[3]) / 2, (scores[4] + scores[5]) / 2), bands)
    return made


@pytest.fixture(scope="module")
def saved(guard, tmp_path_factory):
    return guard.save_pretrained(tmp_path_factory.mktemp("moderate") / "guard")


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    (folder / "deep").mkdir(parents=True)
    for seed in SEEDS:
        (folder / f"{seed}.png").write_bytes(encoded(picture(seed)))
    (folder / "deep/again.png").write_bytes(encoded(picture(0)))
    (folder / "deep/smaller.jpg").write_bytes(encoded(picture(1).resize((48, 32)), "JPEG", quality=90))
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(encoded(picture(5)))
    (folder / "cut.png").write_bytes(encoded(picture(6))[:900])
    (folder / "link.png").symlink_to(folder / "1.png")
    return folder


def rows_of(folder):
    return {row["id"]: row for row in pq.read_table(folder / "decisions.parquet").to_pylist()}


def test_every_input_is_a_row_and_the_counts_add_up(guard, uploads, tmp_path):
    report = guardkit.moderate(guard, uploads, output_dir=tmp_path / "out")
    rows = rows_of(report.folder)
    assert len(rows) == report.counts["given"] == 15
    assert report.counts == {"given": 15, "decided": 11, "rejected": 4}
    assert sum(report.actions.values()) == 15
    rejected = {row["id"]: row["reason"] for row in pq.read_table(report.folder / "rejected.parquet").to_pylist()}
    assert set(rejected) == {"empty.png", "notes.txt", "cut.png", "link.png"}
    assert rejected["link.png"] == "a link, which is not followed"
    for name in rejected:
        assert (rows[name]["action"], rows[name]["score"], rows[name]["error"]) == ("error", None, rejected[name])
    decisions = dict(zip(SEEDS, guard.predict([picture(seed) for seed in SEEDS]), strict=True))
    assert {one.action for one in decisions.values()} == {"allow", "review", "block"}
    for seed, decision in decisions.items():
        row = rows[f"{seed}.png"]
        assert row["action"] == decision.action
        assert row["score"] == pytest.approx(decision.score, abs=1e-6)
        assert tuple(row["violated"]) == decision.violated
        assert [row[name] for name in guard.policy.category_names] == pytest.approx(list(decision.categories.values()), abs=1e-6)
        assert (row["threshold_review"], row["threshold_block"]) == (decision.threshold, decision.threshold_block)
    assert {path.name for path in report.folder.iterdir() if not path.name.startswith(".")} == {
        "decisions.parquet",
        "rejected.parquet",
        "report.html",
    }
    assert not (report.folder / ".parts").exists()


def test_what_comes_again_is_decided_once_and_what_looks_alike_is_named(guard, uploads, tmp_path):
    rows = rows_of(guardkit.moderate(guard, uploads, output_dir=tmp_path / "out").folder)
    assert (rows["deep/again.png"]["duplicate_of"], rows["deep/again.png"]["score"]) == ("0.png", rows["0.png"]["score"])
    assert rows["5.png"]["duplicate_of"] == ".hidden.png"
    assert (rows["deep/smaller.jpg"]["duplicate_of"], rows["deep/smaller.jpg"]["near_duplicate_of"]) == (None, "1.png")
    assert rows["2.png"]["near_duplicate_of"] is None


def test_shards_parquet_and_lists_give_the_same_decisions_and_keep_what_they_say(guard, uploads, tmp_path):
    with tarfile.open(tmp_path / "shard.tar.gz", "w:gz") as tar:
        for seed in SEEDS:
            for name, data in ((f"{seed}.png", encoded(picture(seed))), (f"{seed}.json", json.dumps({"user": seed}).encode())):
                member = tarfile.TarInfo(f"../../{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("evil.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    table = [{"user": seed, "image": {"bytes": encoded(picture(seed)), "path": None}, "score": "own"} for seed in SEEDS]
    pq.write_table(pa.Table.from_pylist([*table, {"user": 99, "image": None, "score": None}]), tmp_path / "rows.parquet")
    (tmp_path / "list.csv").write_text("file_name,user\n" + "".join(f"uploads/{seed}.png,{seed}\n" for seed in SEEDS) + "gone.png,99\n")
    places = {"shard.tar.gz": "../../{}.png", "rows.parquet": "#{}", "list.csv": "uploads/{}.png"}
    by_folder = rows_of(guardkit.moderate(guard, uploads, output_dir=tmp_path / "by_folder").folder)
    for place, name in places.items():
        report = guardkit.moderate(guard, tmp_path / place, output_dir=tmp_path / f"out_{place}", id_column=None)
        rows = rows_of(report.folder)
        assert report.counts == {"given": 9, "decided": 8, "rejected": 1}, place
        for seed in SEEDS:
            identity = name.format(seed) if place == "list.csv" else f"{place}{'' if '#' in name else '/'}{name.format(seed)}"
            assert rows[identity]["score"] == pytest.approx(by_folder[f"{seed}.png"]["score"], abs=1e-6)
            assert str(rows[identity]["user"]) == str(seed)
        if place == "rows.parquet":
            assert {row["input_score"] for row in rows.values()} == {"own", None}
    assert list(tmp_path.parent.glob("*.png")) == []
    named = guardkit.moderate(guard, tmp_path / "rows.parquet", output_dir=tmp_path / "named", id_column="user")
    assert set(rows_of(named.folder)) == {*map(str, SEEDS), "99"}
    for place in ("rows.parquet", "list.csv"):
        with pytest.raises(InputError, match=f"{place} has no column 'uesr'; it has .*user.*; set id_column"):
            guardkit.moderate(guard, tmp_path / place, output_dir=tmp_path / f"typo_{place}", id_column="uesr")
    with pytest.raises(
        InputError, match="id_column=user names a column of Parquet files and of tables of paths, and input=.*shard.tar.gz has neither"
    ):
        guardkit.moderate(guard, tmp_path / "shard.tar.gz", output_dir=tmp_path / "columnless", id_column="user")


def test_the_worst_frame_of_an_animation_decides_and_is_named(guard, tmp_path):
    frames = [picture(seed) for seed in SEEDS]
    scores = [one.score for one in guard.predict(frames)]
    folder = tmp_path / "in"
    folder.mkdir()
    frames[0].save(folder / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(folder / "b.png", save_all=True, append_images=frames[1:])
    worst = int(np.argmax(scores))
    # an image that only those see who know no animations
    frames[worst].save(
        folder / "hidden.png", save_all=True, append_images=[frames[i] for i in range(8) if i != worst][:2], default_image=True
    )
    Image.new("RGB", (20, 20)).save(
        folder / "long.gif", save_all=True, append_images=[Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(1, 60)]
    )
    rows = rows_of(guardkit.moderate(guard, folder, output_dir=tmp_path / "out", max_frames=50).folder)
    for name in ("a.webp", "b.png"):
        assert (rows[name]["frame"], rows[name]["score"]) == (worst, pytest.approx(max(scores), abs=1e-6)), name
    assert (rows["hidden.png"]["frame"], rows["hidden.png"]["score"]) == (2, pytest.approx(max(scores), abs=1e-6))
    assert (rows["long.gif"]["action"], rows["long.gif"]["error"]) == ("error", "an animation of 60 frames is more than 50")


def test_bars_are_trimmed_where_that_is_asked_for(guard, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    inner = picture(3)
    barred = Image.new("RGB", (96, 144))
    barred.paste(inner, (0, 40))
    barred.save(folder / "barred.png")
    inner.save(folder / "plain.png")
    found = {
        trim: rows_of(guardkit.moderate(guard, folder, output_dir=tmp_path / str(trim), trim_bars=trim).folder) for trim in (False, True)
    }
    assert found[True]["barred.png"]["score"] == pytest.approx(found[True]["plain.png"]["score"], abs=1e-6)
    assert found[False]["barred.png"]["score"] != pytest.approx(found[False]["plain.png"]["score"], abs=1e-3)


def test_banks_decide_before_the_guard(guard, uploads, tmp_path):
    decisions = guard.predict([picture(seed) for seed in SEEDS])
    allowed = next(seed for seed in SEEDS if decisions[seed].action == "allow")
    blocked = next(seed for seed in SEEDS if decisions[seed].action == "block")

    def sha(seed):
        return hashlib.sha256(encoded(picture(seed))).hexdigest()

    (tmp_path / "block.txt").write_text(f"# known\nsha256:{sha(allowed)}  # one\n")
    (tmp_path / "allow.txt").write_text(f"{sha(blocked).upper()}\n{sha(allowed)}\n")
    rows = rows_of(
        guardkit.moderate(
            guard, uploads, output_dir=tmp_path / "out", block_list=tmp_path / "block.txt", allow_list=tmp_path / "allow.txt"
        ).folder
    )
    one, other = rows[f"{allowed}.png"], rows[f"{blocked}.png"]
    assert (one["action"], one["bank"], one["score"], one["error"]) == ("block", "block_list:sha256", None, None)
    assert (other["action"], other["bank"]) == ("allow", "allow_list:sha256")
    pytest.importorskip("pdqhash")
    from guardkit.moderation.banks import pdq_of

    digits = pdq_of(np.asarray(picture(allowed).resize((480, 320)))).astype(">u8").tobytes().hex()
    (tmp_path / "pdq.txt").write_text(f"pdq:{digits}\n")
    rows = rows_of(guardkit.moderate(guard, uploads, output_dir=tmp_path / "pdq", block_list=tmp_path / "pdq.txt").folder)
    assert rows[f"{allowed}.png"]["bank"] == "block_list:pdq"
    assert rows[f"{blocked}.png"]["bank"] is None


@pytest.mark.parametrize("lines", ["xyz\n", "md5:" + "0" * 64 + "\n", "0" * 63 + "\n", "sha256:\n"])
def test_a_bank_with_broken_lines_is_refused(guard, uploads, tmp_path, lines):
    (tmp_path / "bank.txt").write_text("0" * 64 + "\n" + lines)
    with pytest.raises(InputError, match=r"has lines that are no hashes \(2\); each must be sha256: or pdq: and 64 hex digits"):
        guardkit.moderate(guard, uploads, output_dir=tmp_path / "out", allow_list=tmp_path / "bank.txt")


def stopped_after(n, monkeypatch):
    """Runs end, as by Ctrl-C, after n decisions of a shard in all; gives the list of them, which may be emptied."""
    from guardkit.moderation.stream import Moderator

    decide, n_decided = Moderator.decide, []

    def stopping(self, inputs):
        for one in decide(self, inputs):
            if len(n_decided) == n:
                raise KeyboardInterrupt
            n_decided.append(one)
            yield one

    monkeypatch.setattr(Moderator, "decide", stopping)
    return n_decided


def test_a_stopped_run_goes_on_and_gives_the_same_rows(guard, uploads, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    whole = pq.read_table(guardkit.moderate(guard, uploads, output_dir=tmp_path / "whole", shard_size=4).folder / "decisions.parquet")
    n_decided = stopped_after(10, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        guardkit.moderate(guard, uploads, output_dir=tmp_path / "again", shard_size=4)
    assert not (tmp_path / "again/decisions.parquet").exists()
    n_decided.clear()
    report = guardkit.moderate(guard, uploads, output_dir=tmp_path / "again", shard_size=4)
    assert len(n_decided) == 15 - 8  # two shards were written
    assert "goes on with the earlier run" in caplog.text
    assert pq.read_table(report.folder / "decisions.parquet").to_pylist() == whole.to_pylist()
    # with other settings it is not gone on with
    for given, options, which in (
        (uploads, {"trim_bars": True}, "trim_bars"),
        ([uploads, uploads / "deep"], {"scope": ["hate"]}, "input, scope"),
    ):
        with pytest.raises(InputError, match=f"made with another {which}; choose another output_dir"):
            guardkit.moderate(guard, given, output_dir=tmp_path / "again", **options)


@pytest.mark.parametrize("place", ["{}/out", "memory://moderate-finished/out"])
def test_a_finished_run_is_replaced_and_that_is_said(guard, uploads, tmp_path, caplog, place):
    caplog.set_level("INFO")
    place = place.format(tmp_path)
    for _ in range(2):
        assert "earlier run" not in caplog.text
        guardkit.moderate(guard, uploads, output_dir=place)
    assert "replaces the earlier run, which was finished" in caplog.text
    assert "goes on" not in caplog.text


def test_a_shard_that_changed_while_a_run_was_stopped_is_decided_anew(guard, uploads, tmp_path, monkeypatch, caplog):
    stopped_after(10, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        guardkit.moderate(guard, uploads, output_dir=tmp_path / "again", shard_size=4)
    monkeypatch.undo()
    (uploads / "0.png").write_bytes(encoded(picture(77)))
    report = guardkit.moderate(guard, uploads, output_dir=tmp_path / "again", shard_size=4)
    assert "1 of 4 shards changed since they were worked on, the first is uploads/, files 1 to 4" in caplog.text
    fresh = guardkit.moderate(guard, uploads, output_dir=tmp_path / "fresh", shard_size=4)
    assert rows_of(report.folder) == rows_of(fresh.folder)
    assert report.counts == fresh.counts


def test_the_page_shows_the_queue_blurred_and_loads_nothing(guard, uploads, tmp_path):
    page = (guardkit.moderate(guard, uploads, output_dir=tmp_path / "out").folder / "report.html").read_text()
    assert "15 inputs" in page
    assert page.count('class="veil"') == sum(
        row["action"] in ("review", "block") and row["duplicate_of"] is None for row in rows_of(tmp_path / "out").values()
    )
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "not an image of a known type" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "is not there; give a folder, a tar file, a Parquet file, or a list of paths"),
        ("one.jpg", "is none of what can be read"),
        ("one.npy", "of an embedding folder give what holds img_emb/ and metadata/"),
        ("empty", "holds nothing to decide over"),
        ([], "input is an empty list"),
        ("columns.parquet", "no column of encoded images; it has a, b; set image_column"),
    ],
)
def test_a_wrong_input_is_one_line(guard, tmp_path, given, message):
    (tmp_path / "empty").mkdir()
    for name in ("one.jpg", "one.npy"):
        (tmp_path / name).touch()
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "columns.parquet")
    place = [tmp_path / one for one in given] if isinstance(given, list) else tmp_path / given
    with pytest.raises(InputError, match=message):
        guardkit.moderate(guard, place, output_dir=tmp_path / "out")


def test_results_do_not_go_into_what_is_decided_over(guard, uploads):
    with pytest.raises(InputError, match="lies within input=.*choose one elsewhere"):
        guardkit.moderate(guard, uploads, output_dir=uploads / "out")


def test_a_damaged_shard_ends_in_a_row_and_not_in_silence(guard, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for seed in SEEDS:
            data = encoded(picture(seed))
            member = tarfile.TarInfo(f"{seed}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data = (tmp_path / "shard.tar").read_bytes()
    (tmp_path / "shard.tar").write_bytes(data[: len(data) // 2])
    rows = rows_of(guardkit.moderate(guard, tmp_path / "shard.tar", output_dir=tmp_path / "out").folder)
    assert "the shard ends here" in rows["shard.tar"]["error"]
    assert rows["shard.tar/0.png"]["action"] != "error"


def test_the_command_ends_with_3_where_it_was_asked_to(saved, guard, uploads, tmp_path):
    asked = ["guardkit.moderate", f"guard={saved}", f"input={uploads}"]
    ran = call(*asked, f"output_dir={tmp_path / 'a'}", "fail_on=block", "json_lines=true", "limit=12")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (3, str(tmp_path / "a")), ran.stderr
    lines = [json.loads(line) for line in (tmp_path / "a/decisions.jsonl").read_text().splitlines()]
    assert lines == pq.read_table(tmp_path / "a/decisions.parquet").to_pylist()
    assert len(lines) == 12
    name = guard.policy.category_names[0]
    ran = call(*asked, f"output_dir={tmp_path / 'b'}", f"scope=[{name}]")
    assert ran.returncode == 0, ran.stderr
    assert all(row["score"] == row[name] for row in rows_of(tmp_path / "b").values())
    ran = call(*asked, f"output_dir={tmp_path / 'c'}", "fail_on=allow")
    assert (ran.returncode, "fail_on must be one of review, block, error, got 'allow'" in ran.stderr) == (2, True)
