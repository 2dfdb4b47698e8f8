"""Pair datasets on disk: unsafe images beside their counterfactuals, every try in one table, a page to look through.

    images/<record>.png                 the original, once
    images/<pair_id>_edited.png         each edit that gave an image
    metadata.parquet                    one row a try, rejected ones included
    gallery.html                        the same for people
    reviews.jsonl                       what people said of them, see review.py; the table's column `review` follows it
    manifest.json                       written last: its presence means that the dataset is complete

The folder reads as a Hugging Face image folder: `datasets.load_dataset("imagefolder", data_dir=FOLDER)` gives `image`,
`edited` (none where a try gave no image) and every other column. A stopped run goes on where it was, because every try lies in the
pipeline's store, and because of the ledger where shards are edited (`guardkit.shards.pairing`): the finished dataset is the same, byte for
byte, as that of a run nobody disturbed, and the same whoever made the edits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from guardkit import __version__
from guardkit.artifacts import fingerprint, read_json, write_json, write_table, written
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.counterfactual.review import REVIEWS, VERDICTS, ReviewLog, combined, current_reviews
from guardkit.counterfactual.store import Try
from guardkit.folders import LOCK, claim, is_unfinished
from guardkit.images import encode_png
from guardkit.pages import render
from guardkit.progress import ticking
from guardkit.reading import read_table
from guardkit.schema import ImageError, InputError, Record, Rejected

METADATA, MANIFEST, GALLERY = "metadata.parquet", "manifest.json", "gallery.html"
REJECTED_INPUTS = "rejected.parquet"
_FORMAT = 2  # counts up when the same settings give other files
_MEND = "copy the folder anew, or make the dataset anew"
_LOCK_TIMEOUT_S = 10.0
PUBLISHED_YIELD = 0.23  # of tries, after a look at every one by hand: SafetyPairs (2025)
_REQUIRED = ("pair_id", "file_name", "label", "status")  # have a value in each row
_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("file_name", pa.string()),
        ("edited_file_name", pa.string()),
        ("label", pa.int8()),
        ("category", pa.string()),
        ("source", pa.string()),
        ("record_id", pa.string()),
        ("caption", pa.string()),
        *((name, pa.float64()) for name in ("x_min", "y_min", "x_max", "y_max")),
        ("instruction", pa.string()),
        ("instructor", pa.string()),
        ("editor", pa.string()),
        ("verifier", pa.string()),
        ("seed", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("flip_score", pa.float64()),
        ("preservation_score", pa.float64()),
        ("review", pa.string()),
    ]
)


@dataclass(frozen=True)
class Edited:
    """What came of some records.

    Attributes:
        rows: of the table, one a try.
        unreadable: records whose image cannot be read.
        n_unsettled: tries that another run may make otherwise: an instructor abstained, or a model could not be asked.
    """

    rows: list[dict[str, Any]]
    unreadable: list[Rejected]
    n_unsettled: int


Named = tuple[str, Record]
"""The name of a record's files, and the record."""


