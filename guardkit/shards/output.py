"""Where shards go: a folder that all workers share, or a place in object storage. Files and objects appear whole or not at all."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from json import dumps
from pathlib import Path
from typing import Any

from guardkit import __version__
from guardkit.artifacts import parse_json, read_json, written
from guardkit.folders import BEGINS_ANEW, FINISHED, GOES_ON, MARK, UNFINISHED, check_settings, claim, hashed_settings, refuse_others
from guardkit.publishing import check_owner
from guardkit.schema import InputError
from guardkit.storage import check_url, delete, is_url, item, items, joined, local_path, opened, read, unusable_name, write
from guardkit.storage import written as object_written
from guardkit.storage_errors import MissingError, shown
from guardkit.terminal import call_it

log = logging.getLogger(__name__)

_AT_ONCE = 16  # objects that are asked for at a time
_JSON_BYTES = 256 << 20
_CHUNK = 8 << 20


_RUN = "run.json"  # below the ledger: whose workers may write


class Output:
    """A folder or a place in object storage.

    Workers of a run that was killed may live on, where an engine has them elsewhere. They are let go on as long as the next run does the same work: what
    they make of inputs as they were before, or for a folder that is finished, must not be written.

    Args:
        place: a path, or a URL.
    """

    def __init__(self, place: str | Path) -> None:
        self._run: tuple[str, str] | None = None
        path = local_path(check_url("output_dir", str(place))) if is_url(place) else Path(place).expanduser()
        self.folder: Path | None = path
        self.url = "" if path is not None else check_url("output_dir", str(place))

    def __str__(self) -> str:
        return str(self.folder) if self.folder is not None else shown(self.url)

    @contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """Gives a path on this machine to write to; the file is there when the block ends without an error.

        Raises:
            InputError: the run that this belongs to is over, see `begin`.
        """
        self.check_run()
        with written(self.folder / name) if self.folder is not None else object_written(joined(self.url, name)) as temporary:
            yield temporary
            self.check_run()

    def begin(self, below: str, work: str, *, elsewhere: bool) -> None:
        """Begins a run, or goes on with one. Workers of earlier ones, which have copies of this, write no more where they did other work.

        Args:
            below: of what is kept until the run is over, which it is when that is cleared.
            work: says what is done, of which inputs.
            elsewhere: whether there are workers that may outlive this process.
        """
        self._run, name = None, f"{below}/{_RUN}"
        before = next(self.jsons([name], "the mark of a run"))
        is_same = before is not None and before.get("work") == work
        if not elsewhere:
            if not is_same:
                self.delete(name)
            return
        run = str(before.get("run")) if before is not None and is_same else uuid.uuid4().hex
        with self.written(name) as temporary:
            temporary.write_text(dumps({"run": run, "work": work}), encoding="utf-8")
        self._run = name, run

    def check_run(self) -> None:
        """Raises InputError where the run that this belongs to is over, or another one was begun since."""
        if self._run is None:
            return
        name, run = self._run
        found = next(self.jsons([name], "the mark of a run"))
        if found is None or found.get("run") != run:
            raise InputError(f"{self}: this run is over, or another one works there now; nothing more is written by this one")

    def size(self, name: str) -> int | None:
        """In bytes; None: it is not there."""
        if self.folder is None:
            found = item(joined(self.url, name))
            return None if found is None else found.size
        try:
            return (self.folder / name).stat().st_size
        except OSError:
            return None

    def sizes(self, below: str = "") -> dict[str, int]:
        """Of all that is there, by name; `below` a folder in it."""
        if self.folder is None:
            place = joined(self.url, below) if below else self.url
            # a name that no file may have is none of ours, and cannot be asked for
            return {f"{below}/{one.name}" if below else one.name: one.size for one in items(place) if not unusable_name(one.name)}
        found: dict[str, int] = {}
        for path in (self.folder / below).rglob("*"):
            with suppress(FileNotFoundError):  # a worker of an earlier run has just renamed it
                if path.is_file():
                    found[path.relative_to(self.folder).as_posix()] = path.stat().st_size
        return found

    def json(self, name: str, what: str) -> dict[str, Any]:
        """The JSON object that a file holds. Raises InputError where it holds none, MissingError where it is not there."""
        if self.folder is not None:
            return read_json(self.folder / name, what)
        try:
            value = parse_json(read(joined(self.url, name), limit=_JSON_BYTES))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{shown(joined(self.url, name))} is damaged ({error}), it should be {what}; delete it") from error
        if not isinstance(value, dict):
            raise InputError(f"{shown(joined(self.url, name))} should be {what}, and holds none; delete it")
        return value

    def jsons(self, names: Sequence[str], what: str) -> Iterator[dict[str, Any] | None]:
        """Several of them, in order; None: there is none that is whole."""

        def one(name: str) -> dict[str, Any] | None:
            try:
                return self.json(name, what)
            except MissingError:
                return None
            except InputError:
                if self.folder is None and self.size(name) is None:
                    raise
                return None  # damaged

        if self.folder is not None:
            yield from map(one, names)
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from pool.map(one, names)

    @contextmanager
    def here(self, names: Sequence[str]) -> Iterator[list[Path]]:
        """Files on this machine with the bytes of those, for as long as the block lasts."""
        if self.folder is not None:
            yield [self.folder / name for name in names]
            return

        def fetch(name: str) -> Path:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened(joined(self.url, name), ahead=True) as source, open(path, "wb") as target:
                while data := source.read(_CHUNK):
                    target.write(data)
            return path

        with tempfile.TemporaryDirectory(prefix="guardkit-") as folder, ThreadPoolExecutor(_AT_ONCE) as pool:
            call_it(Path(folder), shown(self.url))  # what is wrong with a file is to be mended there
            yield list(pool.map(fetch, names))

    def delete(self, name: str) -> None:
        """Takes it away; nothing happens where it is not there."""
        if self.folder is None:
            delete(joined(self.url, name))
        else:
            (self.folder / name).unlink(missing_ok=True)

    def clear(self, below: str) -> None:
        """Takes away all below a folder in it, and the folder."""
        self._run = None
        self.delete(f"{below}/{_RUN}")  # first: nothing comes after it
        for name in self.sizes(below):
            self.delete(name)
        if self.folder is not None:
            shutil.rmtree(self.folder / below, ignore_errors=True)

    def check_owner(self, command: str) -> None:
        """Before the long part of a command, what `claimed` refuses whatever the settings are. Raises InputError."""
        if self.folder is not None:
            refuse_others(self.folder, command, replaces=False)
        else:
            check_owner(self.url, items(self.url))

    @contextmanager
    def claimed(
        self,
        command: str,
        settings: Mapping[str, Any],
        *,
        recognise: Callable[[], Any] | None = None,
        keeps: bool = True,
    ) -> Iterator[None]:
        """Makes it this run's own until the block ends, see `folders.claim`; a run goes on with what one with the same settings left.

        Object storages have no locks. Two runs at once with the same settings do some work twice, and write the same bytes; one with other
        settings is refused.

        Raises:
            InputError: it belongs to another command or other settings, or holds files that guardkit did not write.
        """
        if self.folder is not None:
            with claim(self.folder, command, settings, recognise=recognise, keeps=keeps):
                yield
            return
        there = items(self.url)
        check_owner(self.url, there)
        wanted = hashed_settings(settings)
        if any(one.name == MARK for one in there):
            mark = self.json(MARK, "the mark of a run")
            if mark.get("command") != command:
                raise InputError(f"{self} holds the results of guardkit {mark.get('command')}, not of {command}; choose another output_dir")
            check_settings(self, command, mark, wanted)
            log.info("%s: %s", self, GOES_ON if keeps or mark.get("state") != FINISHED else BEGINS_ANEW)
        self._mark({"command": command, **wanted, "guardkit": __version__, "state": UNFINISHED, "files": []})
        yield
        self._mark({"command": command, **wanted, "guardkit": __version__, "state": FINISHED, "files": []})

    def _mark(self, mark: Mapping[str, Any]) -> None:
        write(joined(self.url, MARK), (dumps(mark, indent=2) + "\n").encode())
