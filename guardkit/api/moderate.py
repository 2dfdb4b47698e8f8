"""Deciding over a folder, shards, Parquet files or a list of paths, of any number of images."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from guardkit.artifacts import write_table, written
from guardkit.checks import check_choice, check_flag, check_whole, is_list
from guardkit.classifier import GuardClassifier
from guardkit.folders import claim, refuse_others
from guardkit.moderation.banks import banks_of
from guardkit.moderation.inputs import Inputs
from guardkit.moderation.stream import ACTIONS, Decided, Moderator, Options
from guardkit.progress import progress
from guardkit.reading import read_table
from guardkit.reports.moderation import report_page, short_table, summarised
from guardkit.schema import InputError
from guardkit.stores import KeyValueStore
from guardkit.thresholds import check_scope

log = logging.getLogger(__name__)

_PARTS, _STORE = ".parts", "decided.sqlite"
_PART_INPUTS = 2048  # a run that is killed loses as many at most
_MINE = (
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
_HIDDEN = ("_hash", "_thumbnail")  # columns of parts that decisions.parquet leaves out
_MEND = "delete the folder .parts in output_dir, and run it again"


@dataclass(frozen=True)
class ModerationReport:
    """What a run over many images gives.

    Attributes:
        folder: with decisions.parquet, rejected.parquet and report.html.
        counts: given, decided and rejected; decided + rejected = given.
        actions: action -> how many.
        violated: category -> how many flagged images it is named of.
        duplicates: how many were decided by an earlier one with the same bytes.
        table: the main numbers, to print.
    """

    folder: Path
    counts: dict[str, int]
    actions: dict[str, int]
    violated: dict[str, int]
    duplicates: int
    table: str


def moderate(
    guard: GuardClassifier | str | Path,
    input: str | Path | Sequence[str | Path],
    *,
    output_dir: str | Path,
    scope: Sequence[str] | None = None,
    block_list: str | Path | None = None,
    allow_list: str | Path | None = None,
    trim_bars: bool = False,
    max_pixels: int = 100_000_000,
    max_frames: int = 200,
    image_column: str | None = None,
    id_column: str | None = None,
    file_column: str = "file_name",
    limit: int | None = None,
    json_lines: bool = False,
    trust: Sequence[str] = (),
) -> ModerationReport:
    """Decides over every image that is given, one after the other, in bounded memory, and writes a row for each input.

    The same as `python -m guardkit.moderate`. A run that was stopped goes on where it was, as long as guard, thresholds, input and settings
    are the same. An image that cannot be read is a row with the action "error", never one that is allowed. Of an animation the worst frame
    decides. Of inputs with the same bytes the first is decided.

    Args:
        guard: a `GuardClassifier`, or the folder or Hub id of a saved one.
        input: a folder (with everything below it; tar and Parquet files in it are opened), a tar file, a Parquet file with encoded images, or a list
            of paths (.txt, or .csv and .jsonl with a column of them); or several.
        output_dir: of the results.
        scope: categories: only what violates one of them is flagged, see `GuardClassifier.predict`.
        block_list, allow_list: files of hashes of known images, see `guardkit.moderation.banks.Bank`; the block list goes first.
        trim_bars: take letterbox bars away before an image is looked at.
        max_pixels, max_frames: an image with more pixels, and an animation with more frames, is an error.
        image_column, id_column, file_column: of Parquet files and tables of paths, see `guardkit.moderation.inputs.Inputs`.
        limit: only the first so many inputs.
        json_lines: write decisions.jsonl as well.
        trust: packages that a saved guard may take its head and encoder from.
    Raises:
        InputError: a wrong value, nothing to decide over, a bank with lines that are no hashes, or a folder with results of something else.
    """
    folder = Path(output_dir).expanduser()
    check_flag("trim_bars", trim_bars)
    check_flag("json_lines", json_lines)
    check_whole("limit", limit, 1, optional=True)
    check_whole("max_pixels", max_pixels, 1)
    check_whole("max_frames", max_frames, 1)
    if folder.is_dir():
        refuse_others(folder, "moderate", replaces=False)
    inputs = Inputs(input, image_column=image_column, id_column=id_column, file_column=file_column, outside=folder)
    banks = banks_of({"block_list": block_list, "allow_list": allow_list})
    if not isinstance(guard, GuardClassifier):
        guard = GuardClassifier.from_pretrained(guard, trust=trust)
    names = guard.policy.category_names
    taken = sorted(set(names) & {*_MINE, *_HIDDEN})
    if taken:
        raise InputError(
            f"the category {taken[0]!r} has the name of a column of decisions.parquet; rename it in the policy and train the guard again"
        )
    options = Options(check_scope(scope, names), max_pixels, max_frames, trim_bars)
    settings = {
        "guard": guard.fingerprint,
        "thresholds": guard.thresholds.to_dict(),
        "input": inputs.fingerprint(),
        "banks": {bank.name: bank.digest for bank in banks},
        "options": [list(options.scope) if options.scope else None, max_pixels, max_frames, trim_bars, options.near, limit],
    }
    folder.mkdir(parents=True, exist_ok=True)
    with claim(folder, "moderate", settings, differs="made with another guard, input or other settings"):
        parts = folder / _PARTS
        parts.mkdir(exist_ok=True)
        store = KeyValueStore(parts, _STORE, settings, place="output_dir")
        moderator = Moderator(guard, options, banks, store)
        with store:
            _decide(moderator, inputs, parts, names, limit)
        n_parts = len(list(parts.glob("part_*.parquet")))
        if not n_parts:
            raise InputError(
                f"input={input} holds nothing to decide over; give a folder of images, tar or Parquet files, or a list of paths"
            )
        counts = _join(parts, n_parts, folder, json_lines)
        facts = summarised(_rows(parts, n_parts), guard, options.scope, counts)
        with written(folder / "report.html") as temporary:
            temporary.write_text(report_page(facts, guard, options.scope), encoding="utf-8", errors="backslashreplace")
        shutil.rmtree(parts)
    actions, violated = ({one["name"]: one["n"] for one in facts[part]} for part in ("actions", "categories"))
    return ModerationReport(folder, counts, actions, violated, facts["duplicates"], short_table(facts))


# --- parts ------------------------------------------------------------------------------------------------------------


def _part(parts: Path, number: int) -> Path:
    return parts / f"part_{number:06d}.parquet"


def _decide(moderator: Moderator, inputs: Inputs, parts: Path, names: Sequence[str], limit: int | None) -> None:
    """Writes a part for every few thousand inputs; those that are there are passed over."""
    n_parts = n_done = 0
    while _part(parts, n_parts).is_file():
        table = read_table(_part(parts, n_parts), mend=_MEND)
        if not {*_MINE, *_HIDDEN, *names} <= set(table.column_names):
            raise InputError(f"{_part(parts, n_parts)} is not as guardkit wrote it; {_MEND}")
        hashed = [
            (name, value)
            for name, value in zip(*(table.column(one).to_pylist() for one in ("id", "_hash")), strict=True)
            if value is not None
        ]
        moderator.remember([name for name, _ in hashed], [value for _, value in hashed])
        n_parts, n_done = n_parts + 1, n_done + len(table)
    for left in parts.glob("part_*.parquet"):
        if left.name >= _part(parts, n_parts).name:
            raise InputError(f"{_part(parts, n_parts)} is missing, and {left.name} is there; {_MEND}")
    if n_done:
        log.info("goes on after %d inputs that were decided before", n_done)
    stream = progress(moderator.decide(itertools.islice(inputs, n_done, limit)), total=None, what="deciding over images")
    while block := list(itertools.islice(stream, _PART_INPUTS)):
        write_table(_part(parts, n_parts), _table(block, names), compression="zstd")
        n_parts += 1


def _table(block: Sequence[tuple[Decided, int | None]], names: Sequence[str]) -> pa.Table:
    decided = [one for one, _ in block]
    decisions = [one.decision for one in decided]
    columns: dict[str, pa.Array] = {
        "id": pa.array([one.given.id for one in decided], pa.string()),
        "action": pa.array([one.action for one in decided], pa.string()),
        "score": pa.array([one.score for one in decisions], pa.float64(), from_pandas=True),
        **{name: pa.array([one.categories.get(name) for one in decisions], pa.float64()) for name in names},
        "violated": pa.array([list(one.violated) for one in decisions], pa.list_(pa.string())),
        "threshold_review": pa.array([one.threshold for one in decisions], pa.float64()),
        "threshold_block": pa.array([one.threshold_block for one in decisions], pa.float64()),
        "frame": pa.array([one.frame for one in decided], pa.int32()),
        "duplicate_of": pa.array([one.duplicate_of for one in decided], pa.string()),
        "near_duplicate_of": pa.array([one.near_duplicate_of for one in decided], pa.string()),
        "bank": pa.array([one.bank or None for one in decided], pa.string()),
        "sha256": pa.array([one.sha256 or None for one in decided], pa.string()),
        "error": pa.array([one.decision.error for one in decided], pa.string()),
    }
    own = dict.fromkeys(name for one in decided for name in one.given.columns)
    for name in own:
        free = name
        while free in columns or free in _HIDDEN:
            free = f"input_{free}"
        columns[free] = _own_column([one.given.columns.get(name) for one in decided])
    columns["_hash"] = pa.array([value for _, value in block], pa.uint64())
    columns["_thumbnail"] = pa.array([one.thumbnail for one in decided], pa.binary())
    return pa.table(columns)


def _own_column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):  # of several types
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _join(parts: Path, n_parts: int, folder: Path, json_lines: bool) -> dict[str, int]:
    """decisions.parquet and rejected.parquet of all parts, a part at a time in memory."""
    schema = _schema([pq.read_schema(_part(parts, number)) for number in range(n_parts)])
    rejected: list[dict[str, Any]] = []
    given = 0
    with written(folder / "decisions.parquet") as temporary, open(temporary, "wb") as file, pq.ParquetWriter(file, schema) as writer:
        for number in range(n_parts):
            table = _cast(read_table(_part(parts, number), mend=_MEND), schema)
            writer.write_table(table)
            given += len(table)
            ids, errors = (table.column(name).to_pylist() for name in ("id", "error"))
            rejected += [{"id": name, "reason": error} for name, error in zip(ids, errors, strict=True) if error is not None]
    write_table(folder / "rejected.parquet", pa.Table.from_pylist(rejected, schema=pa.schema({"id": pa.string(), "reason": pa.string()})))
    if json_lines:
        with written(folder / "decisions.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as lines:
            for number in range(n_parts):
                for row in _cast(read_table(_part(parts, number), mend=_MEND), schema).to_pylist():
                    lines.write(json.dumps(row, default=str) + "\n")
    else:
        (folder / "decisions.jsonl").unlink(missing_ok=True)
    return {"given": given, "decided": given - len(rejected), "rejected": len(rejected)}


def _schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Of all parts together, without what only parts have; a column that differs in type is text."""
    kinds: dict[str, pa.DataType] = {}
    for schema in schemas:
        for one in schema:
            if one.name in _HIDDEN:
                continue
            before = kinds.setdefault(one.name, one.type)
            if before == one.type:
                continue
            try:
                fields = [pa.schema({one.name: kind}) for kind in (before, one.type)]
                kinds[one.name] = pa.unify_schemas(fields, promote_options="permissive").field(0).type
            except pa.ArrowException:
                kinds[one.name] = pa.string()
    # a column that is empty everywhere has no type of its own
    return pa.schema({name: pa.string() if pa.types.is_null(kind) else kind for name, kind in kinds.items()})


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = []
    for one in schema:
        if one.name not in table.column_names:
            columns.append(pa.nulls(len(table), one.type))
            continue
        column = table.column(one.name)
        try:
            columns.append(column.cast(one.type))
        except pa.ArrowException:
            columns.append(pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string()))
    return pa.table(columns, schema=schema)


def _rows(parts: Path, n_parts: int) -> Iterator[Mapping[str, Any]]:
    """Every row of all parts, with its thumbnail."""
    for number in range(n_parts):
        yield from read_table(_part(parts, number), mend=_MEND).to_pylist()


def check_fail_on(value: Any) -> tuple[str, ...]:
    """The actions that `fail_on` names: one, or a list.

    Raises:
        InputError: none of `ACTIONS`.
    """
    asked: Collection[Any] = value if is_list(value) else () if value is None else (value,)
    for one in asked:
        check_choice("fail_on", one, ACTIONS[1:])
    return tuple(asked)
