"""Pair datasets: written whole or not at all, the same after any interruption, and read back as a source."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import FORKS
from conftest import ROOT, picture
from PIL import Image
from test_editors_pipeline import CountingEditor, darker, photograph, pipeline, unsafe_scene

from guardkit.counterfactual.instructor import TemplateInstructor
from guardkit.counterfactual.pair_dataset import read_pair_dataset, write_pair_dataset
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.counterfactual.verifier import Verdict
from guardkit.data.sources.pairs import PairsSource
from guardkit.editors.base import EditResult
from guardkit.engines.local import LocalEngine
from guardkit.schema import InputError, Rejected
from guardkit.shards.pairing import edits_on


def photographs(n):
    return [replace(photograph(i), id=f"folder/{i}.png") for i in range(n)]


def refuse_some(request):
    return darker(request) if request.seed % 3 else EditResult(None, "refused")


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock" and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_try_is_in_the_table_and_the_counts_add_up(scenes_policy, tmp_path):
    here = pipeline(scenes_policy, CountingEditor(refuse_some), max_tries=2)
    bad = [Rejected("broken.png", "damaged image")]
    manifest = write_pair_dataset(photographs(5), here, tmp_path / "d", made_from={}, variants_per_image=2, rejected=bad)
    rows, found = read_pair_dataset(tmp_path / "d")
    assert found == json.loads(json.dumps(manifest))
    # seed 0 is refused once and then tried again, seed 1 is accepted at once
    assert (manifest["given"], manifest["edited"], manifest["unreadable"]) == (6, 5, 1)
    assert (manifest["tries"], manifest["accepted"], manifest["rejected"]) == (15, 10, {"refused": 5})
    assert manifest["yield_per_try"] == pytest.approx(2 / 3)
    assert manifest["yield_per_image"] == 1.0
    assert len({row["pair_id"] for row in rows}) == len(rows) == 15
    for row in rows:
        assert (tmp_path / "d" / row["file_name"]).is_file()
        assert (row["edited_file_name"] is None) == (row["status"] == "rejected")
        if row["edited_file_name"]:
            original, edited = (np.asarray(Image.open(tmp_path / "d" / row[name])) for name in ("file_name", "edited_file_name"))
            np.testing.assert_array_equal(edited, original // 2)
    assert pq.read_table(tmp_path / "d/rejected.parquet").to_pylist() == [{"id": "broken.png", "reason": "damaged image"}]


def test_the_folder_is_a_hugging_face_image_folder(scenes_policy, tmp_path):
    """`file_name` is relative to the table, unique files exist, and names cannot lead out of the folder."""
    odd = [replace(photograph(i), id=name) for i, name in enumerate(["../../x.png", "a/b.png", "a_b.png", "A_B.png", ".", "ü.png"])]
    write_pair_dataset(odd, pipeline(scenes_policy, CountingEditor(darker)), tmp_path / "d", made_from={})
    rows, _ = read_pair_dataset(tmp_path / "d")
    names = [row["file_name"] for row in rows]
    assert len({name.lower() for name in names}) == 6
    for name in names:
        assert (tmp_path / "d" / name).resolve().parent == (tmp_path / "d/images").resolve()
    assert {path.name for path in tmp_path.iterdir()} == {"d"}


def test_the_gallery_blurs_what_is_unsafe_and_escapes_what_it_is_told(scenes_policy, tmp_path):
    records = [replace(photograph(0), caption="<script>alert(1)</script>")]
    write_pair_dataset(records, pipeline(scenes_policy, CountingEditor(darker)), tmp_path / "d", made_from={})
    page = (tmp_path / "d/gallery.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count('class="veil"') == 1  # the original; its counterfactual lies open


def test_settings_and_processes_do_not_mix(scenes_policy, tmp_path):
    records, editor = photographs(2), CountingEditor(darker)
    write_pair_dataset(records, pipeline(scenes_policy, editor), tmp_path / "d", made_from={})
    with pytest.raises(InputError, match="made with another max_tries; choose another output_dir"):
        write_pair_dataset(records, pipeline(scenes_policy, editor, max_tries=2), tmp_path / "d", made_from={})
    code = (
        f"from filelock import FileLock; lock = FileLock({str(tmp_path / 'd/.lock')!r}); lock.acquire(); print('held', flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="is being written by another process"):
        write_pair_dataset(records, pipeline(scenes_policy, editor), tmp_path / "d", made_from={})
    holder.communicate("\n")
    with pytest.raises(InputError, match=r"is no pair dataset: manifest.json is missing"):
        read_pair_dataset(tmp_path)


def synthesize_slowly(folder, said):
    """What the killed processes run: 24 images, some refused and tried again, a pause before every edit."""
    from guardkit import Policy

    def answer(request):
        time.sleep(0.004)
        return refuse_some(request)

    here = pipeline(
        Policy.load(ROOT / "conf/policy/scenes.yaml"), CountingEditor(answer), folder.parent / "cache", batch_size=3, max_tries=3
    )
    said.send("go")
    write_pair_dataset(photographs(24), here, folder, made_from={})
    said.send(len(here.editor.asked))


def test_killed_thirty_times_it_ends_as_if_undisturbed(tmp_path):
    """The same files, byte for byte; no try is lost."""

    def start(folder):
        said, there = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=synthesize_slowly, args=(folder, there))
        process.start()
        there.close()
        return process, said

    whole = tmp_path / "whole" / "d"
    process, said = start(whole)
    assert (said.recv(), said.recv()) == ("go", 48)
    process.join()
    chance, kills = random.Random(0), 0
    torn = tmp_path / "torn" / "d"
    for _ in range(30):
        process, said = start(torn)
        assert said.recv() == "go"
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if not (torn / "manifest.json").exists():
            with pytest.raises(InputError, match="is not complete|is no pair dataset|not a folder|is not there"):
                read_pair_dataset(torn)
    assert kills > 5
    process, said = start(torn)
    assert said.recv() == "go"
    process.join()
    assert process.exitcode == 0
    assert digests(torn) == digests(whole)


class Unreachable:
    """A verifier whose model could not be asked of one image, the first time."""

    name, config = "unreachable", {"verifier": "unreachable"}

    def __init__(self, of=None):
        self.of = of

    def verify(self, candidates):
        return [Verdict("no answer", transient=True) if one.record.id == self.of else Verdict() for one in candidates]


def test_a_stopped_run_goes_on_after_the_shards_that_it_noted(scenes_policy, tmp_path):
    """Also without a store of edits; a shard of which a model could not be asked is asked again."""
    records = photographs(8)

    def write(folder, editor, verifier=None):
        here = CounterfactualPipeline(
            scenes_policy, TemplateInstructor(), editor, verifier or Unreachable(), cache_dir=None, batch_size=2, max_tries=2
        )
        write_pair_dataset(
            records, here, folder, made_from={}, edit=edits_on(LocalEngine(), here, folder, variants_per_image=1, shard_size=1)
        )

    def refuse_some_and_stop(request):
        if len(first.asked) > 8:  # within the third of four shards of two images, each of which is tried twice
            raise KeyboardInterrupt
        return refuse_some(request)

    refuse_some_and_stop.__name__ = refuse_some.__name__
    first, second, undisturbed = (CountingEditor(answer) for answer in (refuse_some_and_stop, refuse_some, refuse_some))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "d", first, Unreachable(records[3].id))
    assert len(list((tmp_path / "d/.shards").glob("*.json"))) == 2
    write(tmp_path / "d", second)
    write(tmp_path / "whole", undisturbed)
    assert (len(undisturbed.asked), len(second.asked)) == (16, 12)  # all but the first shard's
    there, whole = ({name: it for name, it in digests(tmp_path / one).items() if ".shards" not in name} for one in ("d", "whole"))
    assert there == whole
    plain = CounterfactualPipeline(
        scenes_policy, TemplateInstructor(), CountingEditor(refuse_some), Unreachable(), cache_dir=None, batch_size=2, max_tries=2
    )
    write_pair_dataset(records, plain, tmp_path / "plain", made_from={})
    assert digests(tmp_path / "plain") == whole


def test_what_a_killed_writer_left_is_swept_away(scenes_policy, tmp_path):
    """A process killed while it writes an image leaves a temporary file, which is no part of the dataset."""
    left = tmp_path / "d/images/.Folder_0.1.2.tmp.png"
    left.parent.mkdir(parents=True)
    left.touch()
    write_pair_dataset(photographs(2), pipeline(scenes_policy, CountingEditor(darker)), tmp_path / "d", made_from={})
    assert not left.exists()
    assert (tmp_path / "d/images/Folder_0.png").exists()


def test_an_image_that_is_another_by_now_is_written_anew(scenes_policy, tmp_path):
    """Under the same settings, a photograph may have been replaced by another of its name, and a file been damaged."""
    new = [replace(photograph(seed), id=f"folder/{i}.png") for i, seed in enumerate((0, 7))]
    for name, records in (("d", photographs(2)), ("d", new), ("whole", new)):
        write_pair_dataset(records, pipeline(scenes_policy, CountingEditor(darker)), tmp_path / name, made_from={})
        (tmp_path / "d/images/Folder_0_edited.png").write_bytes((tmp_path / "d/images/Folder_0.png").read_bytes())
    write_pair_dataset(new, pipeline(scenes_policy, CountingEditor(darker)), tmp_path / "d", made_from={})
    assert digests(tmp_path / "d/images") == digests(tmp_path / "whole/images")


def test_a_dataset_comes_back_as_a_source(scenes_policy, tmp_path):
    records = photographs(4)
    write_pair_dataset(
        records, pipeline(scenes_policy, CountingEditor(refuse_some), max_tries=2), tmp_path / "d", made_from={}, variants_per_image=2
    )
    loaded = PairsSource(scenes_policy, str(tmp_path / "d")).load()
    assert [len(record.counterfactuals) for record in loaded.train] == [2] * 4
    assert len(loaded.rejected) == 4  # the refused tries
    assert loaded.given == len(loaded.train) + len(loaded.rejected)
    for record, mine in zip(loaded.train, records, strict=True):
        assert (record.label, record.category, record.region) == (1, mine.category, mine.region)
        np.testing.assert_array_equal(record.content.load(), mine.content.load())
        np.testing.assert_array_equal(record.counterfactuals[0].load(), mine.content.load() // 2)
    # the counterfactuals come from the dataset: the editor is not asked
    editor = CountingEditor(darker)
    made = pipeline(scenes_policy, editor).make(loaded.train, [0] * 4)
    assert all(one.accepted for one in made)
    assert editor.asked == []


def test_pairs_made_towards_the_unsafe_side_change_places(scenes_policy, tmp_path):
    from guardkit.editors.scenes import ScenesEditor

    scene = unsafe_scene(1)
    safe = replace(scene, id="safe", label=0, content=replace(scene.content, scene=scene.content.scene.counterfactual()))
    write_pair_dataset([safe], pipeline(scenes_policy, ScenesEditor()), tmp_path / "d", made_from={})
    (record,) = PairsSource(scenes_policy, str(tmp_path / "d")).load().train
    assert record.label == 1
    np.testing.assert_array_equal(record.counterfactuals[0].load(), safe.content.load())
    assert np.abs(record.content.load().astype(int) - safe.content.load()).max() > 20


def test_a_plain_folder_of_edited_images(scenes_policy, tmp_path):
    picture(1).save(tmp_path / "x.jpg")
    picture(2).save(tmp_path / "x_edited.jpg")
    picture(3).save(tmp_path / "y.png")
    picture(4).save(tmp_path / "z_edited.png")
    (tmp_path / "w.jpg").write_bytes(b"broken")
    picture(5).save(tmp_path / "w_edited.png")
    loaded = PairsSource(scenes_policy, str(tmp_path), category="hate").load()
    assert [(record.id, record.category) for record in loaded.train] == [("x.jpg", "hate")]
    reasons = {one.id: one.reason for one in loaded.rejected}
    assert reasons["y.png"] == "no counterfactual y_edited.png beside it"
    assert reasons["z_edited.png"] == "no original beside it"
    assert "w.jpg" in reasons
    with pytest.raises(InputError, match="category 'pears' is not in policy"):
        PairsSource(scenes_policy, str(tmp_path), category="pears")


def test_training_from_a_dataset(compose, scenes_policy, tmp_path):
    from guardkit.editors.scenes import ScenesEditor
    from guardkit.runs.train import run

    write_pair_dataset([unsafe_scene(i) for i in range(40)], pipeline(scenes_policy, ScenesEditor()), tmp_path / "d", made_from={})
    settings = ["source=pairs", f"source.root={tmp_path / 'd'}", "editor=none", "data.n_unsafe=24", "trainer.max_epochs=20"]
    metrics = run(compose("train", *settings, "experiment=pairs_aug"), {}, tmp_path / "run").metrics
    assert (metrics["n_unsafe"], metrics["n_counterfactuals"]) == (24, 24)
    assert metrics["pairs"]["n"] > 5
    with pytest.raises(InputError, match="leaves 0 safe image"):
        run(compose("train", *settings, "experiment=unpaired"), {}, tmp_path / "other")


def test_synthesize_refuses_to_make_real_images_unsafe(compose, tmp_path):
    from guardkit.runs.synthesize import run as synthesize_source

    for label in ("safe", "hate"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        picture(len(label)).save(tmp_path / "photos" / label / "a.png")
    real = ["source=folder", f"source.root={tmp_path / 'photos'}", "editor=inpaint", "direction=to_unsafe"]
    with pytest.raises(InputError, match="real images are edited to the safe side only"):
        synthesize_source(compose("synthesize", *real), tmp_path / "out")
    drawn = ["direction=both", "source.n_train=8", "source.n_test=1", "limit=12", "source.look_alike_rate=1"]
    manifest = synthesize_source(compose("synthesize", *drawn), tmp_path / "drawn")
    assert (manifest["tries"], manifest["accepted"]) == (12, 12)
    rows, _ = read_pair_dataset(tmp_path / "drawn")
    assert [row["label"] for row in rows] == [1] * 8 + [0] * 4
    with pytest.raises(InputError, match="direction must be one of to_safe, to_unsafe, both, got 'up'"):
        synthesize_source(compose("synthesize", "direction=up"), tmp_path / "no")
