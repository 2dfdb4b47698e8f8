"""Ctrl-C and SIGTERM end every command within seconds, whatever its threads and libraries are doing."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from guardkit.terminal import complain

GRACE_S = 6.0  # to close stores and cancel what waits, before the process is ended
_STOPPED = "stopped; what was finished is kept"
_NOTED_S = 1.0
_received: list[int] = []
_noted = threading.Event()  # a signal arrived, whoever handles it


def was_stopped() -> bool:
    """Whether a signal asked this process to end."""
    return bool(_received)


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM is as Ctrl-C: KeyboardInterrupt in the main thread. A process that does not end by itself is ended.

    A signal that the process was started to ignore, as `command &` of a shell script does with SIGINT, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    _noted.clear()
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGTERM] == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt)
    if before[signal.SIGINT] == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    # the interpreter writes a signal's number there at once, even where the main thread is busy outside Python
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    is_over = threading.Event()
    threading.Thread(target=_watch, args=(ours, is_over), name="guardkit-signals", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        signal.set_wakeup_fd(descriptor)
        for one, handler in before.items():
            signal.signal(one, handler)
        theirs.close()


def is_of_signal(ended: SystemExit) -> bool:
    """Whether SIGTERM came while a library had its own handler for it, as Ray does while it starts, which ends the process without a word."""
    if ended.code != signal.SIGTERM:
        return False
    _noted.wait(_NOTED_S)  # the thread that is told of signals may not have had its turn
    if _noted.is_set() and not _received:
        _received.append(signal.SIGTERM)
    return was_stopped()


def end_stopped() -> None:
    """Ends the process after a signal: says so, ends its children, and waits for no thread. Never returns."""
    for one in (signal.SIGINT, signal.SIGTERM):
        with suppress(ValueError):  # not the main thread
            signal.signal(one, signal.SIG_IGN)
    code = 128 + (_received[0] if _received else signal.SIGINT)
    with suppress(Exception):
        complain(_STOPPED)
        sys.stdout.flush()
    for child in _children():
        with suppress(OSError):
            os.kill(child, signal.SIGTERM)
    if any(thread is not threading.current_thread() and not thread.daemon and thread.is_alive() for thread in threading.enumerate()):
        os._exit(code)  # the interpreter would wait for threads that are at work
    sys.exit(code)


def _interrupt(number: int, frame: Any) -> None:  # noqa: ARG001
    _received.append(number)
    raise KeyboardInterrupt


def _watch(signals: socket.socket, is_over: threading.Event) -> None:
    with signals:
        while received := signals.recv(1):
            if received[0] in (signal.SIGINT, signal.SIGTERM):
                _noted.set()
                if not is_over.wait(GRACE_S):
                    _received.append(received[0])
                    end_stopped()
                return


def _children() -> list[int]:
    """Processes that this one started; where the system does not tell, those of multiprocessing."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError, ValueError):
            found |= {int(number) for number in path.read_text(encoding="ascii").split()}
    if "multiprocessing" in sys.modules:
        import multiprocessing

        found |= {child.pid for child in multiprocessing.active_children() if child.pid is not None}
    return sorted(found)
