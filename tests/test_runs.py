"""How a command starts and fails: what a user types, what is one line, what is a traceback, how jobs are named."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import call
from conftest import ROOT, picture
from hydra.core.override_parser.overrides_parser import OverridesParser

from guardkit.runs.errors import user_error
from guardkit.runs.hydra import CONF_DIR
from guardkit.runs.overrides import job_name, mended, quoted
from guardkit.schema import ImageError, InputError
from guardkit.terminal import LineFormatter, one_line


def raised(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


# --- whose error it is ---------------------------------------------------------------------------------------------------


def test_a_bug_met_while_a_users_error_was_handled_is_a_bug():
    def bug():
        try:
            raise ImageError("the file is damaged")
        except ImageError:
            return {}["no such key"]

    def wrapped():
        try:
            raise InputError("seed must be a number")
        except InputError as error:
            raise RuntimeError("in a worker") from error

    assert user_error(raised(bug)) is None
    assert user_error(raised(wrapped)) == "seed must be a number"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "no space is left on the disk; what was finished is kept"),
        (OSError(28, "No space left on device", "/data/x"), "no space is left on the disk: /data/x"),
        (OSError("32768 requested and 8000 written"), "no space is left"),
        (OSError(30, "Read-only file system", "/data/x"), "the disk can only be read: /data/x"),
        (sqlite3.OperationalError("database or disk is full"), "no space is left"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "the disk can only be read"),
        (PermissionError(13, "Permission denied", "/data/x"), "Permission denied: /data/x; check the path"),
        (RuntimeError("something else"), None),
        (OSError("something else"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_of_the_disk_are_one_line(error, says):
    line = user_error(error)
    assert (line or "").startswith(says) if says else line is None


def test_control_codes_of_strangers_are_shown_not_obeyed():
    name = "cat\x1b[2J\x07\u202egpj.png"
    line = user_error(InputError(f"{name} cannot be read"))
    assert line == "cat\\x1b[2J\\x07\\u202egpj.png cannot be read"
    assert one_line("Bäume\n 日本") == "Bäume 日本"
    record = logging.LogRecord("guardkit", logging.WARNING, "", 0, "left out: %s", (name,), None)
    assert LineFormatter().format(record) == "WARNING: left out: cat\\x1b[2J\\x07\\u202egpj.png"


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("data.n_unsave=3", "did you mean data.n_unsafe?"),
        ("n_unsafe=3", "did you mean data.n_unsafe?"),
        ("experiment=pairs_aug2", "did you mean experiment=pairs_aug?"),
        ("encodr=open_clip", "did you mean encoder?"),
        ("seeds=3", "did you mean seed?"),
    ],
)
def test_a_misspelt_setting_suggests_the_nearest(compose, override, suggestion):
    line = user_error(raised(lambda: compose("train", override)))
    assert suggestion in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("encoder=nothing_like_it", "encoder=nothing_like_it is not there; encoder is one of clip_vit_b32, clip_vit_l14, "),
        (
            "source.root=photos",
            "source.root is no setting of the source that is chosen; source=embeddings, source=folder, source=pairs, source=policy_items would",
        ),
        (
            "editor.max_area=0.5",
            "editor.max_area is no setting of the editor that is chosen; editor=inpaint, editor=paste would have it; see",
        ),
        ("zzz=3", "there is no setting zzz; +zzz=VALUE adds one, for a part that takes it; see --help"),
    ],
)
def test_a_setting_that_is_not_there_is_told_in_the_words_of_the_command_line(compose, override, says):
    line = user_error(raised(lambda: compose("train", override)))
    assert line.startswith(says)
    assert "provider" not in line


# --- what a user types ---------------------------------------------------------------------------------------------------

NAMES = ["epoch=3", "photos (1)", "Bilder für alle", "it's mine", "[final]", "set #2", "a,b", "~x", "a\\", "sort(1)", " x", 'a"b', "a\\'b"]


@pytest.mark.parametrize("name", NAMES)
def test_any_path_can_be_typed_as_it_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    parser = OverridesParser.create()
    for text in (name, str(tmp_path / name)):
        (tmp_path / name).mkdir(exist_ok=True)
        (argument,) = mended([f"source.root={text}"])
        assert parser.parse_override(argument).value() == text
        assert parser.parse_override(f"k={quoted(text)}").value() == text


@pytest.mark.slow
def test_a_path_may_hold_bytes_that_are_no_text(tmp_path):
    name = os.fsdecode(b"stra\xdfe")
    places = {kind: os.fsencode(tmp_path) + b"/" + kind + b"\xff" for kind in (b"photos", b"embedded", b"trained", b"measured")}
    for label in ("safe", "unsafe"):
        (tmp_path / os.fsdecode(places[b"photos"]) / label).mkdir(parents=True)
        for i in range(8):
            picture(100 * len(label) + i, (32, 32)).save(tmp_path / os.fsdecode(places[b"photos"]) / label / f"{i}.png")

    always = ["policy=handled_objects", f"cache_dir={tmp_path / name}"]
    asked = [*always, "source=folder", b"source.root=" + places[b"photos"], b"output_dir=" + places[b"embedded"]]
    done = subprocess.run([sys.executable, "-m", "guardkit.embed", *asked], capture_output=True)
    assert done.returncode == 0, done.stderr

    def run(command, *arguments):
        done = call(f"guardkit.{command}", *always, *map(os.fsdecode, arguments))
        assert done.returncode == 0, done.stderr

    few = ["experiment=unpaired", "editor=none", "trainer.max_epochs=1"]
    run("train", "source=embeddings", b"source.root=" + places[b"embedded"], b"output_dir=" + places[b"trained"], *few)
    guard = b"guard=" + places[b"trained"]
    run("evaluate", guard, "source=folder", b"source.root=" + places[b"photos"], b"output_dir=" + places[b"measured"], "n_resamples=100")


@pytest.mark.parametrize("name", ["2024", "2024_11_26", "1e5", "true", "007", "1_000"])
def test_a_path_that_looks_like_a_number_is_a_path(name):
    parser = OverridesParser.create()
    for key in ("source.root", "output_dir", "cache_dir", "guard", "verifier.guard.folder"):
        (argument,) = mended([f"{key}={name}"])
        assert parser.parse_override(argument).value() == name
    assert mended(["source.root=null", f"seed={name}"]) == ["source.root=null", f"seed={name}"]
    _, argument = mended(["-m", f"source.root={name},b"])
    assert [getattr(one, "text", one) for one in parser.parse_override(argument).value().list] == [name, "b"]


@pytest.mark.parametrize("group", ["policy", "logger", "encoder", "editor"])
def test_a_group_that_is_set_to_nothing_says_what_there_is(group):
    with pytest.raises(InputError, match=f"{group}=null must name one of .*, or a file of your own in a folder {group}/"):
        mended([f"{group}=null"], CONF_DIR)
    assert mended(["policy_file=null", "seed=null"], CONF_DIR) == ["policy_file=null", "seed=null"]


def test_what_hydra_refuses_by_no_kind_of_its_own_is_one_line():
    for arguments in (["--resolve"], ["=5"]):
        done = subprocess.run([sys.executable, "-m", "guardkit.embed", *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_what_hydra_reads_keeps_its_meaning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "3").touch()
    plain = [
        "-m",
        "--config-dir",
        "a b",
        "seed=3",
        "seed=0,1",
        "sweep.sizes=[4,8]",
        "seed=range(5)",
        "~head",
        "+experiment@arms.x=x",
        "loss={a: 1}",
    ]
    assert mended(plain) == plain
    with pytest.raises(InputError, match=r"sweep.sizes=\[4,8 cannot be read .*quote it: "):
        mended(["sweep.sizes=[4,8"])
    with pytest.raises(InputError, match="would sweep over output_dir; give one folder"):
        mended(["-m", "output_dir=a,b"])
    assert mended(["-m", "source.root=/für,/x"]) == ["-m", "source.root='/für',/x"]


def test_a_job_has_a_folder_of_its_own_whatever_its_settings_are():
    jobs = [
        ["seed=0", "source.root=../../pics"],
        ["seed=1", "source.root=../../pics"],
        ["seed=1", "source.root=../.._pics"],
        ["seed=1", f"source.root=/{'x' * 5000}/y"],
        ["seed=1", "source.root='für (1)'"],
        ["seed=1", "source.root='FÜR (1)'"],
        [],
    ]
    names = [job_name(one) for one in jobs]
    assert len({name.lower() for name in names}) == len(jobs)
    for name in names:
        assert len(name) <= 80
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert not name.startswith(".")
    assert names[0].startswith("seed_0-")
    assert job_name(["a=1", "b=2", "output_dir=x"]) == job_name(["b=2", "a=1"])


# --- how it starts and ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_read", [0, 1])
def test_help_may_be_read_in_part(n_read):
    command = [sys.executable, "-m", "guardkit.train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for _ in range(n_read):
            process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_results_that_nobody_reads_end_nothing():
    code = "from guardkit.terminal import say; import sys; sys.stdin.read(); say('one'); say('two'); print('done', file=sys.stderr)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, cwd=ROOT, **pipes) as process:
        process.stdout.close()
        process.stdin.close()  # the code begins when nobody reads
        assert process.stderr.read() == "done\n"
    assert process.returncode == 0


def start(*arguments, **options):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120, **({"cwd": ROOT} | options))


def test_the_commands_under_one_name():
    code = (
        "import sys; sys.argv = ['guardkit']; import guardkit.__main__ as m; m.main(); print(sorted({'torch', 'hydra'} & set(sys.modules)))"
    )
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert all(f"  {path.stem} " in listed.stdout for path in (ROOT / "conf").glob("*.yaml") if path.stem != "shared")
    assert listed.stdout.endswith("[]\n")
    wrong = start("guardkit", "trian")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: there is no command 'trian'; did you mean train?")
    named = start("guardkit", "train", "--version")
    assert named.stdout == start("guardkit.embed", "--version").stdout == start("guardkit", "--version").stdout == "guardkit 0.1.0\n"
    one = start("guardkit", "train", "seed=-1", "output_dir=/proc/nowhere")
    assert one.returncode == 2
    assert "Traceback" not in one.stderr


def test_a_terminal_that_lacks_characters_ends_nothing(tmp_path):
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = start("guardkit.embed", "source=folder", "source.root=/größe", f"output_dir={tmp_path / 'ö'}", env=plain)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "/gr" in done.stderr.splitlines()[-1]


BUSY = """
import signal, sys, threading, time
from guardkit.runs.hydra import main
from guardkit.runs.signals import GRACE_S
import guardkit.runs.signals as signals
signals.GRACE_S = 1.0

