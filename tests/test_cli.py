"""What a user types: help that answers at once, one readable line and status 2 for a wrong value, a wheel that runs anywhere."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from commands import call, running
from conftest import ROOT


def start(module, *arguments, cwd=ROOT, **environment):
    """A command in a Python of its own, which has imported nothing."""
    return subprocess.run(
        [sys.executable, "-m", f"guardkit.{module}", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=300,
    )


def test_what_the_hub_says_is_shown_once():
    code = (
        "import logging.config, sys, yaml; logging.config.dictConfig(yaml.safe_load(open(sys.argv[1]))); "
        "import huggingface_hub.file_download; logging.getLogger('huggingface_hub.file_download').warning('Retrying')"
    )
    settings = ROOT / "conf/hydra/job_logging/guardkit.yaml"
    done = subprocess.run([sys.executable, "-c", code, settings], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.count("Retrying") == 1


@pytest.mark.parametrize("module", ["train", "embed", "sweep"])
def test_help_lists_groups_and_loads_nothing_heavy(module):
    code = f"""
import runpy, sys
sys.argv, status = ["x", "--help"], None
try:
    runpy.run_module("guardkit.{module}", run_name="__main__")
except SystemExit as end:
    status = end.code
print([name for name in ("torch", "lightning", "open_clip") if name in sys.modules])
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "encoder: clip_vit_b32, clip_vit_l14, onnx, open_clip, photos_clip, scenes_clip, siglip2_b16" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=pears"], r"experiment=pears is not there; experiment is one of classic_aug.*pairs_aug"),
        (["data.n_unsave=3"], r"n_unsave"),
        (["data.n_unsafe=few"], r"data.n_unsafe must be a whole number of at least 2, got 'few'"),
        (["source=folder", "source.root=/no/such/folder", "policy=handled_objects"], r"source.root /no/such/folder is not there"),
        (["source=folder"], r"source.root"),
    ],
)
def test_wrong_value_is_one_line_and_status_2(arguments, message, tmp_path):
    done = call("guardkit.train", f"output_dir={tmp_path}", *arguments)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    assert re.search(message, lines[-1]), lines[-1]
    assert "Traceback" not in done.stderr


def test_unwritable_output_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = call("guardkit.train", f"output_dir={tmp_path / 'file' / 'run'}")
    assert done.returncode == 2
    assert re.search(r"error: .*file.*output_dir", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_cleanly(tmp_path, number):
    """Interrupted in the middle of its work it ends soon, without a traceback, and the next run uses what is there."""
    cache = tmp_path / "cache"
    settings = ["experiment=pairs_aug", "source.n_train=90", "data.n_unsafe=16", "trainer.max_epochs=10", f"output_dir={tmp_path / 'run'}"]
    with running("guardkit.train", "source.n_test=400", *settings, GUARDKIT_CACHE=str(cache)) as (pid, end):
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not list(cache.glob("embeddings/*.sqlite")):
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(pid, number)
        done = end()
    said = done.stderr
    assert done.returncode == 128 + number, said
    assert said.strip().splitlines()[-1] == "stopped; what was finished is kept"
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "metrics.json").exists()
    done = call("guardkit.train", "source.n_test=9", *settings, GUARDKIT_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["edits"]["requested"] == 16


def test_multirun_gives_every_job_a_folder(tmp_path):
    arguments = ["-m", "experiment=pairs_aug,unpaired", "data.n_unsafe=8", "source.n_train=90", "source.n_test=9", "trainer.max_epochs=5"]
    done = call("guardkit.train", *arguments, f"output_dir={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    found = {json.loads(path.read_text())["experiment"] for path in (tmp_path / "runs").glob("*/metrics.json")}
    assert found == {"pairs_aug", "unpaired"}


@pytest.mark.slow
def test_a_wheel_runs_from_any_folder(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], check=True)
    assert (target / "guardkit/_conf/train.yaml").is_file()
    assert (target / "guardkit/py.typed").is_file()
    assert (target / "guardkit/_checkpoints/scenes_clip/open_clip_model.safetensors").is_file()
    assert not [*target.rglob("*extension*"), *target.glob("guardkit/_checkpoints/**/*.py")]
    empty = tmp_path / "empty"
    empty.mkdir()
    done = start(
        "train", "experiment=pairs_aug", "source.n_train=90", "source.n_test=9", "data.n_unsafe=16", "trainer.max_epochs=10", cwd=empty, PYTHONPATH=str(target),
        GUARDKIT_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    folder = empty / done.stdout.strip().splitlines()[-1]
    assert json.loads((folder / "metrics.json").read_text())["n_unsafe"] == 16
    where = subprocess.run(
        [sys.executable, "-c", "import guardkit; print(guardkit.__file__)"],
        capture_output=True,
        text=True,
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(target)},
    )
    assert str(target) in where.stdout


# of what a notebook says, what only makes its figures sharper
SHARPER = {
    "01_first_guard": {"n_test=90": "n_train=90, n_test=27"},
    "02_sample_efficiency": {
        "n_train=512": "n_train=256", "n_test=90": "n_test=27", "seeds=5": "seeds=2", "variants_per_image=4,": "variants_per_image=1,",
    },
    "03_use_a_guard": {"n_test=45": "n_train=300, n_test=27"},
}  # fmt: skip


@pytest.fixture(scope="module")
def jupyter():
    """jupyter(notebook, folder) runs a notebook there and gives it back: one kernel after the other would import the same for ten seconds each."""
    import nbformat
    from nbclient import NotebookClient

    client = NotebookClient(nbformat.v4.new_notebook(), timeout=300, kernel_name="python3")

    def run(notebook, folder):
        client.nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(code) for code in ("%reset -f", f"import os; os.chdir({str(folder)!r}); del os")]
        )
        client.execute(cleanup_kc=False)
        client.nb = notebook
        return client.execute(cleanup_kc=False)

    yield run
    client.nb = nbformat.v4.new_notebook()
    client.execute(cleanup_kc=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(jupyter, path, tmp_path):
    import nbformat

    text = path.read_text("utf-8")
    for said, enough in SHARPER[path.stem].items():
        assert text.count(said) == 1
        text = text.replace(said, enough)
    notebook = jupyter(nbformat.reads(text, as_version=4), tmp_path)
    assert any(cell.get("outputs") for cell in notebook.cells)
    assert any(tmp_path.iterdir())
