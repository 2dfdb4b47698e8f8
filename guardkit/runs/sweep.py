"""The sample-efficiency experiment from a composed configuration to a folder of results."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from guardkit import __version__
from guardkit.checks import check_choice, check_whole, is_list, is_number
from guardkit.data.datamodule import TestSet
from guardkit.efficiency.cells import Arm, Cell, CellData, CellError, Stock, chosen_sizes
from guardkit.efficiency.curves import METRICS
from guardkit.efficiency.engine import BatchedEngine, Engine, FittedCell, Objective, chosen
from guardkit.efficiency.plan import Plan, in_sentences
from guardkit.efficiency.report import write_report
from guardkit.efficiency.results import opened, run_cells
from guardkit.efficiency.stacked import Schedule
from guardkit.folders import refuse_others
from guardkit.heads import Head, LinearHead
from guardkit.module import Diverged, check_loss, quiet_lightning
from guardkit.runs.loggers import logger_of
from guardkit.runs.preflight import check_parts, check_settings
from guardkit.runs.train import Parts, build, build_head, fit_guard, rebuild_data
from guardkit.schema import InputError

log = logging.getLogger(__name__)

ENGINES = ("batched", "lightning")


@dataclass(frozen=True)
class SweepReport:
    """What a sweep leaves: its folder, summary.json, and a table to print."""

    folder: Path
    summary: dict[str, Any]
    table: str


def run_sweep(cfg: DictConfig, settings: Any, folder: Path) -> SweepReport:
    """Fits every cell that is not finished yet, and writes everything the contract promises of `sweep` into `folder`.

    Args:
        cfg: composed from conf/sweep.yaml.
        settings: the same in plain values, for loggers.
        folder: of an earlier, interrupted sweep, or a new one.
    Raises:
        InputError: a wrong value, or a folder that holds another experiment.
    """
    started = time.perf_counter()
    plan, arms, heads = _plan(cfg)
    objective = _objective(cfg)
    check_settings(cfg, optimizers=("optimizer", "linear_optimizer"))
    refuse_others(folder, "sweep", replaces=False)
    parts = build(_cell_cfg(cfg, arms[0].name, next(iter(heads.values()))))
    try:
        check_parts(parts.encoder, parts.pipeline, parts.policy, heads.values())
        engine = _engine(cfg, parts, heads, objective)
        with opened(folder, _shared_settings(cfg, parts, arms, heads, objective)) as store:
            stock = Stock(parts.data, arms, plan.sizes, plan.seeds)
            plan.check(stock.test)
            cells = [cell for head in plan.heads for block in plan.blocks(head) for cell in block]
            known = plan.left_out({cell: reason for cell in cells if (reason := stock.reason_against(cell))})
            curves = [name for head in plan.heads for name in plan.curves(head)]
            for sentence in in_sentences(known, curves, plan.sizes, len(plan.seeds)):
                log.warning("%s (set sweep.sizes)", sentence)
            prepared = time.perf_counter()
            failed, n_found = run_cells(cells, stock, engine, store)
            fitted = time.perf_counter()
            about = {
                "name": engine.name,
                "fits_now": (len(cells) - len(failed) - n_found) * len(objective.strengths),
                "seconds_now": {"embeddings and edits": prepared - started, "fitting": fitted - prepared},
            }
            summary, table = write_report(folder, plan, store, failed, stock, objective.strengths, about, parts.unlabelled.notes)
            with quiet_lightning():
                _log_results(cfg, settings, folder, summary)
    finally:
        parts.data.close()
    if not summary["engine"]["fits"]:
        said = "; ".join(in_sentences(summary["left_out"], summary["arms"], plan.sizes, len(plan.seeds))[:3])
        raise InputError(f"not one cell could be fitted: {said}; {folder} holds a report without a figure")
    return SweepReport(folder, summary, table)


# --- what is asked for ---------------------------------------------------------------------------------------------------


def _plan(cfg: DictConfig) -> tuple[Plan, list[Arm], dict[str, DictConfig]]:
    sweep = cfg.sweep
    for name in ("arms", "sizes", "strengths", "target_scores", "heads", "target_sizes"):
        if not is_list(sweep[name]) and not (sweep[name] is None and name in ("heads", "target_sizes")):
            raise InputError(f"sweep.{name} must be a list, as in sweep.{name}=[{sweep[name]}], got {sweep[name]!r}")
    wanted = list(sweep.arms)
    for name in wanted:
        if name not in cfg.arms:
            raise InputError(
                f"sweep.arms names {name!r}; there are {', '.join(cfg.arms)}, and +experiment@arms.{name}={name} adds one of conf/experiment"
            )
    if not wanted or len(set(wanted)) < len(wanted):
        raise InputError(f"sweep.arms must name at least one arm, each once, got {wanted}")
    check_choice("sweep.metric", sweep.metric, METRICS)
    check_choice("sweep.engine", sweep.engine, ENGINES)
    if sweep.baseline not in wanted:
        log.warning("sweep.baseline=%s is not among sweep.arms, so arms are not compared", sweep.baseline)
    check_whole("sweep.n_resamples", sweep.n_resamples, 100)
    sizes = chosen_sizes(list(sweep.sizes))
    seeds = list(range(sweep.seeds)) if isinstance(sweep.seeds, int) else list(sweep.seeds) if is_list(sweep.seeds) else []
    if not seeds or any(not isinstance(seed, int) or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(
            f"sweep.seeds must be a number of seeds of at least 1, or a list of different whole numbers of at least 0, got {sweep.seeds}"
        )
    targets = list(_default_targets(sizes) if sweep.target_sizes is None else sweep.target_sizes)
    for name, values in (("target_sizes", targets), ("table_size", [] if sweep.table_size is None else [sweep.table_size])):
        if set(values) - set(sizes):
            raise InputError(f"sweep.{name} must be among sweep.sizes {sizes}, got {values}")
    for score in sweep.target_scores:
        if not is_number(score) or not 0 < score <= 1:
            raise InputError(f"sweep.target_scores must be numbers in (0, 1], got {score!r}")
    heads = _heads(cfg)
    plan = Plan(
        arms=tuple(wanted),
        heads=tuple(heads),
        baseline=sweep.baseline,
        sizes=tuple(sizes),
        seeds=tuple(seeds),
        metric=sweep.metric,
        target_sizes=tuple(targets),
        target_scores=tuple(float(score) for score in sweep.target_scores),
        table_size=sizes[len(sizes) // 2] if sweep.table_size is None else sweep.table_size,
        threshold=cfg.threshold,
        n_resamples=sweep.n_resamples,
        draw_seed=cfg.seed,
    )
    return plan, arms_of(cfg), heads


def _default_targets(sizes: Sequence[int]) -> list[int]:
    """The largest sizes up to an eighth and a half of the largest, for there must be room above; else the largest itself."""
    above_first = sizes[1:]  # at the smallest, no arm can need fewer labels
    found = [[size for size in above_first if size <= sizes[-1] / part][-1:] for part in (8, 2)]
    return sorted({size for few in found for size in few}) or list(above_first[-1:])


def arms_of(cfg: DictConfig) -> list[Arm]:
    """The arms that `sweep.arms` names."""
    arms = []
    for name in cfg.sweep.arms:
        data = OmegaConf.merge(cfg.data, cfg.arms[name].get("data", {}))
        arms.append(Arm(name, tuple(data.negatives), data.transform, data.variants_per_image))
    return arms


def _heads(cfg: DictConfig) -> dict[str, DictConfig]:
    if cfg.sweep.heads is None:
        named = [name for name, head in cfg.heads.items() if head._target_ == cfg.head._target_]
        return {named[0] if named else str(cfg.head._target_): cfg.head}
    for name in cfg.sweep.heads:
        if name not in cfg.heads:
            raise InputError(f"sweep.heads names {name!r}; there are {', '.join(cfg.heads)}")
    if not cfg.sweep.heads:
        raise InputError("sweep.heads is empty; name some, or set it to null for the one of head=")
    return {name: cfg.heads[name] for name in cfg.sweep.heads}


def _objective(cfg: DictConfig) -> Objective:
    strengths = list(cfg.sweep.strengths)
    if not strengths or not all(map(is_number, strengths)) or min(strengths) <= 0 or len(set(strengths)) < len(strengths):
        raise InputError(f"sweep.strengths must be different numbers above 0, got {strengths}")
    loss = cfg.loss
    check_loss(loss.prevalence, pair_weight=loss.pair_weight, pair_margin=loss.pair_margin)
    return Objective(tuple(map(float, strengths)), float(loss.prevalence), float(loss.pair_weight), float(loss.pair_margin))


def _shared_settings(
    cfg: DictConfig, parts: Parts, arms: Sequence[Arm], heads: Mapping[str, DictConfig], objective: Objective
) -> dict[str, Any]:
    """Everything that a cell depends on."""
    pipeline = parts.pipeline
    plain = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("loss", "optimizer", "trainer", "instructor")}
    shared = plain | {
        "source": parts.data.source.fingerprint,
        "encoder": parts.encoder.fingerprint,
        "policy": parts.policy.digest,
        "editor": pipeline.editor.config,
        "verifier": pipeline.verifier.config,
        "edit_max_tries": cfg.edit_max_tries,
        "data": {name: cfg.data[name] for name in ("batch_size", "all_views", "test_share", "split_seed")},
        "early_stopping_patience": cfg.early_stopping_patience,
        "strengths": list(objective.strengths),
        "engine": cfg.sweep.engine,
        "guardkit": __version__,
    }
    if cfg.sweep.engine == "lightning":
        shared["linear_optimizer"] = OmegaConf.to_container(cfg.linear_optimizer, resolve=True)
    return {
        "shared": shared,
        "arms": {
            arm.name: {"negatives": list(arm.negatives), "transform": arm.transform, "variants_per_image": arm.n_views} for arm in arms
        },
        "heads": {name: OmegaConf.to_container(head, resolve=True) for name, head in heads.items()},
    }


def _cell_cfg(cfg: DictConfig, arm: str, head: DictConfig, **cell: Any) -> DictConfig:
    """The configuration of `train` for one cell."""
    loss = {"category_weight": 0.0, "l2": 0.0}
    whole = cfg.copy()
    OmegaConf.set_struct(whole, False)  # train has settings that the sweep has not
    whole.head = head  # in place of another: a merge would mix their settings
    return OmegaConf.merge(whole, cfg.arms[arm], {"loss": loss}, cell)  # type: ignore[return-value]


# --- engines ---------------------------------------------------------------------------------------------------------------


def _engine(cfg: DictConfig, parts: Parts, heads: Mapping[str, DictConfig], objective: Objective) -> Engine:
    if cfg.sweep.engine == "lightning":
        return LightningEngine(cfg, parts, heads, objective)

    composed = {name: _cell_cfg(cfg, cfg.sweep.arms[0], head) for name, head in heads.items()}

    def make_head(name: str, seed: int) -> Head:
        composed[name].seed = seed
        return build_head(composed[name], parts)

    schedule = Schedule(
        instantiate(cfg.optimizer), cfg.trainer.max_epochs, cfg.trainer.check_val_every_n_epoch, cfg.early_stopping_patience
    )
    return BatchedEngine(objective, make_head, schedule, device=_device(cfg.sweep.device))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"sweep.device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("sweep.device=cuda, and there is no CUDA device; choose sweep.device=auto or cpu")
    return name


class LightningEngine:
    """Fits cells one after the other through the code of `guardkit.train`: the reference for the batched engine.

    A linear head is brought to its optimum by L-BFGS in one epoch over all images of the cell; others are trained as
    train does, with all images in one batch.

    Args:
        cfg: composed from conf/sweep.yaml.
        parts: built from it.
        heads: their configurations.
        objective: of every head.
    """

    name = "lightning"

    def __init__(self, cfg: DictConfig, parts: Parts, heads: Mapping[str, DictConfig], objective: Objective) -> None:
        self._cfg, self._parts, self._heads, self._objective = cfg, parts, heads, objective

    def fit(self, cells: Sequence[tuple[Cell, CellData]], test: TestSet) -> list[FittedCell | CellError]:
        """One fitted cell each, or why there is none."""
        fitted: list[FittedCell | CellError] = []
        for cell, _ in cells:
            try:
                fitted.append(self._fit_one(cell, test))
            except Diverged as error:
                fitted.append(CellError(str(error)))
        return fitted

    def _fit_one(self, cell: Cell, test: TestSet) -> FittedCell:
        started = time.perf_counter()
        cfg = _cell_cfg(self._cfg, cell.arm, self._heads[cell.head], seed=cell.seed, data={"n_unsafe": cell.n_unsafe})
        parts = rebuild_data(self._parts, cfg)
        guards, losses, objectives = [], [], []
        try:
            parts.data.setup("fit")
            for l2 in self._objective.strengths:
                cfg.loss.l2 = l2
                parts.data.epoch = 0
                head = build_head(cfg, parts)
                if isinstance(head, LinearHead):
                    cfg.optimizer = self._cfg.linear_optimizer
                    cfg.trainer.max_epochs = cfg.trainer.check_val_every_n_epoch = 1
                module, fitted = fit_guard(cfg, parts, head)
                guards.append(fitted.guard)
                losses.append(module.best_loss)
                with torch.no_grad():
                    objectives.append(float(module.loss(next(parts.data.batches(0))) + module.penalty()))
            validation = parts.data.validation_batch()
        finally:
            parts.data.close(stop_store=False)
        best = chosen(np.array(losses), self._objective.strengths)
        head = guards[best].head
        with torch.inference_mode():
            logits, twins, on_validation = (
                head(torch.as_tensor(x))[:, 0].numpy() for x in (test.embeddings, test.twins, validation["embeddings"])
            )
        return FittedCell(
            chosen=best,
            validation_losses=np.array(losses),
            objectives=np.array(objectives),
            gradients=np.full(len(losses), np.nan),
            logits=logits,
            twin_logits=twins,
            validation_logits=on_validation,
            validation_labels=validation["labels"].numpy(),
            seconds=time.perf_counter() - started,
        )


# --- loggers ---------------------------------------------------------------------------------------------------------------


def _log_results(cfg: DictConfig, settings: Any, folder: Path, summary: Mapping[str, Any]) -> None:
    """One run of the logger per sweep: its curves by size, and where the logger can hold them, its table and picture."""
    with logger_of(cfg, settings, folder) as logger:
        for size in summary["sizes"]:
            figures = {
                f"{arm}/{name}": point[name]
                for arm, curve in summary["curves"].items()
                for name in ("mean", "ci_low", "ci_high")
                if (point := curve[str(size)])[name] is not None
            }
            if figures:
                logger.log_metrics(figures, step=size)
        if hasattr(logger, "log_table"):
            columns = ["target", "arm", "n", "baseline_n", "ratio", "ratio_low", "ratio_high"]
            rows = [
                [row["target"], row["arm"], row["n"], row["baseline_n"], row["ratio"], *row["ratio_ci"]]
                for row in summary["samples_to_target"]
            ]
            logger.log_table("samples_to_target", columns=columns, data=rows)
            points = [
                [arm, int(size), point["mean"], point["ci_low"], point["ci_high"]]
                for arm, curve in summary["curves"].items()
                for size, point in curve.items()
            ]
            logger.log_table("curves", columns=["arm", "n_unsafe", "mean", "ci_low", "ci_high"], data=points)
            logger.log_image("sample_efficiency", images=[str(folder / "sample_efficiency.png")])
