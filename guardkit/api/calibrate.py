"""Setting a guard's thresholds with a promise, and making its scores probabilities."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from guardkit.api.evaluate import load_contender
from guardkit.artifacts import write_json, write_table, written
from guardkit.checks import check_path
from guardkit.classifier import GuardClassifier
from guardkit.data.sources.base import Source
from guardkit.evaluation.benchmark import read_benchmark
from guardkit.evaluation.calibration import SCORES, Asked, calibrated, scores_of
from guardkit.evaluation.held_out import leave_out_seen, sentences
from guardkit.evaluation.scoring import Contender, embed, embedding_stores
from guardkit.folders import claim, refuse_others
from guardkit.progress import progress
from guardkit.reports.calibration import draw, facts, table
from guardkit.schema import InputError, Rejected
from guardkit.seen import NEAR, SeenImages

log = logging.getLogger(__name__)

WRITTEN = ("guard", "calibration.json", "calibration.png", SCORES)
_BLOCK = 512


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration gives.

    Attributes:
        guard: with its new thresholds and scores.
        figures: the content of calibration.json.
        table: the main ones, to print.
        folder: where everything is written; None: nothing was.
    """

    guard: GuardClassifier
    figures: dict[str, Any]
    table: str
    folder: Path | None


def calibrate(
    guard: GuardClassifier | str | Path,
    source: Source,
    *,
    max_fpr: float | None = None,
    min_recall: float | None = None,
    queue_per_day: float | None = None,
    volume_per_day: float | None = None,
    prevalence: float = 0.01,
    confidence: float = 0.9,
    by_category: bool = True,
    split: Literal["test", "all"] = "all",
    test_share: float = 0.3,
    split_seed: int = 0,
    trust: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> CalibrationReport:
    """Sets a guard's thresholds so that they keep a promise, from labelled images that it was not trained on.

    The same as `python -m guardkit.calibrate`, with the same defaults and results. Images that the guard was trained or validated on
    are left out and counted. A promise holds for images that are drawn like those of the source, whatever their scores are distributed
    like: over all calibrations it is broken in at most 1 - confidence of them.

    Args:
        guard: a `GuardClassifier`, or the folder or Hub id of a saved one. It stays as it is.
        source: of labelled images like those that the guard will see.
        max_fpr: at most this share of safe images is blocked, in (0, 1).
        min_recall: at least this share of unsafe images is blocked or reviewed, in (0, 1). With `max_fpr`, images between the two thresholds
            are reviewed; either alone sets one threshold, and nothing is reviewed.
        queue_per_day: at most so many images a day are reviewed, of `volume_per_day`; instead of `min_recall`.
        volume_per_day: images in a day.
        prevalence: share of unsafe images among those the guard will see, in (0, 1): scores become probabilities for it.
        confidence: that a promise holds, each by itself, in (0, 1).
        by_category: promise the same shares of each category's own thresholds, as far as there are images enough.
        split: "all": every image that the guard was not trained on; "test": the source's own test images, or the share that training holds out.
        test_share, split_seed: of that share.
        trust: packages that a saved guard may take its head and encoder from.
        cache_dir: where embeddings are kept for later runs; None keeps them in memory.
        output_dir: where the new guard and its figures go; None: nowhere.
        settings: of a command, for the mark of the folder.
    Raises:
        InputError: a wrong value, a class is missing, or too few images for a promise of the decision.
    """
    asked = Asked(max_fpr, min_recall, queue_per_day, volume_per_day, prevalence, confidence, by_category)
    folder = None if output_dir is None else check_path("output_dir", output_dir)
    if folder is not None and folder.is_dir():
        refuse_others(folder, "calibrate", replaces=True)
    contender = load_contender(guard, None, {}, None, trust) if isinstance(guard, str | Path) else _contender(guard)
    before = contender.guard
    assert isinstance(before, GuardClassifier)
    if contender.training_images is not None:
        # thresholds are chosen anew, so that the images of an earlier calibration may be used again
        contender = replace(contender, training_images=contender.training_images.without("calibration"))
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    benchmark = read_benchmark(source, split=split, test_share=test_share, split_seed=split_seed)
    stores = embedding_stores([contender], cache)
    benchmark, seen = leave_out_seen(benchmark, [contender], stores)
    notes = sentences(benchmark, seen)
    if contender.training_images is None:
        notes.append("this guard keeps no list of its training images: a promise only holds if none of them is among these.")
    if benchmark.encoder_fingerprint not in (None, before.encoder.fingerprint):
        raise InputError(
            f"source={benchmark.name} holds embeddings of another encoder than the guard's, {before.encoder.name}; embed the images with it"
        )
    unreadable: dict[int, str] = {}
    vectors = np.zeros((len(benchmark.records), before.encoder.dim), np.float32)
    for start in progress(range(0, len(vectors), _BLOCK), total=-(-len(vectors) // _BLOCK), what=f"embedding images, {_BLOCK} at a time"):
        failed: dict[int, str] = {}
        vectors[start : start + _BLOCK] = embed(benchmark.records[start : start + _BLOCK], stores[before.encoder.fingerprint], failed)
        unreadable |= {start + row: reason for row, reason in failed.items()}
    unreadable |= {int(row): "no embedding" for row in np.flatnonzero(~vectors.any(axis=1)) if int(row) not in unreadable}
    rejected = [*benchmark.rejected, *(Rejected(benchmark.records[row].id, reason) for row, reason in sorted(unreadable.items()))]
    kept = [row for row in range(len(vectors)) if row not in unreadable]
    records = [benchmark.records[row] for row in kept]
    made, columns = calibrated(before, records, vectors[kept], asked, about={"source": benchmark.name})
    here = columns[0].figures
    if here["flagged_of_unsafe"]["value"] <= here["flagged_of_safe"]["value"]:
        notes.append(
            f"on these images the guard is no better than chance at its new thresholds: it flags {here['flagged_of_unsafe']['value']:.3f} of the unsafe ones and "
            f"{here['flagged_of_safe']['value']:.3f} of the safe ones; a promise is kept by a guard of no use too"
        )
    near = getattr(source, "near_duplicate_distance", NEAR)
    mine = SeenImages.of([("calibration", record, vector) for record, vector in zip(records, vectors[kept], strict=True)], near=near)
    made.training_images = mine if contender.training_images is None else contender.training_images.joined(mine)
    figures = facts(before, made, columns, asked, benchmark, rejected, notes)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        marked = dict(settings) if settings is not None else {"guard": before.fingerprint, "source": source.asked, **asdict(asked)}
        with claim(folder, "calibrate", marked, replaces=WRITTEN):
            made.save_pretrained(folder / "guard")
            with written(folder / "calibration.png") as temporary:
                draw(columns[0], asked.prevalence, temporary)
            # of a guard with these very scores: whose thresholds are is no matter
            about = {"guard": made.fingerprint}
            write_table(folder / SCORES, pa.table(scores_of(made, records, vectors[kept])).replace_schema_metadata(about))
            write_json(folder / "calibration.json", figures)
    return CalibrationReport(made, figures, table(figures), folder)


def _contender(guard: GuardClassifier) -> Contender:
    return Contender(guard.name, guard, policy=guard.policy, training_images=guard.training_images)
