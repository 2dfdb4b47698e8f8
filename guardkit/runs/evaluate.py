"""One evaluation from a composed configuration to a folder of results."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from guardkit.checks import check_number, check_whole
from guardkit.evaluation.benchmark import read_benchmark
from guardkit.evaluation.effectiveness import Sheet, covered_rows, make_sheet, measure
from guardkit.evaluation.held_out import leave_out_seen, sentences
from guardkit.evaluation.report import Evaluation, short_table, write_report
from guardkit.evaluation.robustness import RobustnessSettings, measure_robustness, write_robustness
from guardkit.evaluation.scoring import Contender, LazyImages, embedding_stores, score
from guardkit.folders import claim, refuse_others
from guardkit.runs.contenders import build_contenders
from guardkit.runs.hydra import cache_dir, make, settings_of
from guardkit.schema import InputError

log = logging.getLogger(__name__)

WRITTEN = ("effectiveness.parquet", "predictions.parquet", "robustness.parquet", "summary.json", "report.html", "report.md", "*.png")


@dataclass(frozen=True)
class Report:
    """What an evaluation leaves: its folder, the content of summary.json, and a table to print."""

    folder: Path
    summary: dict[str, Any]
    table: str


def run(cfg: DictConfig, folder: Path) -> Report:
    """Measures guards and baselines side by side and writes everything the contract promises of `evaluate`.

    Args:
        cfg: composed from conf/evaluate.yaml.
        folder: results are written there under their names when complete.
    Raises:
        InputError: a wrong value, named with what is allowed.
    """
    started = time.perf_counter()
    for name, least in (("seed", 0), ("split_seed", 0), ("n_resamples", 100)):
        check_whole(name, cfg[name], least)
    check_number("prevalence", cfg.prevalence, "(0, 1)")
    refuse_others(folder, "evaluate", replaces=True)
    cache = cache_dir(cfg)
    attacks: RobustnessSettings = make(cfg.robustness)
    rules, contenders, notes = build_contenders(cfg)
    everything = read_benchmark(make(cfg.source, policy=rules), split=cfg.split, test_share=cfg.test_share, split_seed=cfg.split_seed)
    stores = embedding_stores(contenders, cache)
    benchmark, seen = leave_out_seen(everything, contenders, stores)
    notes += sentences(benchmark, seen)
    for note in notes:
        log.warning("%s", note)
    built = time.perf_counter()
    scored = score([*benchmark.records, *benchmark.twins], contenders, stores, cache, encoder_fingerprint=benchmark.encoder_fingerprint)
    if not scored.records:
        raise InputError(
            f"none of the {len(scored.rejected)} images of source={benchmark.name} can be read, the first is {scored.rejected[0].id}: {scored.rejected[0].reason}"
        )
    sheet = make_sheet(benchmark, scored, contenders, rules.category_names)
    at_scored = time.perf_counter()
    rows, tests = measure(sheet, prevalence=float(cfg.prevalence), n_resamples=cfg.n_resamples, seed=cfg.seed)
    measured = time.perf_counter()
    robustness = [row for one in contenders for row in _attack(one, sheet, attacks, stores)]
    attacked = time.perf_counter()
    evaluation = Evaluation(
        benchmark=benchmark,
        policy=rules,
        scored=scored,
        sheet=sheet,
        rows=rows,
        tests=tests,
        robustness=robustness,
        seen=seen,
        notes=notes,
        prevalence=float(cfg.prevalence),
        settings=json.loads(json.dumps(OmegaConf.to_container(cfg, resolve=True), default=str)) | {"policy": rules.to_dict()},
        command=_command(),
        timing_s={
            "load": built - started,
            "score": at_scored - built,
            "figures": measured - at_scored,
            "robustness": attacked - measured,
        },
    )
    with claim(folder, "evaluate", settings_of(cfg), replaces=WRITTEN):
        write_robustness(folder / "robustness.parquet", robustness)
        return Report(folder, write_report(folder, evaluation), short_table(evaluation))


def _attack(contender: Contender, sheet: Sheet, settings: RobustnessSettings, stores: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not settings.protocols:
        return []
    covered = covered_rows(sheet, contender) & sheet.counted
    chosen = [record for record, inside in zip(sheet.records, covered, strict=True) if inside and record.content is not None]
    if not chosen:
        log.warning("%s is not attacked: the benchmark holds no image that it covers", contender.name)
        return []
    encoder = contender.guard.encoder
    return measure_robustness(
        contender.guard,
        LazyImages(chosen),
        [record.label for record in chosen],
        [record.group for record in chosen],
        settings,
        store=None if encoder is None else stores[encoder.fingerprint],
    )


def _command() -> str:
    """How this evaluation was started, if from a shell."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("output_dir=")]
    return shlex.join(["python", "-m", "guardkit.evaluate", *arguments])
