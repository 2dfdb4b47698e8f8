"""Making a pair dataset of a source's images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from guardkit.checks import check_choice, check_whole
from guardkit.counterfactual.instructor import Instructor
from guardkit.counterfactual.pair_dataset import write_pair_dataset
from guardkit.counterfactual.verifier import Verifier
from guardkit.data.budget import check_edits
from guardkit.data.grouping import load_source
from guardkit.data.sources.base import Source
from guardkit.editors.base import Editor
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.fitting.parts import VerifierFactory, check_parts, make_pipeline
from guardkit.folders import refuse_others
from guardkit.policy import Policy
from guardkit.schema import InputError

log = logging.getLogger(__name__)

_LABELS = {"to_safe": (1,), "to_unsafe": (0,), "both": (1, 0)}


def synthesize(
    source: Source,
    policy: Policy,
    *,
    editor: Editor,
    encoder: Encoder,
    output_dir: str | Path,
    instructor: Instructor | None = None,
    verifier: Verifier | VerifierFactory | None = None,
    direction: Literal["to_safe", "to_unsafe", "both"] = "to_safe",
    variants_per_image: int = 1,
    limit: int | None = None,
    edit_batch_size: int = 16,
    edit_max_tries: int = 1,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Makes a pair dataset of a source's images, test images left out.

    Args:
        source: of images.
        policy: says what is unsafe.
        editor: makes the edits.
        encoder: embeds images for verifiers.
        output_dir: of the dataset. One that was begun with the same settings is gone on with.
        instructor: writes what the editor is asked for; None: a template of the policy's words.
        verifier: judges edits, or a function of `store` and `policy` that makes one; None keeps all that changed the image.
        direction: which images are edited. Only drawn images are made unsafe.
        variants_per_image: edits wanted of each image.
        limit: edit only the first so many images.
        edit_batch_size: edits asked of the editor at once.
        edit_max_tries: how often a rejected edit is tried.
        cache_dir: where edits are kept; None: inside the folder.
    Returns:
        The dataset's manifest.
    Raises:
        InputError: a wrong value, nothing to edit, or a folder of another command or other settings.
    """
    check_whole("limit", limit, 1, optional=True)
    check_whole("variants_per_image", variants_per_image, 1)
    check_choice("direction", direction, _LABELS)
    folder = Path(output_dir).expanduser()
    refuse_others(folder, "synthesize", replaces=False)
    cache = folder / ".cache" if cache_dir is None else Path(cache_dir).expanduser()
    store = EmbeddingStore(encoder, cache)
    pipeline = make_pipeline(
        policy,
        store,
        editor=editor,
        instructor=instructor,
        verifier=verifier,
        cache_dir=cache,
        edit_batch_size=edit_batch_size,
        edit_max_tries=edit_max_tries,
    )
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
    records = records[:limit]
    for note in check_edits(pipeline, [("images", "counterfactual", records)], f"source={source.name}"):
        log.warning("%s", note)
    return write_pair_dataset(
        records, pipeline, folder, made_from=source.asked, variants_per_image=variants_per_image, rejected=loaded.rejected
    )
