"""One owner of an output folder: locked, marked, replaced as a whole or gone on with, and nobody else's files touched."""

from __future__ import annotations

import json
import re
import threading
from contextlib import suppress

import pytest
import torch
from commands import call
from filelock import FileLock
from safetensors.torch import load_file

from guardkit.folders import LOCK, MARK, claim, is_unfinished, locked, read_mark, refuse_others
from guardkit.schema import InputError


def write(folder, name="metrics.json", settings=1, command="train", **more):
    with claim(folder, command, settings, replaces=["metrics.json", "guard"], **more):
        (folder / name).write_text(str(settings))


def test_a_second_run_replaces_the_first_as_a_whole(tmp_path, caplog):
    (tmp_path / "guard").mkdir()  # empty folders are nobody's
    write(tmp_path)
    (tmp_path / "guard").mkdir(exist_ok=True)
    (tmp_path / "guard/config.json").touch()
    write(tmp_path, "other.csv", settings=1)  # a name that only the mark knows
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in (LOCK, MARK)) == ["other.csv"]
    (tmp_path / "notes.txt").write_text("somebody's own")
    caplog.set_level("INFO")
    write(tmp_path, settings=2)
    assert "replaces an earlier run with other settings" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in (LOCK, MARK)) == ["metrics.json", "notes.txt"]
    assert read_mark(tmp_path)["state"] == "finished"


def test_the_mark_of_somebody_else_deletes_no_more_than_it_names(tmp_path):
    write(tmp_path)
    mark = json.loads((tmp_path / MARK).read_text())
    (tmp_path / MARK).write_text(json.dumps(mark | {"files": ["*", "../*", "metrics.json", 3]}))
    (tmp_path / "thesis.tex").write_text("years of work")
    write(tmp_path, settings=2)
    assert (tmp_path / "thesis.tex").exists()
    assert (tmp_path / "metrics.json").read_text() == "2"


def test_a_run_that_ends_early_leaves_the_mark_unfinished_and_nothing_older(tmp_path):
    write(tmp_path)
    with suppress(KeyboardInterrupt), claim(tmp_path, "train", 1, replaces=["metrics.json", "guard"]):
        assert not (tmp_path / "metrics.json").exists()
        (tmp_path / "guard").mkdir()
        (tmp_path / "guard/config.json").touch()
        (tmp_path / ".metrics.12.34.tmp.json").touch()  # as a killed writer leaves it
        raise KeyboardInterrupt
    assert is_unfinished(tmp_path)
    write(tmp_path)
    assert not is_unfinished(tmp_path)
    assert not (tmp_path / "guard").exists()
    assert not list(tmp_path.glob(".metrics*"))


def test_strangers_files_other_commands_and_damaged_marks_are_refused(tmp_path):
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds files that guardkit train did not write .guard.; choose another output_dir"):
        write(tmp_path)
    assert (tmp_path / "guard/thesis.tex").exists()
    write(tmp_path / "a", command="evaluate")
    with pytest.raises(InputError, match="holds the results of guardkit evaluate, not of train"):
        write(tmp_path / "a")
    (tmp_path / "a" / MARK).write_text("[" * 100_000)
    with pytest.raises(InputError, match="is damaged"):
        write(tmp_path / "a")


def test_stored_work_goes_on_only_under_the_same_settings(tmp_path):
    with claim(tmp_path, "embed", {"encoder": "a"}):
        (tmp_path / "part").touch()
    with claim(tmp_path, "embed", {"encoder": "a"}):
        assert (tmp_path / "part").exists()
    with pytest.raises(InputError, match="made with another encoder"), claim(tmp_path, "embed", {"encoder": "b"}):
        pass
    (tmp_path / MARK).unlink()  # as a copy without hidden files
    with claim(tmp_path, "embed", {"encoder": "a"}, recognise=lambda: {"encoder": "a"}):
        pass


def test_one_process_and_one_thread_at_a_time(tmp_path):
    with FileLock(tmp_path / LOCK), pytest.raises(InputError, match="is being written by another process"):
        write(tmp_path)
    with locked(tmp_path, about={"overrides": ["seed=1"]}):
        refused = []

        def other():
            with pytest.raises(InputError, match="is being written by another process"):
                write(tmp_path)
            refused.append(True)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert refused == [True]
        write(tmp_path)  # the thread that holds it
        with claim(tmp_path.with_name(f"{tmp_path.name}_beside"), "train", 1, replaces=[]):
            pass
    assert read_mark(tmp_path)["overrides"] == ["seed=1"]


def test_what_a_killed_worker_left_is_gone_when_the_run_is_done(tmp_path):
    with claim(tmp_path / "out", "train", 1, replaces=[]):
        (tmp_path / "out/.metadata_3.4711.140.tmp.parquet").write_bytes(b"half")
    assert not list((tmp_path / "out").glob("*.tmp*"))


def test_what_was_made_for_a_run_that_writes_nothing_is_taken_away(tmp_path):
    before = tmp_path / "here"
    before.mkdir()
    for folder in (before, tmp_path / "new/deep/run"):
        with locked(folder):
            assert (folder / LOCK).exists()
    assert list(tmp_path.rglob("*")) == [before]
    (before / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="did not write"):
        write(before)
    assert list(before.iterdir()) == [before / "thesis.tex"]


