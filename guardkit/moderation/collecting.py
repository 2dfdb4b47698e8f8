"""From what people said of decisions to images that a guard can be trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from guardkit.artifacts import write_table
from guardkit.checks import is_list
from guardkit.limits import check_bytes
from guardkit.moderation.corrections import corrected, read_reviews
from guardkit.moderation.inputs import Inputs
from guardkit.policy import Policy
from guardkit.reading import read_table
from guardkit.schema import ImageError, InputError

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
        How many images are "safe", "unsafe" and "undecided" (rows of the file), and "missing" (reviewed, and not in `input` any more).
    Raises:
        InputError: no folder of `moderate`, a line that is no verdict, or a verdict on something that was not decided.
    """
    table = Path(decided).expanduser() / "decisions.parquet"
    if not table.is_file():
        raise InputError(f"{decided} holds no decisions.parquet; give the folder that moderate wrote")
    said = read_reviews(list(reviews) if is_list(reviews) else [reviews], policy)  # type: ignore[list-item]
    rows = {row["id"]: row for row in read_table(table, mend="run moderate again").to_pylist() if row["id"] in said}
    unknown = [name for name in said if name not in rows]
    if unknown:
        raise InputError(f"a review is of {unknown[0]!r}, which {table} does not have; give the reviews of this run")
    found = []
    for given in Inputs(input):
        row = rows.pop(given.id, None)
        if row is None or given.data is None:
            continue
        try:
            data = given.data if isinstance(given.data, bytes) else given.data.read_bytes()
            check_bytes(len(data))
        except (OSError, ImageError):
            continue
        one = corrected(row, said[given.id])
        verdicts = [f"{verdict.reviewer}: {verdict.verdict}" for verdict in said[given.id]]
        found.append(
            {
                "id": given.id, "image": {"bytes": data, "path": given.id}, "label": one.label, "category": one.category, "why": one.why or None,
                "verdicts": verdicts, "action": row["action"], "score": row["score"],
            }
        )  # fmt: skip
    write_table(Path(output).expanduser(), pa.Table.from_pylist(found, schema=_SCHEMA))
    counts = Counter(row["label"] or "undecided" for row in found)
    return {"safe": counts["safe"], "unsafe": counts["unsafe"], "undecided": counts["undecided"], "missing": len(said) - len(found)}
