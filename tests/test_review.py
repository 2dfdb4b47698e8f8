"""What people say of pairs: nothing loses it, it reaches the table and the training, and it is compared."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from test_editors_pipeline import CountingEditor, darker, pipeline
from test_pairs import digests, photographs

from guardkit.counterfactual.pair_dataset import read_pair_dataset, write_pair_dataset, write_reviews
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.counterfactual.review import Review, ReviewLog, ReviewQueue, agreement, combined, reviewer_name
from guardkit.counterfactual.verifier import Verdict
from guardkit.data.sources.pairs import PairsSource
from guardkit.editors.base import EditResult
from guardkit.schema import InputError


class Fussy:
    """A verifier that turns away every other edit of those that have an image."""

    name = "fussy"
    config = {"verifier": "fussy"}

    def verify(self, candidates):
        return [
            Verdict("not convinced" if int(re.sub(r"\D", "", one.record.id)) % 2 else None, flip_score=0.75, preservation_score=0.5)
            for one in candidates
        ]


def make(policy, folder, n=4, editor=darker, verifier=None, **options):
    made = pipeline(policy, CountingEditor(editor))
    if verifier is not None:
        made = CounterfactualPipeline(policy, made.instructor, made.editor, verifier, cache_dir=None)
    write_pair_dataset(photographs(n), made, folder, made_from={}, **options)
    return folder


def queue(folder, **options):
    return ReviewQueue(folder, read_pair_dataset(folder)[0], **options)


def column(folder):
    return {row["pair_id"]: row["review"] for row in pq.read_table(folder / "metadata.parquet").to_pylist()}


# --- the file of verdicts -------------------------------------------------------------------------------------------


def test_the_last_verdict_of_each_reviewer_counts_and_none_is_erased(scenes_policy, tmp_path):
    folder = make(scenes_policy, tmp_path / "d")
    here = queue(folder)
    ids = [row["pair_id"] for row in here.pairs]
    here.submit(ids[0], "ann", "accept")
    here.submit(ids[0], " ann ", "reject", "an  extra\nfinger")
    review = here.submit(ids[0], "bob", "unsure")
    assert {name: one.verdict for name, one in here.reviews()[ids[0]].items()} == {"ann": "reject", "bob": "unsure"}
    assert [one.reason for one in ReviewLog(folder).read()] == ["", "an extra finger", ""]
    assert abs(time.time() - datetime.fromisoformat(review.time).timestamp()) < 60
    for arguments, message in [
        (("nothing", "ann", "accept"), "there is no pair 'nothing'"),
        ((ids[0], "ann", "perhaps"), "a verdict must be one of accept, reject, unsure, got 'perhaps'"),
        ((ids[0], "  ", "accept"), "the reviewer's name must have 1 to 60 printable characters"),
    ]:
        with pytest.raises(InputError, match=message):
            here.submit(*arguments)
    assert len(ReviewLog(folder).read()) == 3


def test_a_queue_resumes_where_its_reviewer_left_off(scenes_policy, tmp_path):
    here = queue(make(scenes_policy, tmp_path / "d"))
    ids = [row["pair_id"] for row in here.pairs]
    assert here.next_unseen("ann") == 0
    for place in (0, 2):
        here.submit(ids[place], "ann", "accept")
    again = queue(tmp_path / "d")
    assert (again.next_unseen("ann"), again.next_unseen("ann", after=1), again.next_unseen("bob")) == (1, 3, 0)
    assert again.next_unseen("ann", after=3) == 1  # and from the start
    for place in (1, 3):
        again.submit(ids[place], "ann", "accept")
    assert again.next_unseen("ann") is None


def test_what_is_shown_can_be_chosen(scenes_policy, tmp_path):
    folder = make(scenes_policy, tmp_path / "d", verifier=Fussy())
    assert [len(queue(folder, show=show)) for show in ("accepted", "rejected", "all")] == [2, 2, 4]
    with pytest.raises(InputError, match="show must be one of accepted, rejected, all, got 'none'"):
        queue(folder, show="none")
    with pytest.raises(InputError, match="has no pair to review with show=rejected; there are 4 tries"):
        queue(make(scenes_policy, tmp_path / "e"), show="rejected")


def test_a_torn_line_is_dropped_and_a_damaged_one_is_named(tmp_path):
    log, review = ReviewLog(tmp_path), Review("p", "0", "ann", "accept", "größer", "2026-01-01T00:00:00+00:00")
    assert log.read() == []
    log.add(review)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"pair_id": "q", "ima')  # cut short by a crash
    assert log.read() == [review]
    log.add(replace(review, reviewer="bob"))
    assert [one.reviewer for one in log.read()] == ["ann", "bob"]
    log.path.write_bytes(whole.rstrip(b"\n"))  # saved by an editor that leaves out the last line break
    assert log.read() == [review]
    log.add(replace(review, reviewer="bob"))
    assert [one.reviewer for one in log.read()] == ["ann", "bob"]
    for damaged in (b"not json", b"[]", b'{"pair_id": 1}', whole.strip().replace(b"accept", b"perhaps")):
        log.path.write_bytes(whole + damaged + b"\n" + whole)
        with pytest.raises(InputError, match=r"reviews.jsonl line 2 is not a verdict .* mend or delete that line"):
            log.read()


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    log, review = ReviewLog(tmp_path), Review("p", "0", "ann", "accept", "", "2026-01-01T00:00:00+00:00")
    log.add(review)
    before = log.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="too large|No space"):
            log.add(review)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == before


ADD = """
import sys, pathlib
from guardkit.counterfactual.review import Review, ReviewLog
log = ReviewLog(pathlib.Path(sys.argv[1]))
for i in range(int(sys.argv[3])):
    log.add(Review(str(i), "0", sys.argv[2], "accept", "x" * 300, "2026-01-01T00:00:00+00:00"))
    print(i, flush=True)
