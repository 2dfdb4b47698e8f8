"""Embedding shards into a folder that other CLIP tools read: a shard in, a numbered part out, the manifest last."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from guardkit import __version__
from guardkit.artifacts import fingerprint, write_json, write_table
from guardkit.checks import is_whole
from guardkit.embedding_folder import MANIFEST, REJECTED
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.engines.base import Engine, Put
from guardkit.engines.local import engine_of
from guardkit.images import BytesContent, FileContent
from guardkit.limits import MAX_PIXELS
from guardkit.reading import read_table
from guardkit.schema import UNLABELLED, Content, ImageError, InputError, Record, Rejected
from guardkit.shards.base import Given, Shard, fetched
from guardkit.shards.columns import own_columns
from guardkit.shards.output import Output
from guardkit.shards.work import LEDGER, Entry, work_on
from guardkit.stores import of_this_machine

_BOX = ("x_min", "y_min", "x_max", "y_max")
_RECORDS = pa.schema(
    {
        "label": pa.int8(),
        "category": pa.string(),
        "source": pa.string(),
        "group": pa.string(),
        "caption": pa.string(),
        **dict.fromkeys(_BOX, pa.float64()),
    }
)
_MEND = "delete it, and run the same command again"


class Embedding:
    """What `embed` does to a shard.

    Args:
        encoder: frozen; images to unit vectors.
        output: of the embeddings.
        cache_dir: where vectors are kept for later runs; None: only in the folder.
        max_pixels: larger images are rejected.
    """

    def __init__(self, encoder: Encoder, output: Output, *, cache_dir: Path | None, max_pixels: int) -> None:
        self.encoder, self.output, self.cache_dir, self.max_pixels = encoder, output, cache_dir, max_pixels
        self._machine = platform.node()

    def with_parts(self, put: Put) -> Embedding:
        """See `guardkit.engines.base.Put`."""
        return Embedding(put("encoder", self.encoder), self.output, cache_dir=self.cache_dir, max_pixels=self.max_pixels)

    def do(self, shard: Shard, tick: Callable[[int], None]) -> Entry:
        """See `guardkit.shards.work.Work`."""
        rows: list[Given] = []
        refused: list[tuple[int, Given, str]] = []
        files: dict[str, int] = {}
        with self._noted(f"img_emb/img_emb_{shard.number}.npy", files) as path, _growing(path, self.encoder.dim) as add:
            cache_dir = of_this_machine(self.cache_dir, self._machine)
            store = EmbeddingStore(self.encoder, cache_dir, keeps=cache_dir is not None)
            under_way: deque[tuple[int, Given]] = deque()
            with closing(store.stream(self._contents(shard, under_way, refused, tick), _n_bytes)) as outcomes:
                for outcome in outcomes:
                    number, given = under_way.popleft()
                    given = replace(given, data=None)  # the bytes are not wanted any more
                    if isinstance(outcome, ImageError):
                        refused.append((number, given, str(outcome)))
                    else:
                        add(outcome[None])
                        rows.append(given)
                    tick(1)
        with self._noted(f"metadata/metadata_{shard.number}.parquet", files) as path:
            write_table(path, _metadata(rows, shard.schema))
        if refused:
            # in the order of the inputs, whoever was read ahead of whom
            in_order = [(given, reason) for _, given, reason in sorted(refused, key=lambda one: one[0])]
            with self._noted(_rejected_file(shard.number), files) as path:
                write_table(path, _rejected(in_order, shard.number))
        return {"given": len(rows) + len(refused), "written": len(rows), "rejected": len(refused), "files": files}

    def _contents(
        self, shard: Shard, under_way: deque[tuple[int, Given]], refused: list[tuple[int, Given, str]], tick: Callable[[int], None]
    ) -> Iterator[Content]:
        """What is to be embedded, noted as under way; what cannot be is refused."""
        with closing(fetched(shard)) as inputs:
            for number, given in enumerate(inputs):
                if given.data is None:
                    refused.append((number, given, given.reason))
                    tick(1)
                else:
                    under_way.append((number, given))
                    yield self._content(given)

    @contextmanager
    def _noted(self, name: str, files: dict[str, int]) -> Iterator[Path]:
        with self.output.written(name) as path:
            yield path
            files[name] = path.stat().st_size

    def _content(self, given: Given) -> Content:
        if isinstance(given.data, Path):
            return FileContent(given.data, self.max_pixels)
        return BytesContent(given.data, given.id, self.max_pixels) if isinstance(given.data, bytes) else given.data  # type: ignore[return-value]


def shards_of_records(records: Sequence[Record], size: int) -> list[Shard]:
    """Records of a source as shards, `size` in each.

    Args:
        records: with contents; a label of -1 is written as null.
        size: at least 1.
    """
    shards = []
    for number, first in enumerate(range(0, len(records), size)):
        some = records[first : first + size]
        said = [[one.id, one.label, one.category, one.source, one.group, one.caption, one.region, content_key(one.content)] for one in some]
        items = [Given(one.id, one.content, "", _said(one)) for one in some]
        name = f"images {first + 1} to {first + len(some)}"
        shards.append(Shard(number, name, fingerprint(said), items, len(items), schema=_RECORDS))
    return shards


def write_embedding_folder(
    shards: Iterable[Shard],
    encoder: Encoder,
    place: str | Path,
    *,
    rejected: Sequence[Rejected] = (),
    engine: Engine | None = None,
    cache_dir: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, int]:
    """Embeds shards into a folder in the layout that clip-retrieval and autofaiss read; the manifest comes last.

    Args:
        shards: of images, numbered from 0.
        encoder: frozen.
        place: a folder, or a URL of an object storage; one that another encoder or another tool filled is refused. Shards that are there and did not change are kept.
        rejected: inputs that were already found unusable, to be listed with the rest.
        engine: does the work; None: this process.
        cache_dir: where vectors are kept for later runs.
        max_pixels: larger images are rejected.
    Returns:
        Counts: given = written + rejected.
    Raises:
        InputError: the folder holds embeddings of another encoder, or some that guardkit did not write; or it cannot be written.
    """
    output, engine = Output(place), engine_of(engine)

    def recognise() -> dict[str, Any] | None:
        # a copy without hidden files has no mark
        return {"encoder": str(_manifest(output).get("encoder_fingerprint"))} if output.size(MANIFEST) is not None else None

    settings = {"encoder": encoder.fingerprint}
    with output.claimed("embed", settings, recognise=recognise):
        listed = list(shards)
        known = _unpacked(output)
        work = Embedding(encoder, output, cache_dir=cache_dir, max_pixels=max_pixels)
        entries = work_on(work, listed, engine, what="embedding images", known=known)
        return _finished(work, listed, entries, rejected)


def _finished(work: Embedding, shards: Sequence[Shard], entries: Sequence[Entry], rejected: Sequence[Rejected]) -> dict[str, int]:
    output, encoder = work.output, work.encoder
    for name in output.sizes():
        if name.startswith(("img_emb/img_emb_", "metadata/metadata_")) and not _is_number_below(Path(name), len(shards)):
            output.delete(name)
    tables = [_rejected([(Given(one.id, None), one.reason) for one in rejected], None)]
    with output.here([_rejected_file(shard.number) for shard, entry in zip(shards, entries, strict=True) if entry["rejected"]]) as paths:
        tables += [read_table(path, mend=_MEND) for path in paths]
    with output.written(REJECTED) as temporary:
        write_table(temporary, pa.concat_tables(tables, promote_options="permissive"))
    counts = {name: sum(entry[name] for entry in entries) for name in ("given", "written", "rejected")}
    counts = {"given": counts["given"] + len(rejected), "written": counts["written"], "rejected": counts["rejected"] + len(rejected)}
    manifest: dict[str, Any] = {
        "encoder": encoder.config | {"name": encoder.name},
        "encoder_fingerprint": encoder.fingerprint,
        "preprocessing": encoder.preprocessing,
        "dim": encoder.dim,
        "dtype": "float16",
        "normalized": True,
        "n_shards": len(shards),
        "guardkit_version": __version__,
        **counts,
        "shards": [entry | {"files": {name: n for name, n in entry["files"].items() if not name.startswith(LEDGER)}} for entry in entries],
    }
    with output.written(MANIFEST) as temporary:
        write_json(temporary, manifest)
    output.clear(LEDGER)
    return counts


def _unpacked(output: Output) -> dict[int, Entry]:
    """The entries of a folder that was finished before, whose manifest is taken away, because it will not be whole for a while."""
    if output.size(MANIFEST) is None:
        return {}
    known: dict[int, Entry] = {}
    entries = _manifest(output).get("shards")
    if isinstance(entries, list):
        known = {number: entry for number, entry in enumerate(entries) if _is_counted(entry)}
    if any(one.get("rejected") for one in known.values()):
        known = _with_rejected(output, known)
    output.delete(MANIFEST)
    return known


def _is_counted(entry: Any) -> bool:
    """Whether an entry of a manifest, which may be somebody's, is one of ours."""
    if not isinstance(entry, dict) or not isinstance(entry.get("files"), dict) or not entry["files"]:
        return False
    counts = [one for name in ("given", "written", "rejected") if is_whole(one := entry.get(name)) and one >= 0]
    return len(counts) == 3 and counts[0] == counts[1] + counts[2]


