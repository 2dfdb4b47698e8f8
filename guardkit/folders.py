"""One owner of an output folder: a lock, a mark that says whose it is and whether it is finished, and no leftovers.

A folder that a command writes to is claimed first. One process at a time holds it. The mark `.guardkit.json` names the
command, hashes of its settings, whether the run is finished, and the files it wrote; it is set to finished last. A
folder with files that guardkit did not write is refused.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from guardkit import __version__
from guardkit.artifacts import fingerprint, open_regular, remove_leftovers, write_json
from guardkit.schema import InputError

log = logging.getLogger(__name__)

MARK, LOCK = ".guardkit.json", ".lock"
FINISHED, UNFINISHED = "finished", "unfinished"
GOES_ON, BEGINS_ANEW = "goes on with the earlier run", "replaces the earlier run, which was finished"


@dataclass
class _Held:
    thread: int
    about: Mapping[str, Any] = field(default_factory=dict)
    on_claim: Callable[[], None] | None = None
    is_claimed: bool = False
    is_marked: bool = False  # something was written


_held: dict[Path, _Held] = {}  # folders that this process holds
_expected: dict[str, list[Path]] = {}  # what was not there before somebody else made it for a run of this process


def expect(folder: Path) -> None:
    """Notes what of a folder and those above it is not there yet, where something else than `locked` is going to make it."""
    _expected[os.path.abspath(folder)] = _missing(folder)


def _missing(folder: Path) -> list[Path]:
    """What is not there of a folder and those above it, the innermost first."""
    path = Path(os.path.abspath(folder))
    return [place for place in (path, *path.parents) if not place.exists()]


@contextmanager
def locked(folder: Path, *, about: Mapping[str, Any] | None = None, on_claim: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds a folder for this process, before it is known whether anything will be written there; `claim` follows inside.

    Where it does not, what was made for it (the folder, those above it, the lock) is taken away again.

    Args:
        folder: is made.
        about: further entries of the mark, in plain JSON types.
        on_claim: is called when the folder is claimed.
    Raises:
        InputError: another process or thread holds it.
    """
    from filelock import FileLock, Timeout  # here, because --help locks nothing and shall answer at once

    made = _expected.pop(os.path.abspath(folder), []) or _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"{folder} cannot be made: a file is there, or a link that leads nowhere; choose another output_dir") from error
    place = folder.resolve()
    busy = InputError(f"{folder} is being written by another process; wait for it, or choose another output_dir")
    if place in _held:
        raise busy
    is_new = not (place / LOCK).exists()
    lock = FileLock(place / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise busy from error
    _held[place] = _Held(threading.get_ident(), about or {}, on_claim)
    try:
        yield
    finally:
        if not _held.pop(place).is_marked:
            if is_new:
                (place / LOCK).unlink(missing_ok=True)  # while it is held: nobody else has it
            for one in made:
                with suppress(OSError):  # it holds something
                    one.rmdir()
        lock.release()


@contextmanager
def claim(
    folder: Path,
    command: str,
    settings: Any,
    *,
    replaces: Sequence[str] | None = None,
    recognise: Callable[[], Any] | None = None,
    check: Callable[[], object] | None = None,
    beside: Sequence[str] = (),
    keeps: bool = True,
) -> Iterator[None]:
    """Makes a folder this run's own until the block ends: locked, marked as unfinished, and as finished at the end.

    Args:
        folder: is made.
        command: that writes there; a folder of another command is refused.
        settings: what the results depend on, in plain JSON types.
        replaces: names or patterns of what the command writes: an earlier run is replaced as a whole, whatever its
            settings were. None: the command goes on with stored work, and only under the same settings.
        recognise: gives the settings that the files of a folder without a mark were made with; None: they are not ours.
        beside: names of files that people may bring along into a folder without a mark.
        check: looks further into what an earlier run left, and raises InputError where this run cannot go on with it.
        keeps: whether a command that goes on finds stored work of a finished run, too.
    Raises:
        InputError: another process holds the folder, it belongs to another command or other settings, or it holds files
            that guardkit did not write.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        held = _held.get(folder.resolve())
        if held is None or held.is_claimed or held.thread != threading.get_ident():
            stack.enter_context(locked(folder))
            held = _held[folder.resolve()]
        held.is_claimed = True
        wanted = hashed_settings(settings)
        before = _earlier(folder, command, recognise, beside)
        if before is not None and replaces is None and not _is_bare(folder):
            check_settings(folder, command, before, wanted)
        if check is not None:
            check()
        held.is_marked = True
        mark = {"command": command, **wanted, "guardkit": __version__, **held.about}
        earlier = (before or {}).get("files", [])
        write_json(folder / MARK, mark | {"state": UNFINISHED, "files": earlier})
        remove_leftovers(folder)
        if replaces is not None:
            _remove(folder, replaces, [name for name in earlier if isinstance(name, str)])
        if before is not None:
            same = "the same" if before.get("settings") == wanted["settings"] else "other"
            said = GOES_ON if replaces is None else f"replaces an earlier run with {same} settings"
            log.info("%s: %s", folder, BEGINS_ANEW if replaces is None and not keeps and before.get("state") == FINISHED else said)
        others = set(_visible(folder))
        if held.on_claim is not None:
            held.on_claim()
        yield
        remove_leftovers(folder)  # of workers that were killed meanwhile, while the run went on without them
        files = sorted({*_visible(folder)} - others) if replaces is not None else []
        write_json(folder / MARK, mark | {"state": FINISHED, "files": files})


def refuse_others(folder: Path, command: str, *, replaces: bool) -> None:
    """What `claim` will refuse whatever the settings are, asked before the long part of a command.

    Args:
        folder: may be missing.
        command: that is going to write there.
        replaces: it needs a mark to know an earlier run by.
    Raises:
        InputError: the folder belongs to another command, holds files that guardkit did not write, or cannot be made.
    """
    folder = Path(folder)
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    if not there.is_dir():
        raise InputError(f"{folder} cannot be made: {there} is a file; choose another output_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written: you may not write to {there}; choose another output_dir")
    if folder.is_dir():
        _earlier(folder, command, None if replaces else dict)


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What the mark of a folder says; None: it has none.

    Raises:
        InputError: the mark is damaged.
    """
    path = Path(folder) / MARK
    try:
        with open_regular(path) as file:
            mark = json.loads(file.read().decode("utf-8"))
        if not isinstance(mark, dict) or not isinstance(mark.get("files", []), list):
            raise ValueError("no mark of guardkit")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); choose another output_dir, or delete the folder") from error
    return mark


