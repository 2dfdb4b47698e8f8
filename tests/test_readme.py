"""The README is run: its commands and its Python, as written and in order, in one folder of made-up photographs, without a network."""

from __future__ import annotations

import re
import shlex
import tomllib
from itertools import groupby

import pytest
from commands import call, execute
from conftest import ROOT, picture

TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
# a command that needs the network, or that serves until somebody stops it, says so in its comment: its settings are checked, and it is not run
NOT_RUN = re.compile(r"^(python -m guardkit\..*?)\s+# \((network|serves)\).*$", re.MULTILINE)


def lay_out(photos):
    """Photographs as the README describes them: some with a box, and one that cannot be read."""
    photos.mkdir()
    rows = ["file_name,label,category,x_min,y_min,x_max,y_max"]
    for i in range(1, 161):
        unsafe = i % 4 == 1
        name = f"{i:04}.jpg"
        picture(i, (64, 48)).point(lambda value, unsafe=unsafe: value // 2 if unsafe else value).save(photos / name)
        rows.append(f"{name},unsafe,alcohol,0.31,0.10,0.62,0.95" if unsafe else f"{name},safe,,,,,")
    (photos / "0002.jpg").write_bytes(b"no image")
    (photos / "metadata.csv").write_text("\n".join(rows) + "\n")


def commands(block):
    """What a shell would run of a block, one after the other, as lists of arguments."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&")
        words.whitespace_split = True
        yield from (list(group) for joined, group in groupby(words, lambda word: word == "&&") if not joined)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs every block in order; gives the folder, what each command printed, and what was to be installed."""
    folder = tmp_path_factory.mktemp("readme")
    work = folder / "work"
    work.mkdir()
    lay_out(work / "photos")
    printed, installed = [], []

    def keep(done):
        printed.append(done.stdout + done.stderr)
        assert done.returncode == 0, f"{shlex.join(done.args)}\n{printed[-1][-3000:]}"

    for language, block in BLOCKS:
        if language == "yaml":
            (work / re.match(r"# (\S+\.yaml)\n", block)[1]).write_text(block)
        if language == "python":
            keep(execute(block, cwd=work))
        for command in commands(NOT_RUN.sub(r"\1 --cfg job", block)) if language == "bash" else ():
            match command:
                case ["pip", "install", *what]:
                    installed.append(what)
                case ["pytest"]:
                    pass  # these are the tests
                case ["python", "-m", module, *arguments]:
                    keep(call(module, *arguments, cwd=work))
                case _:
                    pytest.fail(f"the README has a command of a new kind: {shlex.join(command)}")
    return work, printed, installed


def test_it_is_short():
    lines = TEXT.splitlines()
    assert len(lines) < 200
    assert [line for line in lines if len(line) > 160] == []


def test_its_blocks_are_of_kinds_that_are_checked():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml", "text"}
    assert sorted(why for _, block in BLOCKS for _, why in NOT_RUN.findall(block)) == ["network", "serves"]


@pytest.mark.slow
def test_every_command_runs_as_written(run):
    folder, printed, _ = run
    assert all(printed)
    assert {"my_guard", "pairs_guard", "my_pairs", "compared", "strict_guard", "outputs"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "models").exists()  # of a command that is not run


@pytest.mark.slow
def test_the_table_shown_has_the_lines_that_are_printed(run):
    def labels(table):
        return [re.split(r"\s{2,}", line.strip())[0] for line in table.splitlines() if line.startswith("  ") and "note:" not in line]

    _, printed, _ = run
    tables = [block for language, block in BLOCKS if language == "text" and "seed 0" in block]
    trained = [one for one in printed if ", seed 0\n" in one]
    assert [labels(table) for table in tables] == [labels(one) for one in trained[: len(tables)]]


@pytest.mark.slow
def test_what_it_installs_can_be_installed(run):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert run[2] == [["-e", "."], ["-e", ".[test]"]]
    assert set(re.findall(r'pip install (?:-e )?"?(?:\.|guardkit)\[(\w+)\]', TEXT)) <= set(extras)
