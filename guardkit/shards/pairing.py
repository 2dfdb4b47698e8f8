"""Editing shards of records into a pair dataset: a worker writes a shard's images and its rows, which are joined when all are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from guardkit.artifacts import fingerprint, write_table
from guardkit.counterfactual.pair_dataset import Edited, Named, edit_records, tries_table
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.engines.base import Engine, Put
from guardkit.reading import read_table
from guardkit.schema import Rejected
from guardkit.shards.base import Given, Shard
from guardkit.shards.embedding import content_key
from guardkit.shards.output import Output
from guardkit.shards.work import LEDGER, Entry, work_on

_UNREADABLE = pa.schema([("id", pa.string()), ("reason", pa.string())])
_MEND = "delete it, and run the same command again"


class Pairing:
    """What `synthesize` does to a shard; see `guardkit.shards.work.Work`.

    Args:
        pipeline: makes and stores the tries. A copy elsewhere keeps them in the same place, where that is on the same machine.
        folder: of the dataset.
        variants_per_image: edits wanted of each record.
    """

    def __init__(self, pipeline: CounterfactualPipeline, folder: Path, variants_per_image: int) -> None:
        self.pipeline, self.folder, self.variants_per_image = pipeline, Path(folder), variants_per_image
        self.output = Output(self.folder)

    def with_parts(self, put: Put) -> Pairing:
        """See `guardkit.engines.base.Put`."""
        made = Pairing(self.pipeline.with_parts(put), self.folder, self.variants_per_image)
        made.output = self.output
        return made

    def do(self, shard: Shard, tick: Callable[[int], None]) -> Entry:
        """See `Work`. Images that no run may find again under the same name are among the files."""
        named: list[Named] = [(one.id, one.columns["record"]) for one in shard]
        done = edit_records(named, self.pipeline, self.folder, self.variants_per_image, tick)
        table, unreadable = _parts(shard.number)
        for path, rows in (
            (table, tries_table(done.rows)),
            (unreadable, pa.Table.from_pylist([vars(one) for one in done.unreadable], schema=_UNREADABLE)),
        ):
            with self.output.written(path.as_posix()) as temporary:
                write_table(temporary, rows)
        images = {name for row in done.rows for name in (row["file_name"], row["edited_file_name"]) if name is not None}
        files = [*sorted(images), table.as_posix(), unreadable.as_posix()]
        return {
            "given": len(named),
            "unsettled": done.n_unsettled,
            "files": {name: (self.folder / name).stat().st_size for name in files},
        }


def edits_on(
    engine: Engine, pipeline: CounterfactualPipeline, folder: Path, *, variants_per_image: int, shard_size: int
) -> Callable[[Sequence[Named]], Iterator[Edited]]:
    """What edits records shard by shard, for `guardkit.counterfactual.pair_dataset.write_pair_dataset`.

    What an earlier run noted is not made again, but for shards with a try that may come out otherwise.

    Args:
        engine: does the work.
        pipeline: makes and stores the tries.
        folder: of the dataset, which every worker can write to.
        variants_per_image: edits wanted of each record.
        shard_size: records of a shard, taken up to whole batches of the editor: then batches are the same whoever edits.
    """
    size = -(-shard_size // pipeline.batch_size) * pipeline.batch_size

    def edit(named: Sequence[Named]) -> Iterator[Edited]:
        shards = _shards(named, size)
        for shard, entry in zip(
            shards, work_on(Pairing(pipeline, folder, variants_per_image), shards, engine, what="editing images"), strict=True
        ):
            table, unreadable = (folder / path for path in _parts(shard.number))
            rows = read_table(table, tries_table([]).schema, mend=_MEND).to_pylist()
            refused = read_table(unreadable, _UNREADABLE, mend=_MEND).to_pylist()
            yield Edited(rows, [Rejected(**one) for one in refused], entry["unsettled"])

    return edit


def _parts(number: int) -> tuple[Path, Path]:
    """Where a shard's rows are, and its records that cannot be read, below the folder."""
    return Path(LEDGER) / f"{number:06d}.parquet", Path(LEDGER) / f"{number:06d}_rejected.parquet"


def _shards(named: Sequence[Named], size: int) -> list[Shard]:
    shards = []
    for number, first in enumerate(range(0, len(named), size)):
        some = named[first : first + size]
        said = [
            [name, one.id, one.label, one.category, one.source, one.caption, one.region, content_key(one.content)]
            + [content_key(twin) for twin in one.counterfactuals]
            for name, one in some
        ]
        items = [Given(name, record.content, "", {"record": record}) for name, record in some]
        shards.append(Shard(number, f"images {first + 1} to {first + len(some)}", fingerprint(said), items, len(items)))
    return shards
