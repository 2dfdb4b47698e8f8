"""Output folders in object storage: what is there is brought here, a command works on it as on any folder, and then it is published.

The objects of a run that is under way are marked as unfinished, and the mark that says otherwise is the last object to be written.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from guardkit.artifacts import fingerprint, parse_json, read_json, write_json
from guardkit.folders import LOCK, MARK, UNFINISHED, is_unfinished
from guardkit.local_copies import at_once, default_cache_dir, fetch_into
from guardkit.schema import InputError
from guardkit.storage import Item, check_url, delete, items, joined, local_path, read, upload, write
from guardkit.storage_errors import StorageError, shown
from guardkit.terminal import call_it

log = logging.getLogger(__name__)

_STATE = "state.json"
_MARK_BYTES = 64 << 20


def working_folder(url: str) -> Path:
    """Where a command works on an output folder in object storage: a folder of its own in the cache, or the path of a `file://` URL.

    Raises:
        InputError: it is no URL of a storage.
    """
    url = check_url("output_dir", url)
    folder = local_path(url)
    if folder is None:
        folder = Path(default_cache_dir()) / "outputs" / fingerprint(url)[:32] / url.rpartition("/")[2]
        call_it(folder, url)
    return folder


def published(folder: Path, url: str, *, last: Sequence[str] = (), replaced: Collection[str] = ()) -> None:
    """Uploads a finished folder.

    Args:
        folder: with everything that shall be there; its lock is left out.
        url: of the place. What else lies there stays.
        last: names of files that mean that all others are there: they are uploaded after those, and before the folder's mark.
        replaced: names of objects that were there before, and go where the folder has no file of that name.
    Raises:
        StorageError: an object cannot be written; the place is marked as unfinished then.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    ends = [name for name in (*last, MARK) if name in names]
    if MARK in names:
        mark = read_json(folder / MARK, "the mark of a finished run")
        write(joined(url, MARK), json.dumps(mark | {"state": UNFINISHED}, indent=2).encode())
    at_once(lambda name: upload(folder / name, joined(url, name)), [name for name in names if name not in ends])
    for name in ends[:-1]:
        upload(folder / name, joined(url, name))
    for name in sorted(set(replaced) - set(names)):
        delete(joined(url, name))
    if ends:
        upload(folder / ends[-1], joined(url, ends[-1]))


@contextmanager
def brought_here(url: str) -> Iterator[None]:
    """Around a run whose results go to object storage, which holds its `working_folder`: what is there is fetched, and what the run leaves is
    published when the block ends without an error. What a run that failed has done stays here, and the next one goes on with it.

    Raises:
        StorageError: it cannot be had or written, holds files without a mark, or was changed meanwhile.
    """
    folder = working_folder(url)
    if local_path(url) is not None:
        yield
        return
    state = folder.parent / _STATE
    before = items(url)
    check_owner(url, before)
    is_copy = not state.is_file() or read_json(state, "a note on an output folder", "delete it").get("listing") != _listing(before)
    if is_copy:
        _empty(folder)
        fetch_into(folder, before)
        write_json(state, {"url": url, "listing": _listing(before)})
    elif any(path.name != LOCK for path in folder.iterdir()):
        log.info("%s: what an earlier run did on this machine is still here", url)
    try:
        yield
    except BaseException:
        if is_copy and not is_unfinished(folder):  # refused: what lies here lies there too
            _leave(folder, state)
        else:
            log.warning("%s: nothing was written there; what was done so far is kept, and the same command on this machine finds it", url)
        raise
    if not (folder / MARK).is_file():  # nothing was claimed
        _leave(folder, state)
        return
    if _listing(items(url)) != _listing(before):
        raise StorageError(
            f"{shown(url)} was changed while this run was at work; its results are kept in {folder.parent}; choose another output_dir"
        )
    try:
        published(folder, url, replaced=[one.name for one in before])
    except BaseException:
        with suppress(InputError):  # what is there now is of this run, and less than what is here
            write_json(state, {"url": url, "listing": _listing(items(url))})
        raise
    _leave(folder, state)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _leave(folder: Path, state: Path) -> None:
    """Takes a working folder away, which nobody else has while its lock is held."""
    state.unlink(missing_ok=True)
    _empty(folder)
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
        folder.parent.rmdir()


def _listing(found: Sequence[Item]) -> str:
    return fingerprint([[one.name, one.size, one.version] for one in found])


def check_owner(url: str, found: Sequence[Item]) -> None:
    """Says of a place with objects that guardkit did not write what `folders.claim` says of such a folder, before any is fetched."""
    names = {one.name for one in found}
    if names and MARK not in names:
        shown_names = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise InputError(f"{shown(url)} holds objects that guardkit did not write ({shown_names}); choose another output_dir")
    if names:
        try:
            parse_json(read(joined(url, MARK), limit=_MARK_BYTES))
        except StorageError:
            raise
        except ValueError as error:
            raise InputError(
                f"{shown(joined(url, MARK))} is damaged ({error}); choose another output_dir, or delete the objects"
            ) from error
