"""What every store and every folder stands on: fingerprints, write-then-rename, a key-value file, and what ships.

A stored thing is named by a fingerprint of all its inputs. Files appear under their name only when complete. The
key-value store is one SQLite file: several processes may use it, and a process killed at any moment leaves it whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guardkit.schema import InputError

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = "guardkit:"
_BUSY_TIMEOUT_S = 60.0
_MAX_SQL_VARIABLES = 500


def fingerprint(inputs: Any) -> str:
    """A hash (64 hex digits) of a value made of plain JSON types; the order of keys does not matter."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it when the block ends without an error.

    with written(folder / "metrics.json") as temporary:
        temporary.write_text(text)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last, because writers such as matplotlib choose the format by it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what processes that were killed while they wrote left in a folder and below it.

    Only for a folder that nobody else writes to meanwhile.
    """
    for left in folder.rglob(".*.tmp*"):
        left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, complete or not at all. NaN is refused: a figure that cannot be computed is null."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def shipped(weights: str) -> Path | None:
    """The folder of a model that comes with guardkit, for `weights` like "guardkit:scenes_clip"; None for all others.

    Raises:
        InputError: guardkit brings none of that name.
    """
    if not weights.startswith(_SHIPPED):
        return None
    # a wheel carries the models inside the package, a checkout beside it
    root = next((path for path in (_PACKAGE / "_checkpoints", _PACKAGE.parent / "checkpoints") if path.is_dir()), None)
    names = sorted(path.name for path in root.iterdir() if path.is_dir()) if root else []
    name = weights.removeprefix(_SHIPPED)
    if root is None or name not in names:
        raise InputError(f"guardkit ships no model {name!r}; it ships {', '.join(names) or 'none'}")
    return root / name


class KeyValueStore:
    """Keys to bytes, on disk, for many readers and writers at once.

    Args:
        path: of the SQLite file; its folder is made.
        about: what the stored bytes depend on besides their key. It is kept in the file in readable form, and a
            file that was made with other inputs is refused.
    Raises:
        InputError: the file is not such a store, or was made with other inputs.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._local = threading.local()
        text = json.dumps(about, sort_keys=True)
        try:
            with self._connection() as connection:
                connection.execute("CREATE TABLE IF NOT EXISTS items (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
                connection.execute("CREATE TABLE IF NOT EXISTS about (one INTEGER PRIMARY KEY CHECK (one = 1), inputs TEXT NOT NULL)")
                connection.execute("INSERT OR IGNORE INTO about VALUES (1, ?)", (text,))
                (found,) = connection.execute("SELECT inputs FROM about").fetchone()
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path} cannot be used as a store ({error}); delete it, it will be made anew") from error
        if found != text:
            raise InputError(f"{self.path} holds results for {found}, not for {text}; delete it or choose another cache_dir")

    def get(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The stored values of those keys that are there."""
        return dict(self._select("key, value", keys))

    def known(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that are there; their values are not read."""
        return {key for (key,) in self._select("key", keys)}

    def put(self, items: Mapping[str, bytes]) -> None:
        """Stores values, all or none of them. A key that is already there keeps its value."""
        with self._connection() as connection:
            connection.executemany("INSERT OR IGNORE INTO items VALUES (?, ?)", items.items())

    def __len__(self) -> int:
        (count,) = self._connection().execute("SELECT COUNT(*) FROM items").fetchone()
        return int(count)

    def _select(self, columns: str, keys: Iterable[str]) -> Iterator[Any]:
        wanted = list(dict.fromkeys(keys))
        connection = self._connection()
        for start in range(0, len(wanted), _MAX_SQL_VARIABLES):
            part = wanted[start : start + _MAX_SQL_VARIABLES]
            marks = ",".join("?" * len(part))
            yield from connection.execute(f"SELECT {columns} FROM items WHERE key IN ({marks})", part)

    def _connection(self) -> sqlite3.Connection:
        # one connection a thread and process: SQLite connections must not be shared across either
        if getattr(self._local, "owner", None) != os.getpid():
            connection = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            self._local.connection, self._local.owner = connection, os.getpid()
        return self._local.connection