def write_pair_dataset(
    records: Sequence[Record],
    pipeline: CounterfactualPipeline,
    folder: Path,
    *,
    made_from: dict[str, Any],
    variants_per_image: int = 1,
    rejected: Sequence[Rejected] = (),
    edit: Callable[[Sequence[Named]], Iterable[Edited]] | None = None,
) -> dict[str, Any]:
    """Edits records and writes what came of every try.

    Args:
        records: to be edited, with contents.
        pipeline: makes and stores the tries.
        folder: written to; one that other settings filled is refused.
        made_from: names the source in the manifest, in plain JSON types.
        variants_per_image: edits wanted of each record.
        rejected: inputs that were already found unusable, to be listed with the rest.
        edit: gives what came of all the records, piece by piece and in order, their files being written; None: edits here and now.
    Returns:
        The manifest: counts, yields, and everything the dataset depends on.
    Raises:
        InputError: the folder belongs to another dataset, or another process is writing it.
    """
    folder = Path(folder)
    settings = {
        "format": _FORMAT,
        "policy": pipeline.policy.name,
        "policy_digest": pipeline.policy.digest,
        "instructor": pipeline.instructor.name,
        "editor": pipeline.editor.config,
        "verifier": pipeline.verifier.config,
        "max_tries": pipeline.max_tries,
        "variants_per_image": variants_per_image,
        "source": made_from,
        "records": fingerprint([record.id for record in records]),
    }

    def recognise() -> dict[str, Any] | None:
        # a copy without hidden files has no mark
        if not (folder / MANIFEST).is_file():
            return None
        found = _read_manifest(folder / MANIFEST)
        return {key: found.get(key) for key in settings}

    # a damaged file of reviews is said before the work, not after it
    check = ReviewLog(folder).read
    with claim(folder, "synthesize", settings, recognise=recognise, beside=[REVIEWS], check=check):
        (folder / MANIFEST).unlink(missing_ok=True)
        rows: list[dict[str, Any]] = []
        unreadable = list(rejected)
        used: Counter[str] = Counter()
        named = [(_file_name(record, used), record) for record in records]
        for done in (edit or _edits_here(pipeline, folder, variants_per_image))(named):
            rows += done.rows
            unreadable += done.unreadable
        edited_records = len({row["file_name"] for row in rows})
        accepted_records = len({row["file_name"] for row in rows if row["status"] == "accepted"})
        _fill_reviews(folder, rows, _written_reviews(folder))
        write_table(folder / METADATA, tries_table(rows))
        columns = {"id": [one.id for one in unreadable], "reason": [one.reason for one in unreadable]}
        write_table(folder / REJECTED_INPUTS, pa.table(columns, schema=pa.schema([("id", pa.string()), ("reason", pa.string())])))
        accepted = sum(row["status"] == "accepted" for row in rows)
        manifest = {
            **settings,
            "given": len(records) + len(rejected),
            "edited": edited_records,
            "unreadable": len(unreadable),
            "tries": len(rows),
            "accepted": accepted,
            "rejected": dict(sorted(Counter(row["reason"] for row in rows if row["status"] == "rejected").items())),
            "yield_per_try": accepted / len(rows) if rows else None,
            "yield_per_image": accepted_records / edited_records if edited_records else None,
            "published_yield_per_try": PUBLISHED_YIELD,
            "guardkit_version": __version__,
        }
        with written(folder / GALLERY) as temporary:
            temporary.write_text(gallery(rows, manifest), encoding="utf-8", errors="backslashreplace")
        write_json(folder / MANIFEST, manifest)
    return manifest


def edit_records(
    named: Sequence[Named], pipeline: CounterfactualPipeline, folder: Path, variants_per_image: int, tick: Callable[[int], None]
) -> Edited:
    """Edits records, and writes what images there are.

    Args:
        named: records with contents.
        pipeline: makes and stores the tries.
        folder: of the dataset.
        variants_per_image: edits wanted of each record.
        tick: is told how many more records are done.
    """
    done = Edited([], [], 0)
    n_unsettled = 0
    for first in range(0, len(named), pipeline.batch_size):
        block = named[first : first + pipeline.batch_size]
        for (name, record), tries in zip(block, _tries([one for _, one in block], pipeline, variants_per_image), strict=True):
            n_unsettled += sum(one.abstained or one.verdict.transient for one in tries)
            try:
                done.rows.extend(list(_write_tries(folder, name, record, tries, pipeline)))
            except ImageError as error:
                done.unreadable.append(Rejected(record.id, str(error)))
        tick(len(block))
    return Edited(done.rows, done.unreadable, n_unsettled)


def tries_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as metadata.parquet has them."""
    return pa.Table.from_pylist(list(rows), schema=_SCHEMA)


def _edits_here(pipeline: CounterfactualPipeline, folder: Path, variants_per_image: int) -> Callable[[Sequence[Named]], Iterator[Edited]]:
    def edit(named: Sequence[Named]) -> Iterator[Edited]:
        with ticking(total=len(named), what="editing images") as tick:
            yield edit_records(named, pipeline, folder, variants_per_image, tick)

    return edit


def read_pair_dataset(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a finished pair dataset and its manifest. The column `review` says what people have said up to now.

    Raises:
        InputError: there is none, it is not finished, a column is missing, or a review cannot be understood.
    """
    table, manifest = _read_table(Path(folder))
    return _reviewed(Path(folder), table), manifest