@main("app")
def busy(cfg):
    threading.Thread(target=time.sleep, args=(60,)).start()  # as a background thread in the middle of an edit
    print("at work", flush=True)
    try:
        time.sleep(60)
    finally:
        {finally_}

busy()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("finally_", ["pass", "time.sleep(60)", "raise ValueError('closed already')"])
def test_a_signal_ends_a_command_whatever_its_threads_do(tmp_path, number, finally_):
    code = BUSY.replace("{finally_}", finally_)
    running = subprocess.Popen(
        [sys.executable, "-c", code, "pairs=x", f"output_dir={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert running.stdout.readline() == "at work\n"
    started = time.monotonic()
    running.send_signal(number)
    _, said = running.communicate(timeout=50)
    assert running.returncode == 128 + number, said
    assert time.monotonic() - started < 40  # the threads sleep for longer
    assert said.strip().splitlines()[-1] == "stopped; what was finished is kept"
    assert "Traceback" not in said


def test_sigterm_is_one_line_while_a_library_has_its_own_handler(tmp_path):
    code = """
import os, signal, sys, time
import guardkit.runs.embed
def run(cfg, folder):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(signal.SIGTERM))  # as Ray does while it starts
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
guardkit.runs.embed.run = run
from guardkit.embed import embed
embed()
"""
    done = subprocess.run([sys.executable, "-c", code, f"output_dir={tmp_path}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.strip().splitlines() == ["stopped; what was finished is kept"]


def test_an_ignored_signal_stays_ignored(tmp_path):
    code = "import signal\nfrom guardkit.runs.signals import stoppable\nwith stoppable(): print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a child inherits
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.stdout == "True\n"


def test_without_a_home_directory(tmp_path, monkeypatch):
    from guardkit.runs.hydra import default_cache_dir

    for name in ("HOME", "GUARDKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a user id without an entry
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = Path(default_cache_dir())
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(InputError, match="set GUARDKIT_CACHE or cache_dir to a folder of your own"):
        default_cache_dir()
