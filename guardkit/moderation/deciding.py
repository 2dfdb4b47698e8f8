"""What `moderate` does to a shard: its decisions as a few Parquet files, which are joined when all are there."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pyarrow as pa

from guardkit.artifacts import write_table
from guardkit.classifier import GuardClassifier
from guardkit.engines.base import Put
from guardkit.moderation.banks import Bank
from guardkit.moderation.stream import Decided, Moderator, Options
from guardkit.shards.base import Shard
from guardkit.shards.columns import own_columns
from guardkit.shards.output import Output
from guardkit.shards.work import LEDGER, Entry

PART_INPUTS = 2048  # decisions that are in memory at once
OURS = (
    "id",
    "action",
    "score",
    "violated",
    "threshold_review",
    "threshold_block",
    "frame",
    "duplicate_of",
    "near_duplicate_of",
    "bank",
    "sha256",
    "error",
)
HIDDEN = ("_hash", "_thumbnail")  # columns of parts that decisions.parquet leaves out


class Deciding:
    """What is done to a shard; see `guardkit.shards.work.Work`.

    Args:
        guard: decides.
        options: how.
        banks: of known images.
        output: of the parts.
    """

    def __init__(self, guard: GuardClassifier, options: Options, banks: Sequence[Bank], output: Output) -> None:
        self.guard, self.options, self.banks, self.output = guard, options, tuple(banks), output

    def with_parts(self, put: Put) -> Deciding:
        """See `guardkit.engines.base.Put`."""
        guard = copy.copy(self.guard)
        guard.encoder = put("encoder", guard.encoder)
        return Deciding(guard, self.options, self.banks, self.output)

    def do(self, shard: Shard, tick: Callable[[int], None]) -> Entry:
        """See `Work`."""
        decided = (_without_bytes(one) for one in Moderator(self.guard, self.options, self.banks).decide(shard))
        files: dict[str, int] = {}
        n = 0
        for number in itertools.count():
            block = []
            for one in itertools.islice(decided, PART_INPUTS):
                block.append(one)
                tick(1)
            if not block:
                break
            name = f"{LEDGER}/{shard.number:06d}_{number:04d}.parquet"
            with self.output.written(name) as temporary:
                write_table(temporary, self._table(block), compression="zstd")
                files[name] = temporary.stat().st_size
            n += len(block)
        return {"given": n, "files": files}

    def _table(self, decided: Sequence[Decided]) -> pa.Table:
        decisions = [one.decision for one in decided]
        names = self.guard.policy.category_names
        nothing = pa.nulls(len(decided), pa.string())  # until all inputs are known
        columns: dict[str, pa.Array] = {
            "id": pa.array([one.given.id for one in decided], pa.string()),
            "action": pa.array([one.action for one in decided], pa.string()),
            "score": pa.array([one.score for one in decisions], pa.float64(), from_pandas=True),
            **{name: pa.array([one.categories.get(name) for one in decisions], pa.float64()) for name in names},
            "violated": pa.array([list(one.violated) for one in decisions], pa.list_(pa.string())),
            "threshold_review": pa.array([one.threshold for one in decisions], pa.float64()),
            "threshold_block": pa.array([one.threshold_block for one in decisions], pa.float64()),
            "frame": pa.array([one.frame for one in decided], pa.int32()),
            "duplicate_of": nothing,
            "near_duplicate_of": nothing,
            "bank": pa.array([one.bank or None for one in decided], pa.string()),
            "sha256": pa.array([one.sha256 or None for one in decided], pa.string()),
            "error": pa.array([one.decision.error for one in decided], pa.string()),
        }
        columns |= own_columns([one.given.columns for one in decided], {*columns, *HIDDEN})
        columns["_hash"] = pa.array([one.hash for one in decided], pa.uint64())
        columns["_thumbnail"] = pa.array([one.thumbnail for one in decided], pa.binary())
        return pa.table(columns)


def _without_bytes(decided: Decided) -> Decided:
    return replace(decided, given=replace(decided.given, data=None))
