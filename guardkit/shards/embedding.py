"""Embedding shards into a folder that other CLIP tools read: a shard in, a numbered part out, the manifest last."""

from __future__ import annotations

import platform
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from guardkit import __version__
from guardkit.artifacts import fingerprint, read_json, write_json, write_table, written
from guardkit.embedding_folder import MANIFEST, REJECTED
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.engines.base import Engine, Put
from guardkit.engines.local import LocalEngine
from guardkit.folders import claim
from guardkit.images import BytesContent, FileContent
from guardkit.limits import MAX_PIXELS
from guardkit.reading import read_table
from guardkit.schema import UNLABELLED, Content, ImageError, InputError, Record, Rejected
from guardkit.shards.columns import own_columns
from guardkit.shards.inputs import Given, Shard
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
        folder: of the embeddings.
        cache_dir: where vectors are kept for later runs; None: only in the folder.
        max_pixels: larger images are rejected.
    """

    def __init__(self, encoder: Encoder, folder: Path, *, cache_dir: Path | None, max_pixels: int) -> None:
        self.encoder, self.folder, self.cache_dir, self.max_pixels = encoder, Path(folder), cache_dir, max_pixels
        self._machine = platform.node()

    def with_parts(self, put: Put) -> Embedding:
        """See `guardkit.engines.base.Put`."""
        return Embedding(put("encoder", self.encoder), self.folder, cache_dir=self.cache_dir, max_pixels=self.max_pixels)

    def do(self, shard: Shard, tick: Callable[[int], None]) -> Entry:
        """See `guardkit.shards.work.Work`."""
        rows: list[Given] = []
        refused: list[tuple[Given, str]] = []
        vectors = Path("img_emb") / f"img_emb_{shard.number}.npy"
        with written(self.folder / vectors) as temporary, _growing(temporary, self.encoder.dim) as add:
            cache_dir = of_this_machine(self.cache_dir, self._machine)
            store = EmbeddingStore(self.encoder, cache_dir, keeps=cache_dir is not None)
            under_way: deque[Given] = deque()
            with closing(store.stream(self._contents(shard, under_way, refused, tick), _n_bytes)) as outcomes:
                for outcome in outcomes:
                    given = replace(under_way.popleft(), data=None)  # the bytes are not wanted any more
                    if isinstance(outcome, ImageError):
                        refused.append((given, str(outcome)))
                    else:
                        add(outcome[None])
                        rows.append(given)
                    tick(1)
        table = Path("metadata") / f"metadata_{shard.number}.parquet"
        write_table(self.folder / table, _metadata(rows, shard.schema))
        files = [vectors, table]
        if refused:
            files.append(Path(LEDGER) / f"{shard.number:06d}_rejected.parquet")
            write_table(self.folder / files[-1], _rejected(refused, shard.number))
        return {
            "given": len(rows) + len(refused),
            "written": len(rows),
            "rejected": len(refused),
            "files": {path.as_posix(): (self.folder / path).stat().st_size for path in files},
        }

    def _contents(
        self, shard: Shard, under_way: deque[Given], refused: list[tuple[Given, str]], tick: Callable[[int], None]
    ) -> Iterator[Content]:
        """What is to be embedded, noted as under way; what cannot be is refused."""
        for given in shard:
            if given.data is None:
                refused.append((given, given.reason))
                tick(1)
            else:
                under_way.append(given)
                yield self._content(given)

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
    folder: Path,
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
        folder: written to; one that another encoder or another tool filled is refused. Shards that are there and did not change are kept.
        rejected: inputs that were already found unusable, to be listed with the rest.
        engine: does the work; None: this process.
        cache_dir: where vectors are kept for later runs.
        max_pixels: larger images are rejected.
    Returns:
        Counts: given = written + rejected.
    Raises:
        InputError: the folder holds embeddings of another encoder, or some that guardkit did not write; or it cannot be written.
    """
    folder = Path(folder)

    def recognise() -> dict[str, Any] | None:
        # a copy without hidden files has no mark
        return {"encoder": str(_manifest(folder).get("encoder_fingerprint"))} if (folder / MANIFEST).is_file() else None

    settings = {"encoder": encoder.fingerprint}
    with claim(folder, "embed", settings, recognise=recognise, differs="made by another encoder"):
        listed = list(shards)
        known = _unpacked(folder)
        work = Embedding(encoder, folder, cache_dir=cache_dir, max_pixels=max_pixels)
        entries = work_on(work, listed, engine or LocalEngine(), what="embedding images", known=known)
        return _finished(work, listed, entries, rejected)


def _finished(work: Embedding, shards: Sequence[Shard], entries: Sequence[Entry], rejected: Sequence[Rejected]) -> dict[str, int]:
    folder, encoder = work.folder, work.encoder
    for stale in [*folder.glob("img_emb/img_emb_*.npy"), *folder.glob("metadata/metadata_*.parquet")]:
        if not _is_number_below(stale, len(shards)):
            stale.unlink()
    tables = [_rejected([(Given(one.id, None), one.reason) for one in rejected], None)]
    for shard, entry in zip(shards, entries, strict=True):
        if entry["rejected"]:
            tables.append(read_table(folder / LEDGER / f"{shard.number:06d}_rejected.parquet", mend=_MEND))
    write_table(folder / REJECTED, pa.concat_tables(tables, promote_options="permissive"))
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
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / LEDGER, ignore_errors=True)
    return counts


def _unpacked(folder: Path) -> dict[int, Entry]:
    """The entries of a folder that was finished before, whose manifest is taken away, because it will not be whole for a while."""
    known: dict[int, Entry] = {}
    if (folder / MANIFEST).is_file():
        entries = _manifest(folder).get("shards")
        if isinstance(entries, list) and all(isinstance(one, dict) and isinstance(one.get("files"), dict) for one in entries):
            known = dict(enumerate(entries))
        if any(one.get("rejected") for one in known.values()):
            known = _with_rejected(folder, known)
        (folder / MANIFEST).unlink()
    return known


def _with_rejected(folder: Path, known: dict[int, Entry]) -> dict[int, Entry]:
    """The same, the rejected rows of each shard in a file of its own again; those whose rows are not as counted are left out."""
    try:
        table = read_table(folder / REJECTED, pa.schema({"id": pa.string(), "reason": pa.string(), "shard": pa.int32()}))
    except InputError:
        return {number: entry for number, entry in known.items() if not entry.get("rejected")}
    found = {}
    for number, entry in known.items():
        if entry.get("rejected"):
            mine = table.filter(pa.compute.equal(table["shard"], number))
            if len(mine) != entry["rejected"]:
                continue
            path = Path(LEDGER) / f"{number:06d}_rejected.parquet"
            write_table(folder / path, mine)
            entry = entry | {"files": {**entry["files"], path.as_posix(): (folder / path).stat().st_size}}
        found[number] = entry
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST, "the manifest of an embedding folder", "embed the images into another folder")


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
