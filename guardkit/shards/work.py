"""The same work on every shard, by whatever engine: what is done is noted last, so that a run that ends anyhow goes on where it was.

A shard's output is written whole under temporary names and renamed; then an entry of the ledger says what it was made from and what there
is. Workers write both, so that nothing hangs on the process that sends them work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from guardkit.artifacts import read_json, write_json
from guardkit.engines.base import Engine, Put
from guardkit.progress import ticking
from guardkit.schema import InputError
from guardkit.shards.inputs import Shard

log = logging.getLogger(__name__)

LEDGER = ".shards"  # below an output folder, until the run is finished
Entry = dict[str, Any]


class Work(Protocol):
    """What is done to a shard. It is sent to workers: it holds settings and places, and builds models when it is first asked to do something.

    Attributes:
        folder: of the output, which every worker can write to.
    """

    folder: Path

    def do(self, shard: Shard, tick: Callable[[int], None]) -> Entry:
        """Writes the shard's output, and gives plain JSON: counts (`given` among them), and `files`: path below the folder -> bytes.

        Args:
            shard: to be read.
            tick: is told, from time to time, how many more inputs are done.
        Raises:
            InputError: it cannot be done, whoever tries.
        """
        ...


class Ledger:
    """Which shards are done.

    Args:
        folder: of the output.
        known: entries that are kept elsewhere, by number of the shard.

    Attributes:
        changed: names of shards that were done, and are others now.
    """

    def __init__(self, folder: Path, known: Mapping[int, Entry] | None = None) -> None:
        self.folder, self._known = Path(folder), dict(known or {})
        self.changed: list[str] = []

    def _path(self, number: int) -> Path:
        return self.folder / LEDGER / f"{number:06d}.json"

    def note(self, shard: Shard, entry: Entry) -> Entry:
        """Writes a shard's entry, after its output."""
        noted = {"shard": shard.name, "version": shard.version, "most": shard.most, **entry}
        write_json(self._path(shard.number), noted)
        return noted

    def find(self, shard: Shard) -> Entry | None:
        """The entry of a shard whose output is there as it was written; None: it is to be made."""
        entry = self._known.get(shard.number)
        if self._path(shard.number).is_file():
            with suppress(InputError):  # damaged: the shard is made anew
                entry = read_json(self._path(shard.number), "an entry of a shard")
        if entry is None or not isinstance(entry.get("files"), dict):
            return None
        if entry.get("shard") != shard.name or entry.get("version") != shard.version or entry.get("most") != shard.most:
            self.changed.append(shard.name)
            return None
        damaged = [name for name, n_bytes in entry["files"].items() if _size(self.folder / name) != n_bytes]
        if damaged:
            log.warning("%s: %s is gone or not as it was written; %s is worked on anew", self.folder, damaged[0], shard.name)
            return None
        return entry


class ShardTask:
    """Work on one shard at a time, for an engine.

    Args:
        work: see there.
        n_threads: of torch, in every worker: sums in another order are other numbers, in the last bits.

    Attributes:
        tick: is told of inputs that are done; in this process only.
    """

    def __init__(self, work: Work, n_threads: int) -> None:
        self.work, self.n_threads = work, n_threads
        self.tick: Callable[[int], None] = _nothing

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tick": _nothing}

    def with_parts(self, put: Put) -> ShardTask:
        """See `guardkit.engines.base.Put`; work that names no parts stays as it is."""
        change = getattr(self.work, "with_parts", None)
        return self if change is None else ShardTask(change(put), self.n_threads)

    def __call__(self, shard: Shard) -> Entry:
        import torch

        if torch.get_num_threads() != self.n_threads:
            torch.set_num_threads(self.n_threads)
        ledger = Ledger(self.work.folder)
        # by a worker that ended before it could say so
        return ledger.find(shard) or ledger.note(shard, self.work.do(shard, self.tick))


def work_on(work: Work, shards: Sequence[Shard], engine: Engine, *, what: str, known: Mapping[int, Entry] | None = None) -> list[Entry]:
    """Sees to it that the work is done on every shard; what was done by an earlier run is passed over.

    Args:
        work: on each.
        shards: numbered from 0, in order.
        engine: does it.
        what: is being done, for the progress.
        known: see `Ledger`.
    Returns:
        An entry a shard, in order.
    Raises:
        InputError: what the work or the engine raises. What was done stays.
    """
    import torch

    ledger = Ledger(work.folder, known)
    done = {shard.number: entry for shard in shards if (entry := ledger.find(shard)) is not None}
    rest = [shard for shard in shards if shard.number not in done]
    if ledger.changed:
        said = "%s: %d of %d shards changed since they were worked on, the first is %s; they are worked on anew"
        log.warning(said, work.folder, len(ledger.changed), len(shards), ledger.changed[0])
    if done:
        log.info("%s: goes on; %d of %d shards were done before", work.folder, len(done), len(shards))
    task = ShardTask(work, torch.get_num_threads())
    total = None if any(shard.n is None for shard in rest) else sum(shard.n or 0 for shard in rest)
    with ticking(total=total, what=what) as tick:
        if engine.is_here:
            task.tick = tick
        for shard, entry in _each(engine, task, rest):
            done[shard.number] = entry
            if not engine.is_here:
                tick(entry["given"])
    return [done[shard.number] for shard in shards]


def _each(engine: Engine, task: ShardTask, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Entry]]:
    if not shards:
        return
    for place, entry in engine.run(task, shards):
        yield shards[place], entry


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _nothing(n: int) -> None:
    """Nobody asks how far it is."""
