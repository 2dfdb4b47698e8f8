"""One training run from a composed configuration to a folder of results. Entry points and the sweep both come here."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from guardkit.artifacts import write_json
from guardkit.checks import check_choice, check_whole
from guardkit.counterfactual.pair_dataset import write_pair_dataset
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.data.budget import check_edits
from guardkit.data.datamodule import GuardDataModule
from guardkit.data.grouping import load_source
from guardkit.data.training_images import training_images
from guardkit.data.unlabelled import Unlabelled
from guardkit.embedding_folder import write_embedding_folder
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.evaluation.training_report import measure, summary_table, write_pictures, write_predictions
from guardkit.folders import claim, refuse_others
from guardkit.heads import Head
from guardkit.module import DEFAULT_THRESHOLD, EpochProgress, Fitted, GuardModule, fit, quiet_lightning
from guardkit.policy import Policy
from guardkit.runs.hydra import cache_dir, make, policy, settings_of
from guardkit.runs.loggers import logger_of
from guardkit.runs.preflight import check_parts, check_settings
from guardkit.schema import InputError

log = logging.getLogger(__name__)

WRITTEN = ("guard", "metrics.json", "predictions.parquet", "*.png", "checkpoints", "csv", "wandb")


@dataclass(frozen=True)
class Report:
    """What a run leaves: its folder, the figures of metrics.json, and a table to print."""

    folder: Path
    metrics: dict[str, Any]
    table: str


@dataclass(frozen=True)
class Parts:
    """What a configuration builds before training: shared by `train` and everything that trains many times."""

    policy: Policy
    encoder: Encoder
    store: EmbeddingStore
    pipeline: CounterfactualPipeline
    data: GuardDataModule
    unlabelled: Unlabelled


def build(cfg: DictConfig) -> Parts:
    """Builds policy, encoder, stores, editor and data module.

    Raises:
        InputError: a wrong value, named with what is allowed.
    """
    rules, cache = policy(cfg), cache_dir(cfg)
    encoder: Encoder = make(cfg.encoder)
    store = EmbeddingStore(encoder, cache)
    pipeline = _pipeline(cfg, rules, store, cache)
    source = make(cfg.source, policy=rules)
    data: GuardDataModule = make(cfg.data, source=source, policy=rules, store=store, pipeline=pipeline, seed=cfg.seed)
    return Parts(rules, encoder, store, pipeline, data, Unlabelled(data))


def run(cfg: DictConfig, settings: Any, folder: Path) -> Report:
    """Trains and measures one guard and writes everything the contract promises of `train` into `folder`.

    Args:
        cfg: composed from conf/train.yaml.
        settings: the same in plain values, for loggers.
        folder: exists; results are written under their name only when complete.
    """
    started = time.perf_counter()
    check_whole("seed", cfg.seed, 0)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_others(folder, "train", replaces=True)
    check_settings(cfg)
    torch.manual_seed(cfg.seed)
    parts = build(cfg)
    try:
        check_parts(parts.encoder, parts.pipeline, parts.policy, [cfg.head])
        parts.data.setup("fit")
        head = build_head(cfg, parts)
        with claim(folder, "train", settings_of(cfg), replaces=WRITTEN), logger_of(cfg, settings, folder) as logger:
            checkpoint = L.pytorch.callbacks.ModelCheckpoint(
                dirpath=folder / "checkpoints", monitor="validation_loss", save_last=False, filename="best"
            )
            module, fitted = fit_guard(cfg, parts, head, logger=logger, callbacks=[EpochProgress(), checkpoint], threshold=cfg.threshold)
            metrics, measured = measure(fitted, parts.data, experiment=cfg.experiment_name, seed=cfg.seed)
            metrics["notes"] = [*parts.data.notes, *parts.unlabelled.notes]
            fitted.guard.training = {
                "prevalence": module.prevalence,
                "experiment": cfg.experiment_name,
                "seed": cfg.seed,
                "sources": sorted({record.source for record in parts.data.unsafe_train}),
                **{key: metrics[key] for key in ("n_unsafe", "n_safe", "n_counterfactuals")},
            }
            fitted.guard.training_images = training_images(parts.data, parts.unlabelled)
            fitted.guard.metrics = {key: metrics[key] for key in ("test", "pairs", "always_unsafe")}
            fitted.guard.save_pretrained(folder / "guard")
            write_predictions(folder / "predictions.parquet", measured)
            write_pictures(folder, fitted, parts.data, measured)
            metrics["timing_s"] = {
                "total": time.perf_counter() - started,
                "encode": parts.store.seconds,
                "edit": parts.data.edits.seconds + parts.data.other_edits.seconds,
                "fit": fitted.seconds,
            }
            logger.log_metrics(_scalars({key: metrics[key] for key in ("test", "pairs")}), step=len(fitted.curve))
            write_json(folder / "metrics.json", metrics)
    finally:
        parts.data.close()
    return Report(folder, metrics, summary_table(metrics))


def build_head(cfg: DictConfig, parts: Parts) -> Head:
    """A new head; its first weights follow from the seed."""
    torch.manual_seed(cfg.seed)
    head: Head = make(cfg.head, encoder=parts.encoder, policy=parts.policy)
    head.prepare(parts.unlabelled)
    return head


def rebuild_data(parts: Parts, cfg: DictConfig) -> Parts:
    """The same parts with another arm, label budget or seed."""
    data: GuardDataModule = make(
        cfg.data, source=parts.data.source, policy=parts.policy, store=parts.store, pipeline=parts.pipeline, seed=cfg.seed
    )
    return replace(parts, data=data)


def fit_guard(
    cfg: DictConfig,
    parts: Parts,
    head: Head,
    *,
    logger: Any = False,
    callbacks: Sequence[L.Callback] = (),
    threshold: float | str = DEFAULT_THRESHOLD,
) -> tuple[GuardModule, Fitted]:
    """Trains a head on the images of the data module, as the configuration says.

    Args:
        cfg: composed from conf/train.yaml, or a cell of a sweep.
        parts: what it is trained on.
        head: it.
        logger: Lightning's; False: none.
        callbacks: beside early stopping.
        threshold: a number in [0, 1], or the name of an operating point.
    Returns:
        The module that was trained, and what came of it.
    """
    module = GuardModule(head, instantiate(cfg.optimizer), **_plain(cfg.loss))
    every = [*callbacks, L.pytorch.callbacks.EarlyStopping("validation_loss", patience=cfg.early_stopping_patience)]
    with quiet_lightning():
        keep = any(isinstance(one, L.pytorch.callbacks.ModelCheckpoint) for one in every)
        trainer: L.Trainer = make(cfg.trainer, logger=logger, callbacks=every, enable_checkpointing=keep)
    return module, fit(module, parts.data, trainer, encoder=parts.encoder, policy=parts.policy, threshold=threshold)


def embed_source(cfg: DictConfig, folder: Path) -> dict[str, int]:
    """Embeds every image of a source, test images and unlabelled ones included, into an embedding folder.

    Args:
        cfg: composed from conf/embed.yaml.
        folder: written to.
    Returns:
        given, written and rejected; given is the sum of the others.
    """
    check_whole("limit", cfg.limit, 1, optional=True)
    check_whole("shard_size", cfg.shard_size, 1)
    refuse_others(folder, "embed", replaces=False)
    rules, encoder = policy(cfg), make(cfg.encoder)
    check_parts(encoder, None, rules)
    loaded = load_source(make(cfg.source, policy=rules), for_training=False)
    records = [*loaded.train, *(loaded.test or []), *loaded.set_aside]
    if any(record.content is None for record in records):
        raise InputError("source=embeddings holds embeddings already; choose a source of images")
    store = EmbeddingStore(encoder, cache_dir(cfg))
    return write_embedding_folder(records[: cfg.limit], store, folder, rejected=loaded.rejected, shard_size=cfg.shard_size)


def synthesize_source(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Makes a pair dataset of a source's images, test images left out.

    Args:
        cfg: composed from conf/synthesize.yaml.
        folder: written to.
    Returns:
        The dataset's manifest.
    """
    check_whole("limit", cfg.limit, 1, optional=True)
    check_whole("variants_per_image", cfg.variants_per_image, 1)
    refuse_others(folder, "synthesize", replaces=False)
    labels = {"to_safe": (1,), "to_unsafe": (0,), "both": (1, 0)}
    check_choice("direction", cfg.direction, labels)
    rules, cache = policy(cfg), cache_dir(cfg) or folder / ".cache"
    store = EmbeddingStore(make(cfg.encoder), cache)
    pipeline = _pipeline(cfg, rules, store, cache)
    source = make(cfg.source, policy=rules)
    check_parts(store.encoder, pipeline, rules)
    loaded = load_source(source)
    if cfg.direction != "to_safe" and not loaded.is_drawn:
        raise InputError(
            f"direction={cfg.direction} would make unsafe images of source={source.name}; real images are edited to the safe side only"
        )
    records = [record for label in labels[cfg.direction] for record in loaded.train if record.label == label and (label or record.category)]
    if any(record.content is None for record in records):
        raise InputError("source=embeddings holds no images to edit; choose a source of images")
    if not records:
        raise InputError(f"source={source.name} has no image to edit in direction={cfg.direction}")
    records = records[: cfg.limit]
    for note in check_edits(pipeline, [("images", "counterfactual", records)], f"source={source.name}"):
        log.warning("%s", note)
    return write_pair_dataset(
        records,
        pipeline,
        folder,
        made_from=source.fingerprint,
        variants_per_image=cfg.variants_per_image,
        rejected=loaded.rejected,
    )


def _pipeline(cfg: DictConfig, rules: Policy, store: EmbeddingStore, cache: Path | None) -> CounterfactualPipeline:
    return CounterfactualPipeline(
        rules,
        make(cfg.instructor),
        make(cfg.editor),
        make(cfg.verifier, store=store, policy=rules),
        cache_dir=cache,
        batch_size=cfg.edit_batch_size,
        max_tries=cfg.edit_max_tries,
    )


def _plain(cfg: DictConfig) -> Any:
    return OmegaConf.to_container(cfg, resolve=True)


def _scalars(value: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            flat |= _scalars(item, f"{name}/")
        elif isinstance(item, (int, float)):
            flat[name] = float(item)
    return flat
