"""An old guard and a new one on the same images, before anybody puts the new one in the old one's place."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from guardkit.api.evaluate import load_contender
from guardkit.artifacts import write_json, written
from guardkit.checks import check_number, check_path, check_whole
from guardkit.classifier import GuardClassifier
from guardkit.data.columns import listing
from guardkit.data.sources.base import Source
from guardkit.encoders.base import Encoder
from guardkit.evaluation.benchmark import read_benchmark
from guardkit.evaluation.comparison import compared, flips, sentence
from guardkit.evaluation.held_out import leave_out_seen, sentences
from guardkit.evaluation.scoring import Contender, embedding_stores, judgment_stores, score
from guardkit.folders import claim, refuse_others
from guardkit.policy import Policy
from guardkit.reports.comparison import page, short_table
from guardkit.schema import SAFE, UNSAFE, InputError

log = logging.getLogger(__name__)

WRITTEN = ("compare.json", "compare.html")
_OLD, _NEW = "old", "new"


@dataclass(frozen=True)
class ComparisonReport:
    """What a comparison gives: the content of compare.json, a table to print, and the folder (None: nothing was written)."""

    figures: dict[str, Any]
    table: str
    folder: Path | None


def compare(
    old: GuardClassifier | str | Path,
    new: GuardClassifier | str | Path,
    source: Source,
    *,
    output_dir: str | Path | None = None,
    split: Literal["test", "all"] = "all",
    test_share: float = 0.3,
    split_seed: int = 0,
    prevalence: float = 0.01,
    n_resamples: int = 1000,
    seed: int = 0,
    trust: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ComparisonReport:
    """Says what a new guard wins and loses against an old one, each at its own thresholds, on images that neither was trained on.

    The same as `python -m guardkit.compare`, with the same defaults and results. Images that one of the guards was trained, validated or calibrated on are
    left out for both, and counted.

    Args:
        old, new: guards, or folders or Hub ids of saved ones. The policy of the new one has all categories of the old one's.
        source: of labelled images.
        output_dir: of compare.json and compare.html; None: nowhere.
        split, test_share, split_seed: which of the source's images, see `calibrate`.
        prevalence: share of unsafe images to state precision for, in (0, 1).
        n_resamples, seed: of the bootstrap.
        trust: packages that saved guards may take their heads and encoders from.
        cache_dir: where embeddings are kept for later runs; None keeps them in memory.
        settings: of a command, for the mark of the folder.
    Raises:
        InputError: a wrong value, policies that do not fit, or nothing left to compare on.
    """
    check_number("prevalence", prevalence, "(0, 1)")
    check_whole("n_resamples", n_resamples, 100)
    check_whole("seed", seed, 0)
    folder = None if output_dir is None else check_path("output_dir", output_dir)
    if folder is not None and folder.is_dir():
        refuse_others(folder, "compare", replaces=True)
    encoders: dict[str, Encoder] = {}
    contenders = [_contender(one, name, encoders, trust) for one, name in ((old, _OLD), (new, _NEW))]
    guards = [one.guard for one in contenders if isinstance(one.guard, GuardClassifier)]
    _check_policies(guards[0].policy, guards[1].policy)
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    benchmark = read_benchmark(source, split=split, test_share=test_share, split_seed=split_seed)
    stores = embedding_stores(contenders, cache)
    benchmark, seen = leave_out_seen(benchmark, contenders, stores)
    notes = sentences(benchmark, seen)
    notes += [
        f"{one.name} keeps no list of its training images: whether it is compared on some of them is not known."
        for one in contenders
        if one.training_images is None
    ]
    sheet = score(benchmark, contenders, stores, judgment_stores(contenders, cache), guards[1].policy.category_names)
    rows = [
        row
        for row in range(len(sheet.records))
        if sheet.counted[row] and all(sheet.embeddings[guard.encoder.fingerprint][row].any() for guard in guards)
    ]
    records = [sheet.records[row] for row in rows]
    labels = {record.label for record in records}
    if labels != {SAFE, UNSAFE}:
        raise InputError(
            f"a comparison needs safe and unsafe images that neither guard has seen, got {sum(record.label == SAFE for record in records)} safe and "
            f"{sum(record.label == UNSAFE for record in records)} unsafe ones; give another source, or another split="
        )
    decisions = [guard.decide(sheet.embeddings[guard.encoder.fingerprint][rows]) for guard in guards]
    figures, changes = compared(guards[0], guards[1], records, decisions, prevalence=prevalence, n_resamples=n_resamples, seed=seed)
    facts: dict[str, Any] = {
        "says": sentence(figures, _OLD, _NEW),
        "guards": {
            name: {
                "name": guard.name,
                "fingerprint": guard.fingerprint,
                "policy": guard.policy.name,
                "thresholds": guard.thresholds.to_dict(),
            }
            for name, guard in zip((_OLD, _NEW), guards, strict=True)
        },
        "images": {
            "source": benchmark.name,
            "chosen": benchmark.chosen,
            "given": benchmark.given,
            "n": len(records),
            "n_unsafe": sum(record.label == UNSAFE for record in records),
            "trained_on": benchmark.n_left_out,
            **listing(benchmark.rejected, sheet.rejected),
        },
        "prevalence": prevalence,
        "figures": figures,
        "flips": flips(changes),
        "changes": [
            {
                "id": one.record.id,
                "label": one.record.label,
                "category": one.record.category,
                "is_win": one.is_win,
                "old": one.old.to_dict(),
                "new": one.new.to_dict(),
            }
            for one in changes
        ],
        "notes": notes,
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        marked = dict(settings) if settings is not None else {"guards": [guard.fingerprint for guard in guards], "source": source.asked}
        with claim(folder, "compare", marked, replaces=WRITTEN):
            with written(folder / "compare.html") as temporary:
                temporary.write_text(page(facts, changes), encoding="utf-8", errors="backslashreplace")
            write_json(folder / "compare.json", facts)
    return ComparisonReport(facts, short_table(facts), folder)


def _contender(guard: GuardClassifier | str | Path, name: str, encoders: dict[str, Encoder], trust: Sequence[str]) -> Contender:
    if isinstance(guard, GuardClassifier):
        return Contender(name, guard, policy=guard.policy, training_images=guard.training_images)
    return load_contender(guard, name, encoders, None, trust)


def _check_policies(old: Policy, new: Policy) -> None:
    missing = [name for name in old.category_names if name not in new.category_names]
    if missing:
        raise InputError(
            f"the new guard's policy {new.name!r} lacks the category {missing[0]!r} of the old one's {old.name!r}: they decide different things; compare guards of "
            "one policy, or of one that was extended"
        )
