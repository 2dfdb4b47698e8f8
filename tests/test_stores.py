"""The key-value store: what is inside is checked, a file that may only be read is read, and nothing is left open."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from conftest import open_files

from guardkit import stores
from guardkit.schema import InputError
from guardkit.stores import KeyValueStore

ABOUT = {"encoder": "a"}


def opened(path: Path, about: dict[str, str] = ABOUT) -> KeyValueStore:
    return KeyValueStore(path.parent, path.name, about)


def number(value: bytes) -> int:
    return int(value)


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


@pytest.fixture
def filled(tmp_path):
    path = tmp_path / "s.sqlite"
    opened(path).put({"a": b"1", "b": b"2", "c": b"3"})
    return path


# --- what is inside -----------------------------------------------------------------------------------------------------


def test_a_value_once_stored_stays(filled):
    store = opened(filled)
    store.put({"a": b"4", "d": b"5"})
    assert store.get(["a", "b", "e"], number) == {"a": 1, "b": 2}
    assert store.known(["d", "e"], number) == {"d"}
    assert len(store) == 4
    assert store.n_damaged == 0


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE entries SET value = CAST('7' AS BLOB) WHERE key = 'a'",
        "UPDATE entries SET (value, checksum) = (SELECT value, checksum FROM entries WHERE key = 'b') WHERE key = 'a'",
        "UPDATE entries SET value = 1 WHERE key = 'a'",
        "UPDATE entries SET value = '1' WHERE key = 'a'",
        "UPDATE entries SET checksum = 0 WHERE key = 'a'",
    ],
)
def test_a_changed_value_is_found_and_made_anew(filled, caplog, tampering):
    change(filled, tampering)
    store = opened(filled)
    with caplog.at_level(logging.WARNING):
        assert store.get(["a", "b"], number) == {"b": 2}
    assert store.n_damaged == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"1 stored value(s) of {filled} did not pass their check; they are made anew"
    ]
    store.put({"a": b"1"})
    again = opened(filled)
    assert again.get(["a", "b"], number) == {"a": 1, "b": 2}
    assert again.n_damaged == 0


def test_a_value_from_a_store_with_another_purpose_is_found(filled, tmp_path):
    other = tmp_path / "other.sqlite"
    opened(other, {"encoder": "b"}).put({"a": b"9"})
    change(filled, f"ATTACH '{other}' AS other", "REPLACE INTO entries SELECT * FROM other.entries")
    store = opened(filled)
    assert store.known(["a", "b"], number) == {"b"}


def test_a_value_that_does_not_parse_counts_as_damaged(tmp_path):
    store = opened(tmp_path / "s.sqlite")
    store.put({"a": b"1", "b": b"one"})
    with store:
        assert store.get(["a", "b"], number) == {"a": 1}
        assert store.known(["a", "b"], number) == {"a"}
    assert store.n_damaged == 1
    store.put({"b": b"2"})
    assert store.get(["b"], number) == {"b": 2}


@pytest.mark.parametrize("name", ["a?b#c%20 ü", "x\ny", os.fsdecode(b"\xff\xfe"), "mode=ro&immutable=1", "'"], ids=ascii)
def test_any_path_works(tmp_path, name):
    opened(tmp_path / name / "s.sqlite").put({"a": b"1"})
    assert opened(tmp_path / name / "s.sqlite").get(["a"], number) == {"a": 1}
    assert [path.name for path in (tmp_path / name).iterdir()] == ["s.sqlite"]


def test_in_memory_it_is_the_same(tmp_path):
    store = KeyValueStore(None, "s.sqlite", ABOUT)
    store.put({"a": b"1", "b": b"2"})
    store.put({"a": b"3"})
    assert store.get(["a", "c"], number) == {"a": 1}
    assert store.known(["b", "c"], number) == {"b"}
    assert len(store) == 2


def test_what_an_earlier_version_stored_is_made_anew(tmp_path):
    path = tmp_path / "s.sqlite"
    change(
        path,
        "PRAGMA journal_mode=WAL",
        "CREATE TABLE items (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
        "CREATE TABLE about (one INTEGER PRIMARY KEY CHECK (one = 1), inputs TEXT NOT NULL)",
        'INSERT INTO about VALUES (1, \'{"encoder": "a"}\')',
        "INSERT INTO items VALUES ('a', CAST('1' AS BLOB))",
    )
    store = opened(path)
    assert store.get(["a"], number) == {}
    store.put({"a": b"2"})
    assert opened(path).get(["a"], number) == {"a": 2}


# --- three things that may be wrong with a file, and what to do ---------------------------------------------------------


def test_a_damaged_file_may_be_deleted(tmp_path, filled):
    (tmp_path / "edits.sqlite").write_bytes(b"this is no database, but long enough to be taken for one" * 20)
    with pytest.raises(InputError, match=r"edits.sqlite is damaged \(file is not a database\); delete it, it will be made anew"):
        opened(tmp_path / "edits.sqlite")
    data = bytearray(filled.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    filled.write_bytes(data)
    with pytest.raises(InputError, match=r"is damaged \(.*\); delete it"):
        opened(filled).get(["a"], number)


def test_a_file_with_another_purpose_is_sound(filled):
    with pytest.raises(InputError, match=r'holds results for \{"encoder": "a"\}, not for \{"encoder": "b"\}; choose another cache_dir'):
        opened(filled, {"encoder": "b"})


def test_a_file_that_another_process_holds(filled, monkeypatch):
    monkeypatch.setattr(stores, "BUSY_TIMEOUT_S", 0.05)
    with closing(sqlite3.connect(filled, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        store = opened(filled)
        with pytest.raises(InputError, match=r"is held by another process \(database is locked\); wait .*choose another cache_dir"):
            store.put({"d": b"4"})
        other.execute("ROLLBACK")
    store.put({"d": b"4"})
    assert store.get(["d"], number) == {"d": 4}


def test_a_full_disk_is_named_and_what_was_stored_is_safe(filled):
    store = opened(filled)
    with store:
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(
            InputError, match=r"s.sqlite cannot be written \(database or disk is full\); what it held is safe: free some space"
        ):
            store.put({str(i): bytes(5000) for i in range(20)})
    assert store.get(["a", "0"], number) == {"a": 1}


def test_a_cache_that_may_only_be_read_is_read(shared, caplog):
    folder, become_a_guest = shared
    path = folder / "cache" / "s.sqlite"
    opened(path).put({"a": b"1"})
    before = path.read_bytes()
    become_a_guest()
    with caplog.at_level(logging.WARNING):
        store = opened(path)
        assert store.get(["a", "b"], number) == {"a": 1}
        store.put({"b": b"2"})
        assert store.get(["a", "b"], number) == {"a": 1, "b": 2}
        assert store.known(["a", "b", "c"], number) == {"a", "b"}
    assert len(caplog.records) == 1
    assert "cannot be written: what it lacks is kept in memory; to keep it, choose another cache_dir (or GUARDKIT_CACHE)" in caplog.text
    assert sorted(item.name for item in path.parent.iterdir()) == ["s.sqlite"]
    assert path.read_bytes() == before


def test_where_nothing_can_be_written_everything_is_kept_in_memory(shared, caplog):
    folder, become_a_guest = shared
    become_a_guest()
    store = opened(folder / "cache" / "s.sqlite")
    store.put({"a": b"1"})
    assert store.get(["a"], number) == {"a": 1}
    assert caplog.text.count("cannot be written") == 1


def test_a_file_alone_may_be_read_only(shared, caplog):
    folder, become_a_guest = shared
    path = folder / "s.sqlite"
    opened(path).put({"a": b"1"})
    become_a_guest()
    os.seteuid(os.getuid())
    folder.chmod(0o777)
    if os.geteuid() == 0:
        os.seteuid(65534)
    store = opened(path)
    store.put({"b": b"2"})
    assert store.get(["a", "b"], number) == {"a": 1, "b": 2}
    assert caplog.text.count("cannot be written") == 1


def test_a_cache_below_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be made .*choose another cache_dir"):
        opened(tmp_path / "file" / "s.sqlite")


# --- nothing is left open -----------------------------------------------------------------------------------------------


def interrupted(value: bytes) -> int:
    raise KeyError("interrupted")


def test_no_connection_outlives_its_work_whoever_opened_it(filled, recwarn):
    store = opened(filled)
    ready, go_on = threading.Event(), threading.Event()

    def work():
        with store:
            store.get(["a"], number)
            ready.set()
            go_on.wait()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    with pytest.raises(KeyError), store:
        store.get(["a"], interrupted)
    assert str(filled) in open_files()  # for the thread
    go_on.set()
    thread.join()
    assert not any(name.startswith(str(filled)) for name in open_files())
    gc.collect()
    assert not [one for one in recwarn if one.category is ResourceWarning]


def in_a_child(store, results):
    results.put(store.get(["a"], number))
    store.put({"child": b"5"})


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_process_opens_its_own(filled):
    store = opened(filled)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with store:
        child = context.Process(target=in_a_child, args=(store, results))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert results.get() == {"a": 1}
        assert store.get(["child"], number) == {"child": 5}
    results.close()


def test_a_pickled_store_is_opened_where_it_is_and_on_another_machine_beside_it(tmp_path, monkeypatch):
    store = KeyValueStore(tmp_path, "a.sqlite", {"format": 1})
    store.put({"k": b"v"})
    sent = pickle.dumps(store)
    assert pickle.loads(sent).get(["k"], bytes) == {"k": b"v"}
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    there = pickle.loads(sent)
    there.put({"k": b"w"})
    assert there.path == tmp_path / "on_elsewhere/a.sqlite"
    assert (there.get(["k"], bytes), store.get(["k"], bytes)) == ({"k": b"w"}, {"k": b"v"})
