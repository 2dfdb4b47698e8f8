"""Keys to bytes, kept: one SQLite file for many readers and writers, or a process's own memory. What is inside is checked.

A process killed at any moment leaves the file whole. Each value lies beside a checksum of what the store is for, its key
and itself, so that a value that was changed, or moved to another key or another store, is found. No connection outlives the
work it was opened for: nothing is left open, whatever ends the work, and threads and forked processes need not be told. A
store that is pickled takes along where it is, and nothing of what it holds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from guardkit.schema import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")

BUSY_TIMEOUT_S = 60.0  # that another process may hold the file
_MAX_SQL_VARIABLES = 500
_READ_ONLY = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
# the tables of earlier versions have no checksums: what they hold is made anew, and their space used again
_TABLES = (
    "DROP TABLE IF EXISTS items",
    "DROP TABLE IF EXISTS about",
    "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS purpose (one INTEGER PRIMARY KEY CHECK (one = 1), inputs TEXT NOT NULL)",
)


class KeyValueStore:
    """Keys to bytes, on disk or in memory.

    `with store:` around a longer work keeps one connection open for it; without, each call opens and closes its own.

    A file that may only be read is used as it is; what it lacks is kept in memory, and a warning says so once.

    Args:
        folder: where the file is; it is made. None keeps everything in memory.
        name: of the SQLite file below it.
        about: what the stored bytes depend on besides their key. It is kept in the file in readable form, and a
            file that was made with other inputs is refused.
        place: the setting that says where such files are, for messages.

    Attributes:
        n_damaged: stored values so far that did not pass their check; they are not given out, and may be put anew.
    Raises:
        InputError: the file is damaged, was made with other inputs, or is held by another process.
    """

    def __init__(self, folder: Path | None, name: str, about: Mapping[str, Any], *, place: str = "cache_dir (or GUARDKIT_CACHE)") -> None:
        self.path, self._place = None if folder is None else Path(folder) / name, place
        self._about = json.dumps(about, sort_keys=True)
        self._seed = hashlib.sha256(_measured(self._about.encode()))
        self._memory: dict[str, bytes] = {}
        self._damaged: set[str] = set()
        self._n_reported = 0
        self._is_read_only = False
        self._connection: sqlite3.Connection | None = None
        self._inherited: sqlite3.Connection | None = None
        self._owner, self._lock, self._depth = os.getpid(), threading.RLock(), 0
        if self.path is not None:
            with self:
                pass

    @property
    def n_damaged(self) -> int:
        """See above."""
        return len(self._damaged)

    def __enter__(self) -> KeyValueStore:
        if self._owner != os.getpid():
            self._start_anew()
        with self._lock:
            if self._depth == 0 and self.path is not None:
                with self._explained(self.path):
                    self._connection = self._opened(self.path)
            self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        if self._owner != os.getpid() or self._depth == 0:
            return  # entered before a fork: the connection is the parent's
        with self._lock:
            self._depth -= 1
            if self._depth:
                return
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()
            if self.n_damaged > self._n_reported:
                n, self._n_reported = self.n_damaged - self._n_reported, self.n_damaged
                log.warning("%d stored value(s) of %s did not pass their check; they are made anew", n, self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "about": json.loads(self._about), "place": self._place, "machine": platform.node()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        path = state["path"]
        folder = None if path is None else of_this_machine(path.parent, state["machine"])
        self.__dict__.update(KeyValueStore(folder, "" if path is None else path.name, state["about"], place=state["place"]).__dict__)

    def get(self, keys: Iterable[str], parse: Callable[[bytes], T]) -> dict[str, T]:
        """The stored values of those keys that are there.

        Args:
            keys: wanted.
            parse: makes of a value what is wanted, and raises ValueError where it is none: it counts as damaged then.
        """
        return dict(self._sound(keys, parse))

    def known(self, keys: Iterable[str], parse: Callable[[bytes], Any]) -> set[str]:
        """Those of the keys whose values `get` would give; one value at a time is in memory."""
        return {key for key, _ in self._sound(keys, parse)}

    def put(self, items: Mapping[str, bytes]) -> None:
        """Stores values, all or none of them. A key that is already there keeps its value, unless that is damaged.

        Raises:
            InputError: the disk is full, or another process holds the file.
        """
        with self, self._lock:
            if self._connection is not None and not self._is_read_only:
                self._write(self._connection, items)
            if self.path is None or self._is_read_only:
                for key, value in items.items():
                    self._memory.setdefault(key, value)

    def held(self) -> dict[str, bytes]:
        """All that is in this process's memory."""
        return dict(self._memory)

    def __len__(self) -> int:
        with self, self._lock:
            if self._connection is None:
                return len(self._memory)
            with self._explained(self.path):
                (count,) = self._connection.execute("SELECT COUNT(*) FROM entries").fetchone()
            return int(count) + len(self._memory)

    def _sound(self, keys: Iterable[str], parse: Callable[[bytes], T]) -> Iterator[tuple[str, T]]:
        wanted = list(dict.fromkeys(keys))
        with self, self._lock:
            yield from ((key, parse(self._memory[key])) for key in wanted if key in self._memory)
            if self._connection is None:
                return
            wanted = [key for key in wanted if key not in self._memory]
            for start in range(0, len(wanted), _MAX_SQL_VARIABLES):
                part = wanted[start : start + _MAX_SQL_VARIABLES]
                marks = ",".join("?" * len(part))
                with (
                    self._explained(self.path),
                    closing(self._connection.execute(f"SELECT key, value, checksum FROM entries WHERE key IN ({marks})", part)) as rows,
                ):
                    for key, value, checksum in rows:
                        # SQLite keeps any type in any column
                        if isinstance(value, bytes) and checksum == self._checksum(key, value):
                            try:
                                parsed = parse(value)
                            except ValueError:
                                self._damaged.add(key)
                                continue
                            yield key, parsed
                        else:
                            self._damaged.add(key)

    def _write(self, connection: sqlite3.Connection, items: Mapping[str, bytes]) -> None:
        rows = {key: (key, value, self._checksum(key, value)) for key, value in items.items()}
        anew = [row for key, row in rows.items() if key in self._damaged]
        with self._explained(self.path):
            try:
                with connection:
                    connection.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?, ?)", rows.values())
                    connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", anew)
            except sqlite3.OperationalError as error:
                if not _is(error, _READ_ONLY):
                    raise
                self._give_up_writing()

    def _checksum(self, key: str, value: bytes) -> bytes:
        checksum = self._seed.copy()
        checksum.update(_measured(key.encode()))
        checksum.update(value)
        return checksum.digest()

    def _start_anew(self) -> None:
        """In a forked process. What came through the fork is the parent's: its connection must not even be closed here."""
        self._inherited, self._connection = self._connection, None
        self._owner, self._lock, self._depth = os.getpid(), threading.RLock(), 0

    def _opened(self, path: Path) -> sqlite3.Connection | None:
        """A connection whose tables are there; None where there is nothing yet and nothing can be written."""
        if not self._is_read_only:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return self._connected(path, "mode=rwc", _create)
            except OSError as error:
                if error.errno not in _NO_ACCESS:
                    raise InputError(f"{path.parent} cannot be made ({error.strerror}); choose another {self._place}") from error
            except sqlite3.OperationalError as error:
                if not _is(error, _READ_ONLY) or path.is_dir():
                    raise
            self._give_up_writing()
        if not _is_there(path):
            return None
        try:
            return self._connected(path, "mode=ro")
        except sqlite3.OperationalError as error:
            if not _is(error, _READ_ONLY):
                raise
        # SQLite may not make its shared index beside the file; what a writer changes meanwhile does not pass its check
        return self._connected(path, "mode=ro&immutable=1")

    def _give_up_writing(self) -> None:
        self._is_read_only = True
        log.warning("%s cannot be written: what it lacks is kept in memory; to keep it, choose another %s", self.path, self._place)

    def _connected(
        self, path: Path, mode: str, prepare: Callable[[sqlite3.Connection, str], None] | None = None
    ) -> sqlite3.Connection | None:
        # used by one thread at a time, under the lock
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            connection.text_factory = lambda raw: raw.decode(errors="replace")
            if not _has_tables(connection):
                if prepare is None:
                    connection.close()
                    return None
                prepare(connection, self._about)
            connection.execute("PRAGMA synchronous=NORMAL")
            found = connection.execute("SELECT inputs FROM purpose").fetchone()
        except BaseException:
            connection.close()
            raise
        if found != (self._about,):
            connection.close()
            shown = "nothing that can be told" if found is None else found[0]
            raise InputError(f"{path} holds results for {shown}, not for {self._about}; choose another {self._place}")
        return connection

    @contextmanager
    def _explained(self, path: Path | None) -> Iterator[None]:
        """Says of SQLite's errors what they mean and what to do."""
        try:
            yield
        except sqlite3.Error as error:
            if _is(error, _BUSY):
                hint = f"is held by another process ({error}); wait until that has ended, or choose another {self._place}"
            elif _is(error, (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)):
                hint = (
                    f"cannot be written ({error}); what it held is safe: free some space, or choose another {self._place}, "
                    "and run the same command again"
                )
            elif _is(error, _READ_ONLY):
                hint = f"cannot be opened ({error}); check its permissions, or choose another {self._place}"
            else:
                mend = f"choose another {self._place}" if self._is_read_only else "delete it, it will be made anew"
                hint = f"is damaged ({' '.join(str(error).split())}); {mend}"
            raise InputError(f"{path} {hint}") from error


def of_this_machine(folder: Path | None, machine: str) -> Path | None:
    """Where a worker keeps what a process on another machine keeps in a folder: no two machines may write to one file of SQLite.

    Args:
        folder: of that process; None: it keeps everything in memory.
        machine: that it runs on, as `platform.node()` names it.
    """
    here = platform.node()
    return folder if folder is None or machine == here else folder / f"on_{here}"


def _create(connection: sqlite3.Connection, about: str) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        if not _has_tables(connection):  # another process may have been quicker
            for statement in _TABLES:
                connection.execute(statement)
            connection.execute("INSERT INTO purpose VALUES (1, ?)", (about,))


def _has_tables(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE name IN ('entries', 'purpose')").fetchone() == (2,)


def _is(error: sqlite3.Error, codes: tuple[int, ...]) -> bool:
    # the low byte is the kind, the rest says more
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in codes


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be entered
        return False


def _measured(part: bytes) -> bytes:
    # with its length before it, so that no two series of parts are the same bytes
    return len(part).to_bytes(8, "big") + part