"""


def adding(folder, name, n):
    command = [sys.executable, "-c", ADD, str(folder), name, str(n)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_two_reviewers_at_once_lose_nothing(tmp_path):
    running = [adding(tmp_path, name, 60) for name in ("ann", "bob")]
    assert [one.communicate(timeout=120) and one.returncode for one in running] == [0, 0]
    found = [(one.reviewer, one.pair_id) for one in ReviewLog(tmp_path).read()]
    assert sorted(found) == sorted((name, str(i)) for name in ("ann", "bob") for i in range(60))


def test_killed_at_any_moment_it_keeps_what_it_confirmed(tmp_path):
    for i in range(5):
        running = adding(tmp_path, f"ann{i}", 100_000)
        for _ in range(5 + 7 * i):
            running.stdout.readline()
        running.send_signal(signal.SIGKILL)
        confirmed = 5 + 7 * i + len(running.communicate()[0].splitlines())
        found = [one.pair_id for one in ReviewLog(tmp_path).read() if one.reviewer == f"ann{i}"]
        assert found == [str(k) for k in range(len(found))]
        assert len(found) in (confirmed, confirmed + 1)


# --- what follows from them -----------------------------------------------------------------------------------------


def test_the_most_cautious_verdict_counts():
    assert combined([]) is None
    assert combined(["accept", "accept"]) == "accept"
    assert combined(["accept", "unsure"]) == "unsure"
    assert combined(["unsure", "accept", "reject"]) == "reject"


def said(**by_reviewer):
    """said(ann="aar-", bob="ar-u"): one letter a pair, - where a reviewer said nothing."""
    words = {"a": "accept", "r": "reject", "u": "unsure"}
    current = {}
    for name, letters in by_reviewer.items():
        for i, letter in enumerate(letters):
            if letter != "-":
                current.setdefault(str(i), {})[name] = Review(str(i), "0", name, words[letter], "", "")
    return current


def test_agreement_by_hand():
    # both judged ten pairs: 4 times both accept, 2 both reject, 1 both unsure, 3 differ
    (one,) = agreement(said(ann="aaaarruaar-a", bob="aaaarrurua-" + "-"))
    assert (one.reviewers, one.n, one.share) == (("ann", "bob"), 10, 0.7)
    # ann: 6 accept, 3 reject, 1 unsure; bob: 5 accept, 3 reject, 2 unsure
    chance = (6 * 5 + 3 * 3 + 1 * 2) / 100
    assert one.kappa == pytest.approx((0.7 - chance) / (1 - chance))
    (same,) = agreement(said(ann="aaa", bob="aaa"))
    assert (same.share, same.kappa) == (1.0, None)  # chance would agree as well
    (apart,) = agreement(said(ann="aaa", bob="rrr"))
    assert (apart.share, apart.kappa) == (0.0, 0.0)
    assert agreement(said(ann="a-", bob="-a")) == []
    assert [(one.reviewers, one.n) for one in agreement(said(ann="aau", bob="ara", cleo="--a"))] == [
        (("ann", "bob"), 3),
        (("ann", "cleo"), 1),
        (("bob", "cleo"), 1),
    ]


def test_verdicts_reach_the_table_and_survive_synthesize(scenes_policy, tmp_path):
    folder = make(scenes_policy, tmp_path / "d")
    here = queue(folder)
    ids = [row["pair_id"] for row in here.pairs]
    here.submit(ids[0], "ann", "accept")
    here.submit(ids[1], "ann", "accept")
    here.submit(ids[1], "bob", "reject")
    wanted = {ids[0]: "accept", ids[1]: "reject", ids[2]: None, ids[3]: None}
    assert {row["pair_id"]: row["review"] for row in read_pair_dataset(folder)[0]} == wanted  # even after a crash
    assert column(folder) == dict.fromkeys(ids)
    assert write_reviews(folder)
    assert column(folder) == wanted
    reviewed = digests(folder)
    assert write_reviews(folder)
    assert digests(folder) == reviewed
    make(scenes_policy, folder)  # the same synthesize again
    assert digests(folder) == reviewed
    (folder / "reviews.jsonl").unlink()
    make(scenes_policy, folder)
    assert column(folder) == wanted  # a table that came without the file keeps what it knew
    # and a reviewer who comes later does not wipe it out
    queue(folder).submit(ids[0], "cleo", "unsure")
    assert write_reviews(folder)
    assert column(folder) == wanted | {ids[0]: "unsure"}


def test_damaged_reviews_stop_synthesize_before_its_work(scenes_policy, tmp_path):
    editor = CountingEditor(darker)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/reviews.jsonl").write_text("not json\n")
    with pytest.raises(InputError, match="reviews.jsonl line 1 is not a verdict"):
        write_pair_dataset(photographs(2), pipeline(scenes_policy, editor), tmp_path / "d", made_from={})
    assert editor.asked == []


def test_the_table_waits_for_a_synthesize_that_runs(scenes_policy, tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr("guardkit.counterfactual.pair_dataset._LOCK_TIMEOUT_S", 0.1)
    folder = make(scenes_policy, tmp_path / "d")
    queue(folder).submit(queue(folder).pairs[0]["pair_id"], "ann", "accept")
    with FileLock(folder / ".lock"):
        assert not write_reviews(folder)
    assert set(column(folder).values()) == {None}
    assert write_reviews(folder)
    assert "accept" in column(folder).values()


def test_a_verdict_follows_its_images_and_no_others(scenes_policy, tmp_path):
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    make(scenes_policy, first)
    for row in queue(first).pairs:
        queue(first).submit(row["pair_id"], "ann", "reject")
    for folder, options in (
        (same, {"variants_per_image": 1}),
        (other, {"editor": lambda request: EditResult(request.content.load() // 3)}),
    ):
        folder.mkdir()
        shutil.copy(first / "reviews.jsonl", folder)
        make(scenes_policy, folder, **options)
    assert set(column(same).values()) == {"reject"}
    assert set(column(other).values()) == {None}
    assert queue(other).next_unseen("ann") == 0


def test_training_leaves_out_what_people_rejected(scenes_policy, tmp_path):
    folder = make(scenes_policy, tmp_path / "d", n=8, verifier=Fussy())
    accepted, rejected = ([row["pair_id"] for row in queue(folder, show=show).pairs] for show in ("accepted", "rejected"))
    assert (len(accepted), len(rejected)) == (4, 4)
    untouched = PairsSource(scenes_policy, str(folder))
    here = queue(folder, show="all")
    here.submit(accepted[0], "ann", "reject", "six fingers")
    here.submit(accepted[0], "bob", "accept")
    here.submit(accepted[1], "ann", "unsure")
    here.submit(accepted[2], "ann", "accept")
    here.submit(rejected[0], "ann", "accept", "it is fine")  # a person counts for more than the verifier
    here.submit(rejected[1], "ann", "unsure")
    here.submit(rejected[2], "ann", "reject")

    def used(**options):
        loaded = PairsSource(scenes_policy, str(folder), **options).load()
        reasons = {one.id: one.reason for one in loaded.rejected}
        assert loaded.given == len(loaded.train) + len(loaded.rejected) == 8
        names = {record.id.removeprefix("images/").removesuffix(".png") for record in loaded.train}
        assert not names & set(reasons)
        return names, reasons

    names, reasons = used()
    assert names == {accepted[1], accepted[2], accepted[3], rejected[0]}
    assert reasons == {
        accepted[0]: "rejected in review: six fingers",
        rejected[1]: "rejected when it was made: not convinced",
        rejected[2]: "rejected in review: no reason given",
        rejected[3]: "rejected when it was made: not convinced",
    }
    names, reasons = used(keep_unsure=False)
    assert names == {accepted[2], accepted[3], rejected[0]}
    assert reasons[accepted[1]] == "unsure in review: no reason given"
    names, reasons = used(keep_unsure=False, reviewed_only=True)
    assert names == {accepted[2], rejected[0]}
    assert reasons[accepted[3]] == "nobody reviewed it"
    assert PairsSource(scenes_policy, str(folder)).asked != untouched.asked
    with pytest.raises(InputError, match="source.keep_unsure must be true or false, got 'no'"):
        PairsSource(scenes_policy, str(folder), keep_unsure="no")


def test_a_column_that_somebody_else_wrote(scenes_policy, tmp_path):
    folder = make(scenes_policy, tmp_path / "d")
    table = pq.read_table(folder / "metadata.parquet")

    def write(values):
        place = table.column_names.index("review")
        pq.write_table(table.set_column(place, "review", pa.array(values, pa.string())), folder / "metadata.parquet")

    write(["reject", None, "accept", None])
    assert len(PairsSource(scenes_policy, str(folder)).load().train) == 3
    write(["fine", None, None, None])
    with pytest.raises(InputError, match="review 'fine' of pair .*; allowed are accept, reject, unsure, or nothing"):
        PairsSource(scenes_policy, str(folder))


def test_names_are_one_name_however_they_are_typed():
    assert reviewer_name("  Zoe\u0308   M. ") == "Zoë M."
    for bad in (None, "", "x" * 61, "a\x00b", "\ud800"):
        with pytest.raises(InputError, match="1 to 60 printable characters"):
            reviewer_name(bad)