def write_reviews(folder: Path) -> bool:
    """Brings the table's column `review` up to date with what people said.

    Returns:
        Whether it is; not while another process writes the dataset, which will do it itself.
    Raises:
        InputError: as `read_pair_dataset`.
    """
    folder = Path(folder)
    try:
        with FileLock(folder / LOCK, timeout=_LOCK_TIMEOUT_S):
            table, _ = _read_table(folder)
            reviews = [row["review"] for row in _reviewed(folder, table)]
            if reviews != table["review"].to_pylist():
                place = table.column_names.index("review")
                write_table(folder / METADATA, table.set_column(place, _SCHEMA.field("review"), pa.array(reviews, pa.string())))
    except Timeout:
        return False
    return True


def _reviewed(folder: Path, table: pa.Table) -> list[dict[str, Any]]:
    rows = table.to_pylist()
    for row in rows:
        if row["review"] is not None and row["review"] not in VERDICTS:
            found = f"review {row['review']!r} of pair {row['pair_id']}"
            raise InputError(f"{folder / METADATA} holds {found}; allowed are {', '.join(VERDICTS)}, or nothing")
    _fill_reviews(folder, rows, {row["pair_id"]: row["review"] for row in rows})
    return rows


def _fill_reviews(folder: Path, rows: list[dict[str, Any]], otherwise: dict[str, str | None]) -> None:
    """Sets `review` to what the file of reviews says of the pair; where there is no such file, to what was known before."""
    is_known = not (folder / REVIEWS).exists()
    current = current_reviews(folder, rows)
    for row in rows:
        said = current.get(row["pair_id"], {})
        row["review"] = otherwise.get(row["pair_id"]) if is_known else combined(review.verdict for review in said.values())


def _written_reviews(folder: Path) -> dict[str, str | None]:
    """The column `review` as an earlier run, or somebody's own program, left it."""
    try:
        table = read_table(folder / METADATA, pa.schema([_SCHEMA.field("pair_id"), _SCHEMA.field("review")]))
    except InputError:
        return {}  # there is none yet, or none that can be read: it is written anew
    return dict(zip(table["pair_id"].to_pylist(), table["review"].to_pylist(), strict=True))


