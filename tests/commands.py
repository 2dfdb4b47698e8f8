"""Commands as a user types them, each in a process of its own: all are forked from one that has imported what is heavy.

Importing PyTorch and Lightning takes longer than most commands need for their work. What is tested of the start itself, and whatever must
not find these libraries imported, starts Python anew with `subprocess`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT

HEAVY = [
    "guardkit.runs.train",
    "guardkit.runs.evaluate",
    "guardkit.runs.sweep",
    "guardkit.runs.synthesize",
    "guardkit.classifier",
    "guardkit.data.sources.scenes",
    "guardkit.editors.inpaint",
    "guardkit.editors.scenes",
    "guardkit.encoders.open_clip",
    "open_clip",
    # what Lightning's loggers import of what is installed, and a table on its way to a report
    "gcsfs",
    "s3fs",
    "pandas",
    "pyarrow.pandas_compat",
    "matplotlib.backends.backend_agg",
]

# the start method; its Process, Pipe and the like are there for tests that run a function instead of a command
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(HEAVY)


def call(module: str, *arguments: object, cwd: str | Path = ROOT, path: Sequence[str] = (), **environment: str):
    """Runs `python -m module`; gives what `subprocess.run` would.

    Args:
        path: folders to import from before all others.
        environment: variables beside those of this process.
    """
    return _finished(module, None, arguments, cwd, path, environment)


def execute(code: str, *arguments: object, cwd: str | Path = ROOT, path: Sequence[str] = (), **environment: str):
    """The same of `python -c code`."""
    return _finished("-c", code, arguments, cwd, path, environment)


@contextmanager
def running(module: str, *arguments: object, cwd: str | Path = ROOT, **environment: str):
    """What `call` does, while it goes on: gives the number of the process, and a function that waits for its end and gives what `call` would."""
    with _begun(module, None, arguments, cwd, (), environment) as begun:
        yield begun


def _finished(*given):
    with _begun(*given) as (_, end):
        return end()


@contextmanager
def _begun(module, code, arguments, cwd, path, environment):
    asked = [module, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_in_a_process, args=(asked, code, said, cwd, path, os.environ | environment))
        process.start()

        def end():
            process.join(timeout=300)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(asked, 300)
            return subprocess.CompletedProcess(asked, process.exitcode, *(one.read_text("utf-8", "surrogateescape") for one in said))

        try:
            yield process.pid, end
        finally:
            process.kill()
            process.join()


def _in_a_process(asked, code, said, cwd, path, environment):
    for stream, file in zip((sys.stdout, sys.stderr), said, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    gc.freeze()  # nobody collects what was imported before the fork: to walk it is to copy it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = path
    sys.argv = asked
    if code is None:
        runpy.run_module(asked[0], run_name="__main__", alter_sys=True)
    else:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
