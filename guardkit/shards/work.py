"""The same work on every shard, by whatever engine: what is done is noted last, so that a run that ends anyhow goes on where it was.

A shard's output is written whole under temporary names and renamed; then an entry of the ledger says what it was made from and what there
is. Workers write both, so that nothing hangs on the process that sends them work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from json import dumps
from typing import Any, Protocol

from guardkit.artifacts import fingerprint
from guardkit.checks import is_whole
from guardkit.engines.base import Engine, Put
from guardkit.progress import ticking
from guardkit.schema import InputError
from guardkit.shards.base import Shard
from guardkit.shards.output import Output
from guardkit.storage import unusable_name

log = logging.getLogger(__name__)

LEDGER = ".shards"  # below an output folder, until the run is finished
Entry = dict[str, Any]


class Work(Protocol):
    """What is done to a shard. It is sent to workers: it holds settings and places, and builds models when it is first asked to do something.

    Attributes:
        output: which every worker can write to.
    """

    output: Output

    def do(self, shard: Shard, tick: Callable[[int], None]) -> Entry:
        """Writes the shard's output, and gives plain JSON: counts (`given` among them), and `files`: name in the output -> bytes.
        With `unsettled` above 0 something may come out otherwise another time: a run that goes on does the shard again.

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
        output: of them.
        known: entries that are kept elsewhere, by number of the shard.

    Attributes:
        changed: names of shards that were done, and are others now.
    """

    def __init__(self, output: Output, known: Mapping[int, Entry] | None = None) -> None:
        self.output, self._known = output, dict(known or {})
        self.changed: list[str] = []

    def note(self, shard: Shard, entry: Entry) -> Entry:
        """Writes a shard's entry, after its output."""
        noted = {"shard": shard.name, "version": shard.version, "most": shard.most, **entry}
        with self.output.written(_name(shard)) as temporary:
            temporary.write_text(dumps({"checksum": fingerprint(noted), "entry": noted}), encoding="utf-8")
        return noted

    def find(self, shards: Sequence[Shard]) -> dict[int, Entry]:
        """By number, the entries of those shards whose output is there as it was written; the others are to be made."""
        sizes = self.output.sizes() if len(shards) > 1 else None
        noted = [shard for shard in shards if sizes is None or _name(shard) in sizes]
        entries = self._known | {
            shard.number: found["entry"]
            for shard, found in zip(noted, self.output.jsons([_name(shard) for shard in noted], "an entry of a shard"), strict=True)
            if found is not None and isinstance(found.get("entry"), dict) and found.get("checksum") == fingerprint(found["entry"])
        }
        return {shard.number: entry for shard in shards if self._is_whole(shard, entry := entries.get(shard.number, {}), sizes)}

    def _is_whole(self, shard: Shard, entry: Entry, sizes: Mapping[str, int] | None) -> bool:
        files = entry.get("files")
        if not isinstance(files, dict) or entry.get("unsettled"):
            return False
        if entry.get("shard") != shard.name or entry.get("version") != shard.version or entry.get("most") != shard.most:
            self.changed.append(shard.name)
            return False
        # its checksum keeps damage out, and not somebody who wrote it
        given = entry.get("given")
        if not is_whole(given) or given < 0 or (given and not files) or any(unusable_name(name) for name in files):
            return False
        if shard.n not in (None, given):
            return False
        for name, n_bytes in files.items():
            if (self.output.size(name) if sizes is None else sizes.get(name)) != n_bytes:
                log.warning("%s: %s is gone or not as it was written; %s is worked on anew", self.output, name, shard.name)
                return False
        return True


def _name(shard: Shard) -> str:
    return f"{LEDGER}/{shard.number:06d}.json"


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
        self.work.output.check_run()
        ledger = Ledger(self.work.output)
        # by a worker that ended before it could say so
        return ledger.find([shard]).get(shard.number) or ledger.note(shard, self.work.do(shard, self.tick))


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

    ledger = Ledger(work.output, known)
    done = ledger.find(shards)
    rest = [shard for shard in shards if shard.number not in done]
    if ledger.changed:
        said = "%s: %d of %d shards changed since they were worked on, the first is %s; they are worked on anew"
        log.warning(said, work.output, len(ledger.changed), len(shards), ledger.changed[0])
    if done:
        log.info("%s: goes on; %d of %d shards were done before", work.output, len(done), len(shards))
    if rest:
        given = fingerprint([[shard.name, shard.version, shard.most] for shard in shards])
        work.output.begin(LEDGER, given, elsewhere=not engine.is_here)
    task = ShardTask(work, torch.get_num_threads())
    total = None if any(shard.n is None for shard in rest) else sum(shard.n or 0 for shard in rest)
    with ticking(total=total, what=what) as tick:
        if engine.is_here:
            task.tick = tick
        for shard, entry in _each(engine, task, rest):
            done[shard.number] = entry
            if not engine.is_here:
                tick(entry["given"])
    left = [shard.name for shard in rest if shard.number not in done]
    if left:  # an engine of somebody else's
        raise InputError(
            f"engine={engine.name} left {len(left)} of {len(rest)} shards undone, the first is {left[0]}; it must yield every item; what was done stays"
        )
    return [done[shard.number] for shard in shards]


def _each(engine: Engine, task: ShardTask, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Entry]]:
    if not shards:
        return
    for place, entry in engine.run(task, shards):
        yield shards[place], entry


def _nothing(n: int) -> None:
    """Nobody asks how far it is."""