def test_a_folder_that_cannot_be_made_is_refused_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run cannot be made: .*/file is a file; choose another output_dir"):
        refuse_others(tmp_path / "file/run", "train", replaces=True)


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("fetch", ["encoder=siglip2_b16"], "encoder ViT-B-16-SigLIP2 \\(webli\\) could not be loaded from the Hub"),
        (
            "fetch",
            ["encoder=transformers", "encoder.weights=hf-hub:typo/name"],
            "encoder.weights hf-hub:typo/name could not be fetched from the Hub",
        ),
        ("train", ["encoder=siglip2_b16", "editor=none"], "encoder ViT-B-16-SigLIP2 \\(webli\\) could not be loaded from the Hub"),
        ("train", ["data.n_unsafe=few"], "data.n_unsafe must be a whole number"),
        ("moderate", ["input=uploads"], "guard must be given, as in guard=VALUE"),
        ("evaluate", ["guard=typo/name"], "'typo/name' is no folder here, and no guard of that name can be had from the Hub"),
    ],
)
def test_a_command_that_fails_at_its_start_leaves_no_folder(tmp_path, command, settings, message):
    cache = tmp_path / "cache"
    done = call(f"guardkit.{command}", *settings, f"output_dir={tmp_path / 'new/run'}", HF_HOME=str(cache), HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert re.match(f"error: {message}", line)
    if "Hub" in message:
        assert "(the Hub is switched off by HF_HUB_OFFLINE, and no whole copy was fetched before); " in line
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    call(f"guardkit.{command}", *settings, f"output_dir={tmp_path / 'run'}", HF_HOME=str(cache), HF_HUB_OFFLINE="1")
    assert list(tmp_path.rglob("*")) == [tmp_path / "run"]  # which was there before


@pytest.mark.parametrize("command", ["train", "embed", "synthesize", "sweep", "evaluate", "app"])
def test_a_folder_of_another_command_is_refused_before_the_long_part(compose, tmp_path, monkeypatch, command):
    from guardkit.app import app
    from guardkit.runs.embed import run as embed_source
    from guardkit.runs.evaluate import run as evaluate
    from guardkit.runs.sweep import run as run_sweep
    from guardkit.runs.synthesize import run as synthesize_source
    from guardkit.runs.train import run

    def long(*args, **kwargs):
        raise AssertionError("the long part has begun")

    for place in (
        "api.train.make_parts",
        "api.embed.load_source",
        "api.synthesize.load_source",
        "api.sweep.make_parts",
        "runs.evaluate.build_contenders",
        "moderation.review_page.review_pairs",
    ):
        monkeypatch.setattr(f"guardkit.{place}", long)
    monkeypatch.setattr("guardkit.app.output_dir", lambda: tmp_path)
    write(tmp_path, command="calibrate")
    cfg = compose(command, *(["pairs=x"] if command == "app" else []))
    start = {
        "train": lambda: run(cfg, {}, tmp_path),
        "embed": lambda: embed_source(cfg, tmp_path),
        "synthesize": lambda: synthesize_source(cfg, tmp_path),
        "sweep": lambda: run_sweep(cfg, {}, tmp_path),
        "evaluate": lambda: evaluate(cfg, tmp_path),
        "app": lambda: app.__wrapped__(cfg),
    }
    with pytest.raises(InputError, match=f"holds the results of guardkit calibrate, not of {command}"):
        start[command]()
    assert read_mark(tmp_path)["command"] == "calibrate"


def test_a_second_training_leaves_nothing_of_the_first(train, tmp_path):
    train("experiment=unpaired", "trainer.max_epochs=5", folder=tmp_path)
    (tmp_path / "mistakes.png").touch()  # of an older version
    train("experiment=unpaired", "trainer.max_epochs=5", "seed=5", folder=tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["seed"] == 5
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    best = torch.load(checkpoint, weights_only=True)["callbacks"]["BestHead"]["weights"]
    for key, value in load_file(tmp_path / "guard/model.safetensors").items():
        torch.testing.assert_close(best[key], value, rtol=0, atol=0)
    assert not (tmp_path / "mistakes.png").exists()


def test_a_training_that_fails_late_leaves_no_older_figures(train, tmp_path, monkeypatch):
    train("experiment=unpaired", "trainer.max_epochs=5", folder=tmp_path)

    def full(path, measured):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("guardkit.api.trained.write_predictions", full)
    with pytest.raises(OSError, match="No space left"):
        train("experiment=unpaired", "trainer.max_epochs=5", "seed=5", folder=tmp_path)
    assert (tmp_path / "guard").exists()
    assert not (tmp_path / "metrics.json").exists()
    assert is_unfinished(tmp_path)


def test_a_run_that_a_wrong_setting_ended_holds_no_folder(tmp_path):
    with pytest.raises(ValueError, match="wrong"), claim(tmp_path, "finetune", 1):
        raise ValueError("wrong")
    with suppress(ValueError), claim(tmp_path, "finetune", 2):
        (tmp_path / "result.json").touch()
        raise ValueError("later")
    with pytest.raises(InputError, match="made with other settings"), claim(tmp_path, "finetune", 3):
        pass


def test_a_link_that_leads_nowhere_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(InputError, match="link cannot be made: a file is there, or a link that leads nowhere"),
        claim(tmp_path / "link", "embed", {}),
    ):
        pass
