"""Where a server of this package listens, who is warned of it, and how it ends: the pages and the service alike."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from guardkit.moderation.gate import LOOPBACK
from guardkit.schema import InputError

log = logging.getLogger(__name__)


def listener(host: str, port: int, *, what: str) -> socket.socket:
    """A socket that listens already.

    Args:
        host: the address.
        port: the port, or 0 for any free one.
        what: listens, for the message.
    Raises:
        InputError: the address cannot be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{what} cannot listen at host={host} port={port} ({reason}); choose another port, or port=0 for any free one"
        ) from error


def warn_of_others(host: str, *, may: str, instead: str) -> None:
    """Logs a warning where others than this machine reach a server that asks them for no key.

    Args:
        host: the address that is listened at.
        may: what they may do.
        instead: what keeps them out.
    """
    if host not in LOOPBACK:
        log.warning("whoever reaches host=%s may %s; %s", host, may, instead)


@contextmanager
def until_stopped() -> Iterator[None]:
    """The server ends at the first SIGINT or SIGTERM, and then sends it again: here it ends."""
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
