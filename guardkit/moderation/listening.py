"""Where a server of this package listens, and how it ends: the review page and the service alike."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from guardkit.schema import InputError


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


@contextmanager
def until_stopped() -> Iterator[None]:
    """The server ends at the first SIGINT or SIGTERM, and then sends it again: here it ends."""
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
