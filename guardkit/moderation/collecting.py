"""From what people said of decisions to images that a guard can be trained on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from guardkit.artifacts import write_table
from guardkit.checks import check_path, is_list
from guardkit.moderation.corrections import corrected, read_reviews
from guardkit.moderation.stream import ACTIONS, encoded_bytes
from guardkit.policy import Policy
from guardkit.reading import read_table
from guardkit.schema import Content, ImageError, InputError
from guardkit.shards.base import Stored
from guardkit.shards.inputs import Inputs

_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.string(),
        "category": pa.string(),
        "why": pa.string(),
        "verdicts": pa.list_(pa.string()),
        "action": pa.string(),
        "score": pa.float64(),
    }
)

_DECISIONS = pa.schema(  # what people's verdicts are joined with, and what the order of the queue comes from
    {
        "id": pa.string(),
        "action": pa.string(),
        "score": pa.float64(),
        "violated": pa.list_(pa.string()),
        "threshold_review": pa.float64(),
        "threshold_block": pa.float64(),
        "frame": pa.int32(),
        "duplicate_of": pa.string(),
        "near_duplicate_of": pa.string(),
        "bank": pa.string(),
        "sha256": pa.string(),
    }
)
_SHARES = ("score", "threshold_review", "threshold_block")


def read_decisions(folder: str | Path, name: str, categories: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of the decisions.parquet that `moderate` wrote, in order. An unknown action would turn the meaning of a verdict round, so none is let through.

    Args:
        folder: that `moderate` wrote.
        name: what the folder is called in errors.
        categories: that must have a column.
    Raises:
        InputError: there is no such file, or it lacks a column, or a row is no decision.
    """
    path, mend = Path(folder).expanduser() / "decisions.parquet", "run moderate again"
    if not path.is_file():
        raise InputError(f"{name} holds no decisions.parquet; give the folder that moderate wrote")
    table = read_table(path, _DECISIONS, required=("id", "action"), mend=mend)
    others = [one for one in categories if one not in table.column_names]
    if others:
        raise InputError(f"{name} was decided without the category {others[0]!r}; give the guard that decided it")
    rows: list[dict[str, Any]] = table.to_pylist()
    for number, row in enumerate(rows):
        shares = [row[one] for one in _SHARES]
        if row["action"] not in ACTIONS:
            raise InputError(f"{path} row {number} has the action {row['action']!r}, which is none of {', '.join(ACTIONS)}; {mend}")
        if any(share is not None and not 0 <= share <= 1 for share in shares) or (shares[0] is not None and None in shares):
            raise InputError(f"{path} row {number} has no score with its thresholds in [0, 1], got {shares}; {mend}")
    return rows


def decided_bytes(source: bytes | Path | Stored | Content | np.ndarray, row: Mapping[str, Any]) -> bytes:
    """The bytes that a decision is of: nobody must judge another image under its name.

    Args:
        source: what the input holds now.
        row: of decisions.parquet.
    Raises:
        ImageError: it cannot be read, or is another image than the one that was decided.
    """
    if row["sha256"] is None:
        raise ImageError("nobody knows of which bytes the decision is")
    data = encoded_bytes(source)
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise ImageError("it was changed after it was decided")
    return data


def collect_corrections(
    decided: str | Path,
    reviews: str | Path | Sequence[str | Path],
    input: str | Path | Sequence[str | Path],
    policy: Policy,
    *,
    output: str | Path,
) -> dict[str, int]:
    """Writes corrections.parquet: the images that people looked at, with the labels that follow from what they said.

    Of each person the last verdict on an image counts. Where people disagree on the label, or nobody was sure, the row is kept without one; an overturned alarm is a
    safe image with the category that it was taken for.

    Args:
        decided: the folder that `moderate` wrote.
        reviews: files that its page saved, of one or more people.
        input: what `moderate` decided over; the images are read from there.
        policy: of the guard.
        output: the file to write.
    Returns:
        How many images are "safe", "unsafe" and "undecided" (rows of the file), and "missing" (reviewed, and not in `input` any more, or changed since).
    Raises:
        InputError: no folder of `moderate`, a decision that is none, a line that is no verdict, a verdict on something that was not decided, or `output`
            is a folder.
    """
    target = check_path("output", output)
    if target.is_dir():
        raise InputError(f"output={output} is a folder; give the file to write, such as {target / 'corrections.parquet'}")
    decisions = read_decisions(decided, str(decided))
    said = read_reviews(list(reviews) if is_list(reviews) else [reviews], policy)  # type: ignore[list-item]
    rows = {row["id"]: row for row in decisions if row["id"] in said}
    unknown = [name for name in said if name not in rows]
    if unknown:
        raise InputError(
            f"a review is of {unknown[0]!r}, which {Path(decided) / 'decisions.parquet'} does not have; give the reviews of this run"
        )
    found = []
    for given in Inputs(input):
        row = rows.pop(given.id, None)
        if row is None or given.data is None:
            continue
        try:
            data = decided_bytes(given.data, row)
        except ImageError:
            continue
        one = corrected(row, said[given.id])
        verdicts = [f"{verdict.reviewer}: {verdict.verdict}" for verdict in said[given.id]]
        found.append(
            {
                "id": given.id, "image": {"bytes": data, "path": given.id}, "label": one.label, "category": one.category, "why": one.why or None,
                "verdicts": verdicts, "action": row["action"], "score": row["score"],
            }
        )  # fmt: skip
    write_table(target, pa.Table.from_pylist(found, schema=_SCHEMA))
    counts = Counter(row["label"] or "undecided" for row in found)
    return {"safe": counts["safe"], "unsafe": counts["unsafe"], "undecided": counts["undecided"], "missing": len(said) - len(found)}
