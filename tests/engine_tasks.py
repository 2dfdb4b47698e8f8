"""Tasks for engines, in a module of their own: a worker that imports it imports nothing heavy, and begins soon."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from guardkit.schema import InputError


class Full:
    """A task that finds no room."""

    def __call__(self, item):
        raise OSError(28, "No space left on device")


class Marked:
    """A task that leaves a mark of each call, ends its worker the first times that it is given a bad item, and takes a minute over a slow one."""

    def __init__(self, folder, bad=(), times=1, mistake=False, slow=None):
        self.folder, self.bad, self.times, self.mistake, self.slow = Path(folder), bad, times, mistake, slow

    def __call__(self, item):
        calls = len(list(self.folder.glob(f"{item}_*")))
        (self.folder / f"{item}_{calls}_{os.getpid()}").touch()
        if item == self.slow:
            time.sleep(60)
        if item in self.bad and calls < self.times:
            if self.mistake:
                raise InputError("the input is none; give another")
            os.kill(os.getpid(), signal.SIGKILL)
        return item.upper()


class Part:
    """An editor that says what a user did wrong, or ends its process."""

    name, config = "part", {"editor": "part"}

    def __init__(self, mistake):
        self.mistake = mistake

    def edit(self, requests):
        if self.mistake:
            raise InputError("no {weights}; give some")
        os.kill(os.getpid(), signal.SIGKILL)


class Asking:
    """A task with an editor."""

    def __init__(self, editor):
        self.editor = editor

    def with_parts(self, put):
        return Asking(put("editor", self.editor))

    def __call__(self, item):
        return self.editor.edit([item])
