"""Embedding every image of a source once, into a folder that other tools read too."""

from __future__ import annotations

from pathlib import Path

from guardkit.checks import check_whole
from guardkit.data.grouping import load_source
from guardkit.data.sources.base import Source
from guardkit.embedding_folder import write_embedding_folder
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.folders import refuse_others
from guardkit.schema import InputError


def embed(
    source: Source,
    *,
    encoder: Encoder,
    output_dir: str | Path,
    limit: int | None = None,
    shard_size: int = 10_000,
    cache_dir: str | Path | None = None,
) -> dict[str, int]:
    """Embeds every image of a source, test images and unlabelled ones included, into an embedding folder.

    Args:
        source: of images.
        encoder: frozen; images to unit vectors.
        output_dir: of the embedding folder. One that was begun with the same encoder and source is gone on with.
        limit: embed only the first so many images.
        shard_size: rows of a part.
        cache_dir: where embeddings are kept for later runs; None keeps them in memory.
    Returns:
        given, written and rejected; given is the sum of the others.
    Raises:
        InputError: a wrong value, a source that holds embeddings already, or a folder of another command or encoder.
    """
    check_whole("limit", limit, 1, optional=True)
    check_whole("shard_size", shard_size, 1)
    folder = Path(output_dir).expanduser()
    refuse_others(folder, "embed", replaces=False)
    _ = encoder.dim  # loads it: what is wrong is said before the images are read
    loaded = load_source(source, for_training=False)
    records = [*loaded.train, *(loaded.test or []), *loaded.set_aside]
    if any(record.content is None for record in records):
        raise InputError("source=embeddings holds embeddings already; choose a source of images")
    store = EmbeddingStore(encoder, None if cache_dir is None else Path(cache_dir).expanduser())
    return write_embedding_folder(records[:limit], store, folder, rejected=loaded.rejected, shard_size=shard_size)
