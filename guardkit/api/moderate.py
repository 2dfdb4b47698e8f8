"""Deciding over a folder, shards, Parquet files, a list of paths or stored embeddings, of any number of images."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardkit.checks import check_choice, check_flag, check_whole, is_list
from guardkit.classifier import GuardClassifier
from guardkit.engines.base import Engine
from guardkit.engines.local import engine_of
from guardkit.moderation.banks import banks_of
from guardkit.moderation.deciding import HIDDEN, OURS, Deciding
from guardkit.moderation.joining import Repeated, rows, write_decisions
from guardkit.moderation.stream import ACTIONS, Options
from guardkit.reports.moderation import report_page, short_table, summarised
from guardkit.schema import InputError
from guardkit.seen import NEAR
from guardkit.shards.inputs import SHARD_INPUTS, Inputs
from guardkit.shards.output import Output
from guardkit.shards.work import LEDGER, work_on
from guardkit.thresholds import check_scope


@dataclass(frozen=True)
class ModerationReport:
    """What a run over many images gives.

    Attributes:
        folder: with decisions.parquet, rejected.parquet and report.html; a URL where `output_dir` was one.
        counts: given, decided and rejected; decided + rejected = given.
        actions: action -> how many.
        violated: category -> how many flagged images it is named of.
        duplicates: how many were decided by an earlier one with the same bytes.
        table: the main numbers, to print.
    """

    folder: Path | str
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
    shard_size: int = SHARD_INPUTS,
    json_lines: bool = False,
    engine: Engine | None = None,
    trust: Sequence[str] = (),
) -> ModerationReport:
    """Decides over every image that is given, one after the other, in bounded memory, and writes a row for each input.

    The same as `python -m guardkit.moderate`. A run that was stopped goes on where it was, as long as guard, thresholds, input and settings
    are the same; a shard of the input that changed meanwhile is decided anew. An image that cannot be read is a row with the action "error", never one that is allowed. Of an animation the worst frame
    decides. Of inputs with the same bytes the first is decided.

    Stored embeddings are decided over as the images that they were made of, without these: there is no picture, hash of bytes or repeated input then.

    Args:
        guard: a `GuardClassifier`, or the folder or Hub id of a saved one.
        input: a folder (with everything below it; tar and Parquet files in it are opened), a tar file, a Parquet file with encoded images, a list
            of paths (.txt, or .csv and .jsonl with a column of them), or an embedding folder of the guard's encoder, which `embed` or
            clip-retrieval wrote; or several.
        output_dir: of the results: a folder, or a URL of an object storage.
        scope: categories: only what violates one of them is flagged, see `GuardClassifier.predict`.
        block_list, allow_list: files of hashes of known images, see `guardkit.moderation.banks.Bank`; the block list goes first.
        trim_bars: take letterbox bars away before an image is looked at.
        max_pixels, max_frames: an image with more pixels, and an animation with more frames, is an error.
        image_column, id_column, file_column: of Parquet files and tables of paths, see `guardkit.shards.inputs.Inputs`.
        limit: only the first so many inputs.
        shard_size: loose files, or lines of a list, that are decided and noted together; a tar or Parquet file is a shard by itself.
        json_lines: write decisions.jsonl as well.
        engine: does the work; None: this process.
        trust: packages that a saved guard may take its head and encoder from.
    Raises:
        InputError: a wrong value, nothing to decide over, a bank with lines that are no hashes, a folder with results of something else, embeddings
            of another encoder, or a setting that needs images where there are embeddings.
    """
    output, engine = Output(output_dir), engine_of(engine)
    check_flag("trim_bars", trim_bars)
    check_flag("json_lines", json_lines)
    check_whole("limit", limit, 1, optional=True)
    check_whole("shard_size", shard_size, 1)
    check_whole("max_pixels", max_pixels, 1)
    check_whole("max_frames", max_frames, 1)
    output.check_owner("moderate")
    if not isinstance(guard, (GuardClassifier, str, os.PathLike)):
        raise InputError(f"guard must be a GuardClassifier, or the folder or Hub id of a saved one, got {type(guard).__name__}")
    inputs = Inputs(
        input,
        image_column=image_column,
        id_column=id_column,
        file_column=file_column,
        outside=output.folder or output.url,
        with_vectors=True,
    )
    for folder in inputs.embedding_folders:
        for name, value in (
            ("block_list", block_list),
            ("allow_list", allow_list),
            ("trim_bars", trim_bars),
            ("image_column", image_column),
        ):
            if value:
                raise InputError(
                    f"{name} is of images, and input={folder.place} holds embeddings; leave it out, or give the images that were embedded"
                )
    banks = banks_of({"block_list": block_list, "allow_list": allow_list})
    if not isinstance(guard, GuardClassifier):
        guard = GuardClassifier.from_pretrained(guard, trust=trust)
    for folder in inputs.embedding_folders:
        guard.check_made_by(folder.encoder, f"input={folder.place}", width=folder.width)
    names = guard.policy.category_names
    taken = sorted(set(names) & {*OURS, *HIDDEN})
    if taken:
        raise InputError(
            f"the category {taken[0]!r} has the name of a column of decisions.parquet; rename it in the policy and train the guard again"
        )
    shards = list(inputs.shards(shard_size, limit))
    options = Options(check_scope(scope, names), max_pixels, max_frames, trim_bars)
    settings = {
        "input": inputs.places,
        "guard": guard.fingerprint,
        "thresholds": guard.thresholds.to_dict(),
        "banks": {bank.name: bank.digest for bank in banks},
        "scope": list(options.scope) if options.scope else None,
        "max_pixels": max_pixels,
        "max_frames": max_frames,
        "trim_bars": trim_bars,
    }
    nothing = InputError(f"input={input} holds nothing to decide over; give a folder of images, tar or Parquet files, or a list of paths")
    if not shards:
        raise nothing
    with output.claimed("moderate", settings, keeps=False):
        entries = work_on(Deciding(guard, options, banks, output), shards, engine, what="deciding over images")
        with output.here([name for entry in entries for name in entry["files"]]) as parts:
            if not parts:
                raise nothing
            repeated = Repeated(parts, NEAR)
            counts = write_decisions(parts, repeated, output, json_lines=json_lines)
            if counts["given"] != (noted := sum(entry["given"] for entry in entries)):
                raise InputError(
                    f"{output}: parts hold {counts['given']} rows, their entries in {LEDGER} say {noted}; delete {LEDGER}, and run the same command again"
                )
            facts = summarised(rows(parts, repeated), guard, options.scope, counts)
        with output.written("report.html") as temporary:
            temporary.write_text(report_page(facts, guard, options.scope), encoding="utf-8", errors="backslashreplace")
        output.clear(LEDGER)
    actions, violated = ({one["name"]: one["n"] for one in facts[part]} for part in ("actions", "categories"))
    return ModerationReport(output.folder or output.url, counts, actions, violated, facts["duplicates"], short_table(facts))


def check_fail_on(value: Any) -> tuple[str, ...]:
    """The actions that `fail_on` names: one, or a list.

    Raises:
        InputError: none of `ACTIONS`.
    """
    asked: Collection[Any] = value if is_list(value) else () if value is None else (value,)
    for one in asked:
        check_choice("fail_on", one, ACTIONS[1:])
    return tuple(asked)
