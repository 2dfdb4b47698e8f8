"""The sample-efficiency experiment: arms x label budgets x seeds x strengths of regularisation."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from guardkit import __version__
from guardkit.checks import MAX_SEED, check_choice, check_path, check_whole, is_list, is_number, is_whole
from guardkit.counterfactual.edits import Edits
from guardkit.data.arms import Arm, arm_named, without_effect
from guardkit.data.look_alikes import LookAlikes
from guardkit.data.sources.base import Source
from guardkit.editors.base import Editor
from guardkit.efficiency.cells import Stock, chosen_sizes
from guardkit.efficiency.curves import SWEPT
from guardkit.efficiency.engine import BatchedEngine, Engine
from guardkit.efficiency.lightning_engine import LBFGS, LightningEngine
from guardkit.efficiency.measure import measure
from guardkit.efficiency.plan import Plan, in_sentences
from guardkit.efficiency.results import opened, run_cells
from guardkit.efficiency.stacked import Schedule
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.encoders.ways import going_alike
from guardkit.fitting.module import DEFAULT_THRESHOLD, quiet_lightning
from guardkit.fitting.objective import Objective
from guardkit.fitting.parts import HeadFactory, check_parts, head_factory, make_parts, new_head
from guardkit.fitting.recipe import ADAMW, TRAINER, OptimizerFactory, Recipe, check_optimizer, check_threshold, named, opened_logger
from guardkit.folders import refuse_others
from guardkit.heads import Head
from guardkit.policy import Policy
from guardkit.reports.sweep import write_report
from guardkit.schema import InputError, shortened

log = logging.getLogger(__name__)

ENGINES = ("batched", "lightning")
SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MOST_SEEDS = 10_000
STRENGTHS = (1e-6, 3e-5, 1e-3, 1e-2, 1e-1, 1.0, 30.0)


@dataclass(frozen=True)
class SweepReport:
    """What a sweep leaves: its folder, summary.json, and a table to print."""

    folder: Path
    summary: dict[str, Any]
    table: str


def sweep(
    source: Source,
    policy: Policy,
    *,
    encoder: Encoder,
    output_dir: str | Path,
    arms: Sequence[str | Arm] = ("unpaired", "pairs_aug", "pairs_plus", "shuffled_pairs", "null_edits", "classic_aug"),
    baseline: str = "unpaired",
    heads: str | Mapping[str, str | type[Head] | HeadFactory] = "auto",
    sizes: Sequence[int] = SIZES,
    seeds: int | Sequence[int] = 10,
    strengths: Sequence[float] = STRENGTHS,
    metric: str = "pair_accuracy",
    target_sizes: Sequence[int] | None = None,
    target_scores: Sequence[float] = (),
    table_size: int | None = None,
    threshold: float | str = DEFAULT_THRESHOLD,
    n_resamples: int = 2000,
    seed: int = 0,
    engine: str = "batched",
    device: str = "auto",
    editor: Editor | Edits | None = None,
    safe_per_unsafe: int | Literal["all"] = 1,
    look_alikes: LookAlikes = "marked",
    variants_per_image: int = 1,
    batch_size: int = 1_000_000,
    all_views: bool = True,
    test_share: float = 0.3,
    split_seed: int = 0,
    loss: Mapping[str, float] | None = None,
    optimizer: OptimizerFactory = ADAMW,
    linear_optimizer: OptimizerFactory = LBFGS,
    trainer: Mapping[str, Any] | None = None,
    early_stopping_patience: int = 12,
    logger: Any = False,
    cache_dir: str | Path | None = None,
) -> SweepReport:
    """Trains heads on more and more labels, with each arm, and says how many labels each needs.

    The same as `python -m guardkit.sweep`, with the same defaults and results. Only the editor has none here: the command's
    default draws scenes.

    Args:
        source, policy, encoder, editor: as for `train_guard`.
        output_dir: of the results. Finished cells of an interrupted sweep with the same settings are found there.
        arms: names of `guardkit.data.arms.ARMS`, or `Arm`s.
        baseline: the arm that others are compared with.
        heads: the name of one (see `train_guard`), or {name: what makes it, as for `train_guard`}.
        sizes: label budgets: labelled unsafe images, validation included.
        seeds: how many labelled subsets, or a list of their seeds.
        strengths: of the regularisation, chosen on validation images.
        metric: one of `guardkit.efficiency.curves.SWEPT`.
        target_sizes: the baseline's scores at these sizes are the targets; None: at an eighth and a half of the largest.
        target_scores: further targets, in (0, 1].
        table_size: size of the table by category; None: the middle one.
        threshold: a number in [0, 1], or an operating point of each cell's validation images.
        n_resamples, seed: of the redraws behind the intervals.
        engine: "batched", or "lightning": the same cells one by one through the code of `train_guard`.
        device: of the batched engine: "auto", "cpu", "cuda".
        safe_per_unsafe: natural safe images for each unsafe one, or "all"; of arms that use some.
        look_alikes: "marked" by a category, or found by the policy's "texts"; of arms that use some.
        variants_per_image: counterfactuals, or other edits, of each image, where the arm does not say.
        batch_size, all_views, test_share, split_seed: as for `train_guard`; here a batch holds all images of a cell.
        loss: as for `train_guard`; here the category loss is left out unless `category_weight` is given, and the strengths are
            in place of `l2`.
        optimizer: of heads that are not linear.
        linear_optimizer: of linear ones, with engine="lightning".
        trainer, early_stopping_patience, logger, cache_dir: as for `train_guard`.
    Raises:
        InputError: a wrong value, or a folder that holds another experiment.
    """
    started = time.perf_counter()
    wanted, idle = _arms(arms, variants_per_image, look_alikes, safe_per_unsafe)
    made = _heads(heads)
    plan = _plan(
        wanted,
        tuple(made),
        baseline=baseline,
        sizes=sizes,
        seeds=seeds,
        metric=metric,
        target_sizes=target_sizes,
        target_scores=target_scores,
        table_size=table_size,
        threshold=threshold,
        n_resamples=n_resamples,
        seed=seed,
    )
    check_choice("sweep.engine", engine, ENGINES)
    # the strengths are in place of loss.l2
    objective = Objective.of({"category_weight": 0.0, **(loss or {}), "l2": 0.0})
    for name, term in objective.terms.items():
        if term.weight and not term.is_convex:
            log.warning("loss.terms.%s is not convex: linear heads are trained as others are, by optimizer and trainer, not solved", name)
    recipe = Recipe(objective, optimizer, trainer or {}, early_stopping_patience)
    recipe.check()
    check_optimizer(linear_optimizer, "linear_optimizer")
    check_threshold(threshold)
    pulls = _strengths(strengths)
    computes_on = _device(device)
    folder = check_path("output_dir", output_dir)
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    refuse_others(folder, "sweep", replaces=False)
    encoder = going_alike(encoder, getattr(source, "encoder_fingerprint", None), "the source's embeddings are")
    store = EmbeddingStore(encoder, cache)
    pipeline = Edits.of(editor).pipeline(policy, store, cache)
    data: dict[str, Any] = {
        "safe_per_unsafe": safe_per_unsafe,
        "look_alikes": look_alikes,
        "batch_size": batch_size,
        "all_views": all_views,
        "test_share": test_share,
        "split_seed": split_seed,
    }
    parts = make_parts(source, policy, store, pipeline, wanted[0], seed=seed, **data)
    try:
        check_parts(encoder, pipeline, policy, made.values())
        settings = {
            "shared": {
                "source": source.asked,
                "encoder": encoder.fingerprint,
                "policy": policy.digest,
                "instructor": pipeline.instructor.name,
                "editor": pipeline.editor.config,
                "verifier": pipeline.verifier.config,
                "edit_max_tries": pipeline.max_tries,
                "data": data,
                "loss": objective.settings,
                "optimizer": named(optimizer),
                "trainer": {name: str(value) for name, value in recipe.trainer.items()},
                "early_stopping_patience": early_stopping_patience,
                "strengths": list(pulls),
                "engine": engine,
                "guardkit": __version__,
                **({"linear_optimizer": named(linear_optimizer)} if engine == "lightning" else {}),
            },
            "arms": {
                arm.name: {"kinds": list(arm.kinds), "transform": arm.transform, "variants_per_image": arm.variants_per_image}
                for arm in wanted
            },
            "heads": {name: named(make_head) for name, make_head in made.items()},
        }
        runs: Engine
        if engine == "lightning":
            runs = LightningEngine(parts, wanted, made, pulls, recipe, linear_optimizer, data)
        else:
            limits = {**TRAINER, **recipe.trainer}
            schedule = Schedule(optimizer, limits["max_epochs"], limits["check_val_every_n_epoch"], early_stopping_patience)
            runs = BatchedEngine(objective, pulls, lambda name, cell: new_head(made[name], parts, cell), schedule, device=computes_on)
        with opened(folder, settings) as cells_on_disk:
            stock = Stock(parts.data, wanted, plan.sizes, plan.seeds)
            plan.check(stock.test)
            cells = [cell for head in plan.heads for block in plan.blocks(head) for cell in block]
            known = plan.left_out({cell: reason for cell in cells if (reason := stock.reason_against(cell))})
            curves = [name for head in plan.heads for name in plan.curves(head)]
            for sentence in in_sentences(known, curves, plan.sizes, len(plan.seeds)):
                log.warning("%s (set sweep.sizes)", sentence)
            prepared = time.perf_counter()
            failed, n_found = run_cells(cells, stock, runs, cells_on_disk)
            fitted = time.perf_counter()
            # what there is too little of, and why a head is another than asked for, also where all cells were there
            tried = {name: new_head(make_head, parts, seed) for name, make_head in made.items()}
            noted = [note for head in tried.values() for note in head.notes]
            became = {name: head.chosen for name, head in tried.items() if head.chosen}
            about = {
                "name": runs.name,
                "fits_now": (len(cells) - len(failed) - n_found) * len(pulls),
                "seconds_now": {"embeddings and edits": prepared - started, "fitting": fitted - prepared},
            }
            notes = list(dict.fromkeys([*idle, *parts.unlabelled.notes, *noted]))
            summary = measure(folder, plan, cells_on_disk, failed, stock, pulls, engine=about, became=became, notes=notes)
            table = write_report(folder, summary)
            with quiet_lightning(), opened_logger(logger) as told:
                if told:
                    _log_results(told, folder, summary)
    finally:
        parts.data.close()
    if not summary["engine"]["fits"]:
        said = "; ".join(in_sentences(summary["left_out"], summary["arms"], plan.sizes, len(plan.seeds))[:3])
        raise InputError(f"not one cell could be fitted: {said}; {folder} holds a report without a figure")
    return SweepReport(folder, summary, table)


# --- what is asked for ---------------------------------------------------------------------------------------------------


def _arms(
    arms: Sequence[str | Arm], variants_per_image: int, look_alikes: LookAlikes, safe_per_unsafe: int | str
) -> tuple[list[Arm], list[str]]:
    """The arms, each with its number of views, and the settings that none of them has a use for."""
    check_whole("data.variants_per_image", variants_per_image, 1)
    if not is_list(arms):
        raise InputError(f"sweep.arms must be a list, as in sweep.arms=[{arms}], got {arms!r}")
    found = [arm_named(arm) for arm in arms]
    names = [arm.name for arm in found]
    if not names or len(set(names)) < len(names):
        raise InputError(f"sweep.arms must name at least one arm, each once, got {names}")
    idle = without_effect(found, look_alikes=look_alikes, safe_per_unsafe=safe_per_unsafe, variants_per_image=variants_per_image)
    for note in idle:
        log.warning("%s", note)
    return [arm if arm.variants_per_image else replace(arm, variants_per_image=variants_per_image) for arm in found], idle


def _heads(heads: str | Mapping[str, str | type[Head] | HeadFactory]) -> dict[str, HeadFactory]:
    given = {heads: heads} if isinstance(heads, str) else heads
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InputError(f"heads must be the name of one, or a dictionary from names to heads, got {shortened(repr(heads))}")
    if not given:
        raise InputError("sweep.heads is empty; name some, or set it to null for the one of head=")
    return {name: head_factory(head) for name, head in given.items()}


def _plan(
    arms: Sequence[Arm],
    heads: tuple[str, ...],
    *,
    baseline: str,
    sizes: Sequence[int],
    seeds: int | Sequence[int],
    metric: str,
    target_sizes: Sequence[int] | None,
    target_scores: Sequence[float],
    table_size: int | None,
    threshold: float | str,
    n_resamples: int,
    seed: int,
) -> Plan:
    for name, value in (("sizes", sizes), ("target_scores", target_scores), ("target_sizes", target_sizes)):
        if not is_list(value) and not (value is None and name == "target_sizes"):
            raise InputError(f"sweep.{name} must be a list, as in sweep.{name}=[{value}], got {value!r}")
    check_choice("sweep.metric", metric, SWEPT)
    if baseline not in [arm.name for arm in arms]:
        log.warning("sweep.baseline=%s is not among sweep.arms, so arms are not compared", baseline)
    check_whole("sweep.n_resamples", n_resamples, 100)
    check_whole("seed", seed, 0, MAX_SEED)
    budgets = chosen_sizes(list(sizes))
    subsets = list(range(min(seeds, _MOST_SEEDS + 1))) if is_whole(seeds) else list(seeds) if is_list(seeds) else []
    if (
        not 0 < len(subsets) <= _MOST_SEEDS
        or not all(is_whole(one) and 0 <= one <= MAX_SEED for one in subsets)
        or len(set(subsets)) < len(subsets)
    ):
        raise InputError(
            f"sweep.seeds must be a number of seeds from 1 to {_MOST_SEEDS}, or a list of as many different whole numbers of at least 0, got {seeds}"
        )
    targets = list(_default_targets(budgets) if target_sizes is None else target_sizes)
    for name, values in (("target_sizes", targets), ("table_size", [] if table_size is None else [table_size])):
        if set(values) - set(budgets):
            raise InputError(f"sweep.{name} must be among sweep.sizes {budgets}, got {values}")
    for score in target_scores:
        if not is_number(score) or not 0 < score <= 1:
            raise InputError(f"sweep.target_scores must be numbers in (0, 1], got {score!r}")
    return Plan(
        arms=tuple(arm.name for arm in arms),
        heads=heads,
        baseline=baseline,
        sizes=tuple(budgets),
        seeds=tuple(subsets),
        metric=metric,
        target_sizes=tuple(targets),
        target_scores=tuple(float(score) for score in target_scores),
        table_size=budgets[len(budgets) // 2] if table_size is None else table_size,
        threshold=threshold,
        n_resamples=n_resamples,
        draw_seed=seed,
    )


def _default_targets(sizes: Sequence[int]) -> list[int]:
    """The largest sizes up to an eighth and a half of the largest, for there must be room above; else the largest itself."""
    above_first = sizes[1:]  # at the smallest, no arm can need fewer labels
    found = [[size for size in above_first if size <= sizes[-1] / part][-1:] for part in (8, 2)]
    return sorted({size for few in found for size in few}) or list(above_first[-1:])


def _strengths(strengths: Sequence[float]) -> tuple[float, ...]:
    if not is_list(strengths):
        raise InputError(f"sweep.strengths must be a list, as in sweep.strengths=[{strengths}], got {strengths!r}")
    if not strengths or not all(map(is_number, strengths)) or min(strengths) <= 0 or len(set(strengths)) < len(strengths):
        raise InputError(f"sweep.strengths must be different numbers above 0, got {list(strengths)}")
    return tuple(map(float, strengths))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"sweep.device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("sweep.device=cuda, and there is no CUDA device; choose sweep.device=auto or cpu")
    return name


def _log_results(logger: Any, folder: Path, summary: Mapping[str, Any]) -> None:
    """The sweep's curves by size, and where the logger can hold them, its table and picture."""
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
            [row["target"], row["arm"], row["n"], row["baseline_n"], row["ratio"], *row["ratio_ci"]] for row in summary["samples_to_target"]
        ]
        logger.log_table("samples_to_target", columns=columns, data=rows)
        points = [
            [arm, int(size), point["mean"], point["ci_low"], point["ci_high"]]
            for arm, curve in summary["curves"].items()
            for size, point in curve.items()
        ]
        logger.log_table("curves", columns=["arm", "n_unsafe", "mean", "ci_low", "ci_high"], data=points)
        logger.log_image("sample_efficiency", images=[str(folder / "sample_efficiency.png")])
