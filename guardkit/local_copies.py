"""Copies of objects on this machine, for what must be a local file: weights, embeddings that are mapped, tables.

A copy is made once for each version of an object and shared by all processes of the user. It lies in the cache, under a name that
follows from URL, sizes and versions, and goes when room is needed for newer ones.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

from guardkit.artifacts import fingerprint, read_json, write_json, written
from guardkit.checks import check_path
from guardkit.schema import InputError
from guardkit.storage import Item, check_url, is_url, item, items, joined, local_path, opened, unusable_name
from guardkit.storage_errors import MissingError, StorageError, shown
from guardkit.terminal import call_it

T = TypeVar("T")

_ABOUT = "about.json"
_USUAL_GB = 100.0  # that copies may take; GUARDKIT_COPIES_GB sets another
_AT_ONCE = 8  # objects fetched at a time
_CHUNK = 1 << 20
_REST_S = 3600  # a copy that was used less long ago is not taken away: its files may still be opened by their names


def default_cache_dir() -> str:
    """GUARDKIT_CACHE, else guardkit's folder in the user's cache, else, without a home directory, a temporary one."""
    root = os.environ.get("GUARDKIT_CACHE")
    if root:
        return root
    try:
        return str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "guardkit")
    except RuntimeError:
        return str(own_temporary_folder())


def own_temporary_folder() -> Path:
    """A folder of this user's that nobody else may write to, the same for all of the user's processes."""
    folder = Path(tempfile.gettempdir()) / f"guardkit-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    except OSError:
        is_own = False
    if not is_own:
        raise InputError(
            f"there is no home directory, and {folder} cannot be used as a cache; set GUARDKIT_CACHE or cache_dir to a folder of your own"
        )
    return folder


def local(setting: str, place: object, *, only: Callable[[str], bool] | None = None) -> Path:
    """The path that a setting means: the one that it is, or the copy of the object, or of the objects below, that its URL names.

    Args:
        setting: for messages.
        place: a path or a URL.
        only: which objects of a folder are needed, by their names below it; None: all.
    Raises:
        InputError: no path and no URL, or nothing there under that URL, or not to be had.
    """
    if not is_url(place):
        return check_path(setting, place)
    url = check_url(setting, str(place))
    path = local_path(url)
    if path is not None:
        return path
    found = item(url)
    return local_folder(url, only=only) if found is None else _fetched(url, [found]) / found.name


def local_copy(url: str) -> Path:
    """The copy of an object. Raises StorageError where there is none, or it cannot be had."""
    path = local_path(url)
    if path is not None:
        return path
    url = check_url("the URL", url)
    found = item(url)
    if found is None:
        raise MissingError(f"{shown(url)} is not there; correct the URL")
    return _fetched(url, [found]) / found.name


def local_folder(url: str, *, only: Callable[[str], bool] | None = None) -> Path:
    """A folder with copies of the objects below a place, under their names.

    Args:
        url: of the place.
        only: which are needed, by their names; None: all.
    Raises:
        StorageError: there are none, they cannot be had, or one has a name that no file may have.
    """
    path = local_path(url)
    if path is not None:
        return path
    url = check_url("the URL", url)
    found = [one for one in items(url) if only is None or only(one.name)]
    if not found:
        raise MissingError(f"{shown(url)} is not there: no object of that name, and none that is needed below it; correct the URL")
    return _fetched(url, found, inside=url.rpartition("/")[2])


def url_of(path: Path) -> str | None:
    """The URL of the object that a file is a copy of; None: it is none that this process asked for."""
    for folder, url in _copies.items():
        if path == folder:
            return url
        if path.is_relative_to(folder):
            return joined(url, path.relative_to(folder).as_posix())
    return None


_copies: dict[Path, str] = {}


def fetch_into(folder: Path, found: Sequence[Item]) -> None:
    """Copies objects into a folder, under their names, several at once; files of the right size are there already.

    Raises:
        StorageError: one cannot be had, was changed since it was listed, or has a name that no file may have, or the disk has no room.
    """
    names = {one.name for one in found}
    for one in found:
        reason = unusable_name(one.name)
        if reason is None and any(str(above) in names for above in PurePosixPath(one.name).parents):
            reason = "its name is also that of a folder"
        if reason is not None:
            raise StorageError(f"{shown(one.url)} cannot be copied here ({reason}); rename it, or take it away")
    missing = [one for one in found if not _is_whole(folder / one.name, one.size)]
    folder.mkdir(parents=True, exist_ok=True)
    n_bytes, free = sum(one.size for one in missing), shutil.disk_usage(folder).free
    if n_bytes > free:
        raise StorageError(
            f"a copy of {shown(found[0].url)} and what lies beside it needs {n_bytes} bytes, {folder} has {free} left; make room, or set GUARDKIT_CACHE"
        )
    stopped = threading.Event()  # a command that is stopped does not wait for the rest of what is under way
    at_once(lambda one: _fetch(one, folder / one.name, stopped), missing, stopped)


def at_once(do: Callable[[T], object], all_of: Iterable[T], stopped: threading.Event | None = None) -> None:
    """Does something to each, several at a time. After the first failure, which is raised, none is begun any more, and `stopped` is set."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for done in [pool.submit(do, one) for one in all_of]:
                done.result()
        except BaseException:
            if stopped is not None:
                stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(one: Item, path: Path, stopped: threading.Event) -> None:
    with opened(one.url, version=one.version or None, ahead=True) as source, written(path) as temporary, open(temporary, "wb") as target:
        while not stopped.is_set() and (data := source.read(_CHUNK)):
            target.write(data)
        if target.tell() != one.size:
            raise StorageError(f"{shown(one.url)} gave {target.tell()} of {one.size} bytes; read it again, or copy it anew")


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _fetched(url: str, found: Sequence[Item], inside: str = "") -> Path:
    """The folder of the cache that holds copies of objects, each under its name below `inside`."""
    from filelock import FileLock  # here, because --help locks nothing and shall answer at once

    limit, n_bytes = _limit(), sum(one.size for one in found)
    if n_bytes > limit:
        raise StorageError(
            f"{shown(url)} has {n_bytes} bytes, copies here may take {limit:.0f}; choose fewer objects, or set GUARDKIT_COPIES_GB"
        )
    # what has no version cannot be known again
    versions = [[one.name, one.size, one.version or uuid.uuid4().hex] for one in found]
    root = Path(default_cache_dir()) / "objects"
    folder = root / fingerprint([url, versions])[:32]
    place = folder / (inside or found[0].name)
    _copies[place.resolve()] = _copies[place] = url
    call_it(place, url)
    is_new = False
    with FileLock(root / f"{folder.name}.lock", mode=0o600):
        if not (folder / _ABOUT).is_file() or not all(_is_whole(folder / inside / one.name, one.size) for one in found):
            fetch_into(folder / inside, found)
            write_json(folder / _ABOUT, {"url": url, "bytes": n_bytes})
            is_new = True
        os.utime(folder)
    if is_new:
        _make_room(root, limit, but=folder)
    return folder / inside


def _limit() -> float:
    given = os.environ.get("GUARDKIT_COPIES_GB") or _USUAL_GB
    try:
        limit = float(given)
        if not limit > 0:
            raise ValueError
    except ValueError:
        raise InputError(f"GUARDKIT_COPIES_GB must be a number above 0, got {given!r}") from None
    return limit * 1e9


def _make_room(root: Path, limit: float, but: Path) -> None:
    """Takes away the copies that were used least lately, until the others keep within the limit."""
    from filelock import FileLock, Timeout

    sizes: dict[Path, int] = {}
    for about in root.glob(f"*/{_ABOUT}"):
        with suppress(InputError, OSError, KeyError, TypeError, ValueError):
            sizes[about.parent] = int(read_json(about, "the note on a copy")["bytes"])
    total = sum(sizes.values())
    for folder in sorted(sizes, key=lambda folder: folder.stat().st_mtime):
        if total <= limit:
            return
        if folder == but or time.time() - folder.stat().st_mtime < _REST_S:
            continue
        with suppress(Timeout, OSError), FileLock(root / f"{folder.name}.lock", timeout=0):
            (folder / _ABOUT).unlink(missing_ok=True)  # first: what is half gone is no copy
            shutil.rmtree(folder)
            total -= sizes[folder]
