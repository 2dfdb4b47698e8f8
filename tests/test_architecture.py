"""The program that draws docs/architecture.md runs: every room is in the picture, and a command's ways are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PROGRAM = ROOT / "benchmarks/architecture.py"


@pytest.mark.slow
def test_the_picture_has_every_room_and_the_ways_of_a_command_are_found(tmp_path):
    result = subprocess.run(
        [sys.executable, str(PROGRAM), "--out", str(tmp_path), "--commands", "embed"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    picture = (tmp_path / "rooms.svg").read_text()
    for room in {Path(path).stem for path in (ROOT / "guardkit").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - {
        "__init__"
    }:
        assert f">{room}</text>" in picture
    page = (tmp_path / "architecture.md").read_text()
    settings, image = (line for line in page.splitlines() if line.startswith("| `embed`"))
    assert "`embed.py`" in settings
    assert "`cfg`" in settings
    assert "`embeddings`" in image
    assert "`Record`" in image