def hashed_settings(settings: Any) -> dict[str, Any]:
    """What a mark says of settings: a hash of all, and one of each by name, so that those that differ can be named."""
    by_name = settings if isinstance(settings, Mapping) else {}
    return {"settings": fingerprint(settings), "by_name": {str(name): fingerprint(value)[:12] for name, value in by_name.items()}}


def check_settings(place: object, command: str, mark: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Whether the results that a mark is of were made with the same settings.

    Args:
        place: of the results, for the message.
        command: that made them.
        mark: of theirs.
        wanted: from `hashed_settings`.
    Raises:
        InputError: they were not; it names which differ.
    """
    if mark.get("settings") == wanted["settings"]:
        return
    before = mark.get("by_name")  # earlier versions wrote none
    others = [name for name, value in wanted["by_name"].items() if before.get(name) != value] if isinstance(before, dict) else []
    made_with = f"another {', '.join(others)}" if others else "other settings"
    raise InputError(f"{place} holds results of guardkit {command} that were made with {made_with}; choose another output_dir")


def is_unfinished(folder: Path) -> bool:
    """Whether a run is at work in the folder, or was ended before its last file."""
    mark = read_mark(folder)
    return mark is not None and mark.get("state") != FINISHED


def _earlier(folder: Path, command: str, recognise: Callable[[], Any] | None, beside: Sequence[str] = ()) -> dict[str, Any] | None:
    """The mark of an earlier run of the command, written or recognised; None: there was none."""
    mark = read_mark(folder)
    advice = "choose another output_dir"
    strangers = [name for name in _visible(folder) if name not in beside and _has_files(folder / name)]
    if mark is None and strangers:
        found = recognise() if recognise is not None else None
        if found is None:
            shown = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
            # results of versions that left no mark are refused too, because nothing tells them from somebody's own files
            raise InputError(
                f"{folder} holds files that guardkit {command} did not write ({shown}); {advice}, or delete what an earlier version left"
            )
        mark = {"command": command, **hashed_settings(found)}
    if mark is not None and mark.get("command") != command:
        raise InputError(f"{folder} holds the results of guardkit {mark.get('command')}, not of {command}; {advice}")
    return mark


def _is_bare(folder: Path) -> bool:
    """Whether nothing lies in a folder but what is there before a run's first result: a wrong setting may have ended it."""
    settings = "hparams.yaml"  # of loggers
    own = {folder / MARK, folder / LOCK}
    return all(path.is_dir() or path in own or path.name == settings or path.parent == folder / ".hydra" for path in folder.rglob("*"))


def _visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def _has_files(path: Path) -> bool:
    return not path.is_dir() or any(not below.name.startswith(".") and not below.is_dir() for below in path.rglob("*"))


def _remove(folder: Path, patterns: Sequence[str], names: Sequence[str]) -> None:
    for name in _visible(folder):
        # names come from a mark, which may be somebody's: they mean themselves alone
        if name in names or any(fnmatch(name, pattern) for pattern in patterns):
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
