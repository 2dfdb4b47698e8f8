"""Embedding and judging a benchmark's images on an engine, before they are scored: what comes of a shard is put into the stores that scoring
reads from, so that figures are the same as without, to the last digit."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from guardkit.artifacts import fingerprint, write_table
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.engines.base import Engine, Put
from guardkit.evaluation.judgments import JudgmentStore
from guardkit.folders import LOCK
from guardkit.reading import read_table
from guardkit.schema import UNLABELLED, Content, ImageError, ImageGuard, InputError, Record
from guardkit.shards.base import Given, Shard
from guardkit.shards.output import Output
from guardkit.shards.work import LEDGER, Entry, work_on

log = logging.getLogger(__name__)

SHARD_IMAGES = 256
_SCHEMA = pa.schema([("by", pa.string()), ("key", pa.string()), ("value", pa.binary())])
_MEND = "delete it, and run the same command again"


class Looking:
    """What `evaluate` does to a shard; see `guardkit.shards.work.Work`.

    Args:
        encoders: with whether norms are kept.
        guards: that look at images themselves.
        folder: of the evaluation, which every worker can write to.
    """

    def __init__(self, encoders: Sequence[tuple[Encoder, bool]], guards: Sequence[ImageGuard], folder: Path) -> None:
        self.encoders, self.guards, self.folder = list(encoders), list(guards), Path(folder)
        self.output = Output(self.folder)

    def with_parts(self, put: Put) -> Looking:
        """See `guardkit.engines.base.Put`."""
        made = Looking([(put("encoder", one), keeps) for one, keeps in self.encoders], self.guards, self.folder)
        made.output = self.output
        return made

    def do(self, shard: Shard, tick: Callable[[int], None]) -> Entry:
        """See `Work`. An image that cannot be read leaves nothing: whoever scores will see it."""
        contents: list[Content] = [one.data for one in shard]  # type: ignore[misc]
        rows: list[dict[str, Any]] = []
        for encoder, keeps_norms in self.encoders:
            store = EmbeddingStore(encoder, None, keep_norms=keeps_norms)
            store.embed_readable([Record("", UNLABELLED, None, "", "", content) for content in contents])
            rows += _rows(encoder.fingerprint, store.held())
        for guard in self.guards:
            judge = JudgmentStore(guard, None)
            judge.judge(contents)
            rows += _rows(guard.fingerprint, judge.held())
        tick(len(contents))
        path = _path(shard.number)
        with self.output.written(path.as_posix()) as temporary:
            write_table(temporary, pa.Table.from_pylist(rows, schema=_SCHEMA))
        return {"given": len(contents), "files": {path.as_posix(): (self.folder / path).stat().st_size}}


def look_elsewhere(
    engine: Engine, records: Sequence[Record], stores: Mapping[str, EmbeddingStore], judges: Mapping[str, JudgmentStore], folder: Path
) -> None:
    """Fills the stores of encoders and guards that can be sent to workers; what others give is made here when it is asked for.

    Args:
        engine: does the work.
        records: of the benchmark; those without images are passed over.
        stores: of the encoders, by their fingerprints.
        judges: of guards that look at images themselves, by their fingerprints.
        folder: of the evaluation. What was done lies below it until the evaluation is finished: a run that was stopped goes on there.
    Raises:
        InputError: another process is at it, or what the engine raises.
    """
    held: dict[str, EmbeddingStore | JudgmentStore] = {}
    held |= {name: store for name, store in stores.items() if _travels(store.encoder)}
    held |= {name: judge for name, judge in judges.items() if _travels(judge.guard)}
    keyed = [(key, record.content) for record in records if record.content is not None and (key := _key(record.content)) is not None]
    if not held or not keyed:
        return
    encoders = [(store.encoder, store.keep_norms) for store in held.values() if isinstance(store, EmbeddingStore)]
    guards = [judge.guard for judge in held.values() if isinstance(judge, JudgmentStore)]
    by = [
        [name, *([store.keep_norms, store.encoder.batch_size] if isinstance(store, EmbeddingStore) else [])] for name, store in held.items()
    ]
    shards = []
    for number, first in enumerate(range(0, len(keyed), SHARD_IMAGES)):
        some = dict(keyed[first : first + SHARD_IMAGES])
        lacking = set().union(*(store.lacking(some) for store in held.values()))
        if lacking:
            # the version is of all, so that it stays the same when stores know some of them
            version = fingerprint([by, list(some)])
            items = [Given(key, content) for key, content in some.items() if key in lacking]
            shards.append(Shard(number, f"images {first + 1} to {first + len(some)}", version, items, len(items)))
    (folder / LEDGER).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LEDGER / LOCK, timeout=0):
            work_on(Looking(encoders, guards, folder), shards, engine, what="embedding images")
            for shard in shards:
                rows = read_table(folder / _path(shard.number), _SCHEMA, mend=_MEND).to_pylist()
                for name, store in held.items():
                    store.take({row["key"]: row["value"] for row in rows if row["by"] == name})
    except Timeout as error:
        raise InputError(f"{folder} is being written by another process; wait for it, or choose another output_dir") from error


def _path(number: int) -> Path:
    return Path(LEDGER) / f"{number:06d}.parquet"


def _rows(by: str, items: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [{"by": by, "key": key, "value": value} for key, value in items.items()]


def _key(content: Content) -> str | None:
    try:
        return content.key
    except ImageError:
        return None


def _travels(part: Any) -> bool:
    """Whether a part can be sent to a worker."""
    try:
        pickle.dumps(part)
    except Exception as error:  # whatever a part of somebody's own raises
        log.warning("%s cannot be sent to workers (%s: %s); it works in this process", part.name, type(error).__name__, error)
        return False
    return True
