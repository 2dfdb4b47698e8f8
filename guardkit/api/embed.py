"""Embedding images once, into a folder that other tools read too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from guardkit.checks import check_whole
from guardkit.data.columns import RecordTable
from guardkit.data.grouping import load_source
from guardkit.data.sources.base import Source
from guardkit.encoders.base import Encoder
from guardkit.engines.base import Engine
from guardkit.limits import MAX_PIXELS
from guardkit.schema import InputError, Rejected
from guardkit.shards.base import Shard
from guardkit.shards.embedding import shards_of_records, write_embedding_folder
from guardkit.shards.inputs import Inputs
from guardkit.shards.output import Output


def embed(
    source: Source | None = None,
    *,
    encoder: Encoder,
    output_dir: str | Path,
    input: str | Path | Sequence[str | Path] | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    file_column: str = "file_name",
    max_pixels: int = MAX_PIXELS,
    limit: int | None = None,
    shard_size: int = 10_000,
    cache_dir: str | Path | None = None,
    engine: Engine | None = None,
) -> dict[str, int]:
    """Embeds images into an embedding folder: every image of a source, test images and unlabelled ones included, or everything that `input` holds.

    A tar or Parquet file of `input` becomes one part of the folder, loose files and images of a source one part for every `shard_size`. Parts
    that are there, and whose images did not change, are kept: a run that was stopped goes on where it was.

    Args:
        source: of images, looked at as training does: labels are read, what is the same image gets one group.
        encoder: frozen; images to unit vectors.
        output_dir: of the embedding folder, or a URL of an object storage. One that was begun with the same encoder is gone on with.
        input: instead of a source: a folder, tar shards as img2dataset and webdataset write them, Parquet files with encoded images, lists of
            paths, or several of these, see `guardkit.shards.inputs.Inputs`. Nothing is asked of them but images; what they say beside is kept in
            the columns of the metadata.
        image_column, id_column, file_column: of Parquet files and tables of paths in `input`, see there.
        max_pixels: larger images of `input` are rejected.
        limit: embed only the first so many images.
        shard_size: images of a part.
        cache_dir: where embeddings are kept for later runs; None keeps them in the folder only.
        engine: does the work; None: this process.
    Returns:
        given, written and rejected; given is the sum of the others.
    Raises:
        InputError: a wrong value, a source that holds embeddings already, or a folder of another command or encoder.
    """
    check_whole("limit", limit, 1, optional=True)
    check_whole("shard_size", shard_size, 1)
    check_whole("max_pixels", max_pixels, 1)
    output = Output(output_dir)
    if (source is None) == (input is None):
        raise InputError("give either source, whose labels are read, or input, of which nothing is asked but images; got both or neither")
    output.check_owner("embed")
    _ = encoder.dim  # loads it: what is wrong is said before the images are read
    shards: list[Shard]
    rejected: Sequence[Rejected] = []
    if source is not None:
        loaded = load_source(source, for_training=False)
        if isinstance(loaded.train, RecordTable):  # of which there may be millions
            raise InputError("source=embeddings holds embeddings already; choose a source of images")
        records = [*loaded.train, *(loaded.test or []), *loaded.set_aside]
        if any(record.content is None for record in records):
            raise InputError("source=embeddings holds embeddings already; choose a source of images")
        shards, rejected = shards_of_records(records[:limit], shard_size), loaded.rejected
    else:
        assert input is not None
        given = Inputs(input, image_column=image_column, id_column=id_column, file_column=file_column, outside=output.folder or output.url)
        shards = list(given.shards(shard_size, limit))
        if not shards:
            raise InputError(f"input={input} holds nothing to embed; give a folder of images, tar or Parquet files, or a list of paths")
    return write_embedding_folder(
        shards,
        encoder,
        output_dir,
        rejected=rejected,
        engine=engine,
        cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
        max_pixels=max_pixels,
    )