def _with_rejected(output: Output, known: dict[int, Entry]) -> dict[int, Entry]:
    """The same, the rejected rows of each shard in a file of its own again; those whose rows are not as counted are left out."""
    try:
        with output.here([REJECTED]) as (path,):
            table = read_table(path, pa.schema({"id": pa.string(), "reason": pa.string(), "shard": pa.int32()}))
    except InputError:
        return {number: entry for number, entry in known.items() if not entry.get("rejected")}
    found = {}
    for number, entry in known.items():
        if entry.get("rejected"):
            mine = table.filter(pa.compute.equal(table["shard"], number))
            if len(mine) != entry["rejected"]:
                continue
            name = _rejected_file(number)
            with output.written(name) as temporary:
                write_table(temporary, mine)
                n_bytes = temporary.stat().st_size
            entry = entry | {"files": {**entry["files"], name: n_bytes}}
        found[number] = entry
    return found


def _rejected_file(number: int) -> str:
    return f"{LEDGER}/{number:06d}_rejected.parquet"


def _manifest(output: Output) -> dict[str, Any]:
    return output.json(MANIFEST, "the manifest of an embedding folder")


# --- rows -------------------------------------------------------------------------------------------------------------


def _n_bytes(content: Content) -> int:
    return len(content.data) if isinstance(content, BytesContent) else 0