def _read_table(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    if not (folder / MANIFEST).is_file():
        state = (
            "is not complete; run the same synthesize again"
            if is_unfinished(folder)
            else f"is no pair dataset: {MANIFEST} is missing; give a folder that python -m guardkit.synthesize wrote"
        )
        raise InputError(f"{folder} {state}")
    manifest = _checked_manifest(folder / MANIFEST)
    table = read_table(folder / METADATA, _SCHEMA, required=_REQUIRED, n_rows=manifest["tries"], mend=_MEND)
    _check_rows(folder / METADATA, table, manifest)
    return table, manifest


def _checked_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_manifest(path)
    counts: list[Any] = [manifest.get(name) for name in ("given", "edited", "unreadable", "tries", "accepted")]
    rejected = manifest.get("rejected")
    if not isinstance(rejected, dict) or any(type(one) is not int or one < 0 for one in [*counts, *rejected.values()]):
        raise InputError(f"{path} lacks counts that guardkit writes; {_MEND}")
    given, edited, unreadable, tries, accepted = counts
    if edited + unreadable != given or accepted + sum(rejected.values()) != tries:
        raise InputError(f"{path} has counts that do not add up; {_MEND}")
    return manifest


def _check_rows(path: Path, table: pa.Table, manifest: dict[str, Any]) -> None:
    """Raises InputError for a row that no run wrote: what is missing or no number would count as safe further on."""
    ids = table["pair_id"].to_pylist()
    if len(set(ids)) < len(ids):
        raise InputError(f"{path} has the pair_id {Counter(ids).most_common(1)[0][0]!r} more than once; {_MEND}")
    for row in table.to_pylist():
        box = [row[name] for name in ("x_min", "y_min", "x_max", "y_max")]
        shares = [row[name] for name in ("flip_score", "preservation_score") if row[name] is not None]
        wrong = [
            what
            for what, is_right in (
                (f"label {row['label']}", row["label"] in (0, 1)),
                (f"status {row['status']!r}", row["status"] in ("accepted", "rejected")),
                ("no edited image, and was accepted", row["status"] != "accepted" or row["edited_file_name"] is not None),
                (f"scores {shares}", all(0 <= share <= 1 for share in shares)),
                (f"box {box}", box == [None] * 4 or (None not in box and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1)),
            )
            if not is_right
        ]
        if wrong:
            raise InputError(f"{path} pair {row['pair_id']!r} has {wrong[0]}; {_MEND}")
    accepted = sum(status == "accepted" for status in table["status"].to_pylist())
    if accepted != manifest["accepted"]:
        raise InputError(f"{path} has {accepted} accepted pairs, {MANIFEST} says {manifest['accepted']}; {_MEND}")


def _tries(block: list[Record], pipeline: CounterfactualPipeline, variants: int) -> list[list[Try]]:
    """All tries of each record."""
    wanted = [(record, seed) for record in block for seed in range(variants)]
    made = pipeline.make_all([record for record, _ in wanted], [seed for _, seed in wanted])
    return [[one for tries in made[first : first + variants] for one in tries] for first in range(0, len(made), variants)]


def _write_tries(folder: Path, name: str, record: Record, tries: list[Try], pipeline: CounterfactualPipeline) -> Iterator[dict[str, Any]]:
    """Writes what images there are and gives the rows. Raises ImageError when the original cannot be read."""
    assert record.content is not None
    original = f"images/{name}.png"
    _write_image(folder / original, encode_png(record.content.load()))
    box = dict(zip(("x_min", "y_min", "x_max", "y_max"), record.region or (None,) * 4, strict=True))
    for number, one in enumerate(tries):
        pair_id = name if number == 0 else f"{name}.{number}"  # no record has a dot in its name
        edited = f"images/{pair_id}_edited.png" if one.png is not None else None
        if edited is not None and one.png is not None:
            _write_image(folder / edited, one.png)
        yield {
            "pair_id": pair_id,
            "file_name": original,
            "edited_file_name": edited,
            "label": record.label,
            "category": record.category,
            "source": record.source,
            "record_id": record.id,
            "caption": record.caption,
            **box,
            "instruction": one.instruction,
            "instructor": pipeline.instructor.name,
            "editor": pipeline.editor.name,
            "verifier": pipeline.verifier.name,
            "seed": one.seed,
            "status": "accepted" if one.accepted else "rejected",
            "reason": one.verdict.reason,
            "flip_score": one.verdict.flip_score,
            "preservation_score": one.verdict.preservation_score,
            "review": None,
        }


def _write_image(path: Path, data: bytes) -> None:
    # what an earlier run left under the name may be damaged, or of a picture that has been replaced since
    if not path.is_file() or path.read_bytes() != data:
        with written(path) as temporary:
            temporary.write_bytes(data)


def _file_name(record: Record, used: Counter[str]) -> str:
    """A name that is a file's everywhere and leads nowhere else, unique in the dataset."""
    name = re.sub(r"[^A-Za-z0-9-]+", "_", record.id.rsplit(".", 1)[0]).strip("_")[:80] or "image"
    # loaders take a file with a word such as train, test or val in its name for one of that split, and leave the rest out;
    # they look for small letters, so every word begins with a capital
    name = re.sub(r"(?<![A-Za-z])[a-z]", lambda letter: letter[0].upper(), name)
    used[name.lower()] += 1
    return name if used[name.lower()] == 1 else f"{name}-{fingerprint(record.id)[:8]}"


def _read_manifest(path: Path) -> dict[str, Any]:
    return read_json(path, "the manifest of a pair dataset", "choose another output_dir")


def gallery(rows: Sequence[dict[str, Any]], manifest: dict[str, Any]) -> str:
    """A page of all tries; unsafe images are blurred until somebody clicks them."""
    reasons = sorted({row["reason"] for row in rows if row["reason"]})
    categories = sorted({row["category"] for row in rows if row["category"]})
    return render("gallery.html", rows=rows, manifest=manifest, reasons=reasons, categories=categories)
