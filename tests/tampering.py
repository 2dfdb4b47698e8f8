"""Ways to damage what the project reads back from disk, for tests and for the campaign of `benchmarks`."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from guardkit.stores import KeyValueStore


def resign(path: Path, key: str, value: bytes) -> None:
    """Puts a value of one's own into a store, with the checksum that belongs to it."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM entries WHERE key = ?", (key,))
        (about,) = connection.execute("SELECT inputs FROM purpose").fetchone()
    KeyValueStore(path, json.loads(about)).put({key: value})


def stored(path: Path) -> dict[str, bytes]:
    """All that a store holds."""
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT key, value FROM entries"))


def swap(path: Path, one: str, other: str) -> None:
    """Puts the entry of one key, its checksum included, under the other."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE entries SET (value, checksum) = (SELECT value, checksum FROM entries WHERE key = ?) WHERE key = ?", (one, other)
        )
