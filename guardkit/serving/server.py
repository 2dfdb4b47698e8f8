"""Runs the service until somebody ends it. Only this module knows uvicorn."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guardkit.checks import check_path, check_whole, is_list
from guardkit.moderation.gate import LOOPBACK, page_address
from guardkit.moderation.listening import listener, until_stopped
from guardkit.schema import InputError

log = logging.getLogger(__name__)

_MAX_KEY_BYTES = 4096
_SHUTDOWN_S = 3  # for requests under way


def serve(
    make: Callable[..., Any], *, host: str, port: int, allowed_hosts: Collection[str] | None, announce: Callable[[str], None]
) -> None:
    """Answers until SIGINT or SIGTERM; requests that are under way then have seconds to end. At SIGHUP guards are read again.

    Args:
        make: gives the application; is told the hosts it may answer to.
        host: the address to listen at.
        port: the port, or 0 for any free one.
        allowed_hosts: names that the service answers to; None: those of this machine where nobody else reaches it, else any.
        announce: called with the service's address once it answers.
    Raises:
        InputError: the address cannot be had, or FastAPI is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise InputError('the service needs FastAPI; install it with: pip install "guardkit[serve]"') from error
    check_whole("port", port, 0, 65535)
    if allowed_hosts is not None and not (is_list(allowed_hosts) and all(isinstance(one, str) for one in allowed_hosts)):
        raise InputError(f"allowed_hosts must be a list of names, as in allowed_hosts=[images.example.org], got {allowed_hosts!r}")
    with listener(host, port, what="the service") as heard:
        app = make(allowed_hosts=LOOPBACK if allowed_hosts is None and host in LOOPBACK else allowed_hosts)
        settings = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_SHUTDOWN_S)
        server = uvicorn.Server(settings)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it starts and stops; the command says so itself
        announce(page_address(host, heard.getsockname()[1]))
        with until_stopped(), _at_hangup(app.state.service.reload_quietly):
            server.run(sockets=[heard])


def read_key(path: object) -> str:
    """The key that a file holds, without the line's end.

    Raises:
        InputError: it cannot be read.
    """
    file = Path(check_path("key_file", path))
    try:
        with open(file, "rb") as opened:
            return opened.read(_MAX_KEY_BYTES).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"key_file={file} cannot be read ({reason}); give a file whose one line is the key") from error


@contextmanager
def _at_hangup(act: Callable[[], None]) -> Iterator[None]:
    """Acts in a thread: requests are answered meanwhile."""
    before = signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=act, name="guardkit-reload", daemon=True).start())
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