@contextmanager
def _growing(path: Path, dim: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Adds rows, in half precision, to a .npy file whose number of rows is not known yet."""
    n = 0
    with open(path, "wb") as file:

        def head() -> None:  # NumPy leaves room in it for any number of rows
            np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (n, dim)})

        def add(vectors: np.ndarray) -> None:
            nonlocal n
            file.write(np.ascontiguousarray(vectors, "<f2").tobytes())
            n += len(vectors)

        head()
        yield add
        file.seek(0)
        head()


def _metadata(rows: Sequence[Given], schema: pa.Schema | None) -> pa.Table:
    ids = pa.array([one.id for one in rows], pa.string())
    return pa.table({"image_path": ids, **own_columns([one.columns for one in rows], ("image_path",), schema)})


def _rejected(refused: Sequence[tuple[Given, str]], shard: int | None) -> pa.Table:
    """With what those inputs say of themselves: nothing of it is lost."""
    ours = {
        "id": pa.array([one.id for one, _ in refused], pa.string()),
        "reason": pa.array([reason for _, reason in refused], pa.string()),
        "shard": pa.array([shard] * len(refused), pa.int32()),
    }
    return pa.table(ours | own_columns([one.columns for one, _ in refused], ours))


def _said(record: Record) -> dict[str, Any]:
    return {
        "label": None if record.label == UNLABELLED else record.label,
        "category": record.category,
        "source": record.source,
        "group": record.group,
        "caption": record.caption,
        **dict(zip(_BOX, record.region or (None,) * 4, strict=True)),
    }


def content_key(content: Content | None) -> str:
    """What tells an image from others: a hash, or why there is none."""
    try:
        return "" if content is None else content.key
    except ImageError as error:
        return str(error)


def _is_number_below(path: Path, most: int) -> bool:
    number = path.stem.rpartition("_")[2]
    return number == str(int(number)) and int(number) < most if number.isdigit() else False
