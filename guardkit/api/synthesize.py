"""Making a pair dataset of a source's images."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Literal

from guardkit.checks import check_choice, check_path, check_whole
from guardkit.counterfactual.edits import Edits
from guardkit.counterfactual.pair_dataset import write_pair_dataset
from guardkit.data.budget import check_edits
from guardkit.data.grouping import load_source
from guardkit.data.sources.base import Source
from guardkit.editors.base import Editor
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.engines.base import Engine
from guardkit.engines.local import engine_of
from guardkit.fitting.parts import check_parts
from guardkit.folders import refuse_others
from guardkit.policy import Policy
from guardkit.schema import InputError
from guardkit.shards.pairing import edits_on
from guardkit.shards.work import LEDGER

log = logging.getLogger(__name__)

_LABELS = {"to_safe": (1,), "to_unsafe": (0,), "both": (1, 0)}


def synthesize(
    source: Source,
    policy: Policy,
    *,
    editor: Editor | Edits,
    encoder: Encoder,
    output_dir: str | Path,
    direction: Literal["to_safe", "to_unsafe", "both"] = "to_safe",
    variants_per_image: int = 1,
    limit: int | None = None,
    shard_size: int = 64,
    cache_dir: str | Path | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Makes a pair dataset of a source's images, test images left out.

    Args:
        source: of images.
        policy: says what is unsafe.
        editor: makes the edits; with an instructor, a verifier or several tries: `Edits`.
        encoder: embeds images for verifiers.
        output_dir: of the dataset. One that was begun with the same settings is gone on with.
        direction: which images are edited. Only drawn images are made unsafe.
        variants_per_image: edits wanted of each image.
        limit: edit only the first so many images.
        shard_size: images that are edited and noted together, taken up to whole batches of edits.
        cache_dir: where edits are kept; None: inside the folder.
        engine: does the work; None: this process.
    Returns:
        The dataset's manifest.
    Raises:
        InputError: a wrong value, nothing to edit, or a folder of another command or other settings.
    """
    check_whole("limit", limit, 1, optional=True)
    check_whole("variants_per_image", variants_per_image, 1)
    check_whole("shard_size", shard_size, 1)
    check_choice("direction", direction, _LABELS)
    engine = engine_of(engine)
    folder = check_path("output_dir", output_dir)
    refuse_others(folder, "synthesize", replaces=False)
    cache = folder / ".cache" if cache_dir is None else Path(cache_dir).expanduser()
    store = EmbeddingStore(encoder, cache)
    pipeline = Edits.of(editor).pipeline(policy, store, cache)
    check_parts(encoder, pipeline, policy)
    loaded = load_source(source)
    if direction != "to_safe" and not loaded.is_drawn:
        raise InputError(
            f"direction={direction} would make unsafe images of source={source.name}; real images are edited to the safe side only"
        )
    records = [record for label in _LABELS[direction] for record in loaded.train if record.label == label and (label or record.category)]
    if any(record.content is None for record in records):
        raise InputError("source=embeddings holds no images to edit; choose a source of images")
    if not records:
        raise InputError(f"source={source.name} has no image to edit in direction={direction}")
    pipeline.supply(loaded.train)
    records = records[:limit]
    for note in check_edits(pipeline, [("images", "counterfactual", records)], f"source={source.name}"):
        log.warning("%s", note)
    manifest = write_pair_dataset(
        records,
        pipeline,
        folder,
        made_from=source.asked,
        variants_per_image=variants_per_image,
        rejected=loaded.rejected,
        edit=edits_on(engine, pipeline, folder, variants_per_image=variants_per_image, shard_size=shard_size),
    )
    shutil.rmtree(folder / LEDGER, ignore_errors=True)
    return manifest
