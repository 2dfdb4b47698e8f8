"""Fine-tuning a vision-language model to a guard, by adapters: the policy is read, and nothing is written but one of two words."""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning as L
import torch

from guardkit.api.trained import TrainingReport, reported
from guardkit.checks import MAX_SEED, check_path, check_whole
from guardkit.classifier import GuardClassifier
from guardkit.counterfactual.edits import Edits
from guardkit.data.arms import Arm, arm_named, without_effect
from guardkit.data.look_alikes import LookAlikes
from guardkit.data.sources.base import Source
from guardkit.data.sources.embeddings import EmbeddingsSource
from guardkit.editors.base import Editor
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.adapters import require_peft
from guardkit.encoders.vlm import VLMEncoder
from guardkit.fitting.module import (
    DEFAULT_THRESHOLD,
    BestHead,
    EpochProgress,
    Fitted,
    GuardModule,
    check_checkpoint,
    run,
    set_threshold,
)
from guardkit.fitting.objective import Objective
from guardkit.fitting.parts import data_module, make_parts
from guardkit.fitting.recipe import OptimizerFactory, Recipe, check_threshold, make_trainer, named, opened_logger
from guardkit.fitting.tuning import WORDS, NumberedImages, TunedHead, check_base
from guardkit.folders import claim, refuse_others
from guardkit.policy import Policy
from guardkit.schema import InputError

log = logging.getLogger(__name__)

LORA_ADAMW: OptimizerFactory = partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.0)
LORA_TRAINER: Mapping[str, Any] = {
    "max_epochs": 20,
    "check_val_every_n_epoch": 1,
    "deterministic": "warn",  # on a GPU not every attention has a deterministic form; on a processor all have
}


def finetune(
    source: Source,
    policy: Policy,
    *,
    encoder: VLMEncoder,
    words: Sequence[str] = WORDS,
    rank: int = 8,
    alpha: int = 16,
    images_at_once: int = 4,
    arm: str | Arm = "unpaired",
    editor: Editor | Edits | None = None,
    n_unsafe: int = 64,
    safe_per_unsafe: int | Literal["all"] = 1,
    look_alikes: LookAlikes = "marked",
    variants_per_image: int = 1,
    batch_size: int = 8,
    all_views: bool = False,
    test_share: float = 0.3,
    split_seed: int = 0,
    seed: int = 0,
    threshold: float | str = DEFAULT_THRESHOLD,
    loss: Mapping[str, float] | None = None,
    optimizer: OptimizerFactory = LORA_ADAMW,
    trainer: Mapping[str, Any] | None = None,
    early_stopping_patience: int = 5,
    logger: Any = False,
    cache_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
) -> TrainingReport:
    """Trains LoRA adapters inside a vision-language model, and measures the guard that it becomes.

    One prefill of prompt and image gives the logit of "unsafe" minus that of "safe", and that is trained like a head's logit, on the same
    images, with the same losses. The guard that comes out is an encoder (the model with its adapters) and a linear head on it, so that
    whatever evaluates, calibrates or serves guards does so with this one.

    Source: Hu et al., 2021 (arXiv:2106.09685), for the adapters; that a tuned vision-language model decides better outside its training
    distribution than a probe is UnsafeBench's finding (Qu et al., 2024, arXiv:2405.03486, PerspectiveVision's LLaVA).

    Args:
        source: of labelled images.
        policy: says what is unsafe; its text stands in the prompt where that has a place for it.
        encoder: the model, whole and without adapters. Its device and dtype are those of the training; adapters are in single precision.
        words: of a safe and of an unsafe answer, one token each.
        rank: of the change of each linear layer's weights, from 1 to 1024.
        alpha: the change is multiplied by alpha / rank.
        images_at_once: that the model looks at; memory grows with it, results do not change but for rounding.
        arm, editor, n_unsafe, safe_per_unsafe, look_alikes, variants_per_image, all_views, test_share, split_seed, threshold, loss: as for
            `train_guard`.
        batch_size: unsafe images in a step.
        seed: of the labelled subset, the order of batches and the adapters' first weights.
        optimizer: a function of parameters.
        trainer: keyword arguments of `lightning.Trainer` that differ from `guardkit.fitting.recipe.TRAINER` and `LORA_TRAINER`.
        early_stopping_patience: validations without a better loss.
        logger: Lightning's, or a function that opens one; False: none.
        cache_dir: where embeddings and edits are kept for later runs; None keeps them in memory.
        output_dir: where guard, figures and checkpoints go; a run that was ended goes on there after its last whole epoch. None: nowhere.
    Raises:
        InputError: a wrong value, named with what is allowed; an encoder that is no vision-language model, or whose words are several tokens;
            too few images; a folder of another command or of other settings.
    """
    started = time.perf_counter()
    require_peft()
    check_whole("seed", seed, 0, MAX_SEED)
    recipe = Recipe(Objective.of(loss or {}), optimizer, {**LORA_TRAINER, **(trainer or {})}, early_stopping_patience)
    recipe.check()
    check_threshold(threshold)
    chosen = arm_named(arm)
    folder, cache = (
        None if place is None else check_path(name, place) for name, place in (("output_dir", output_dir), ("cache_dir", cache_dir))
    )
    if folder is not None:
        refuse_others(folder, "finetune", replaces=False)
    if isinstance(source, EmbeddingsSource):
        raise InputError(
            "a LoRA guard is trained on images, and source=embeddings holds their embeddings alone; give the source of the images"
        )
    base = check_base(encoder)
    base = base.for_policy(policy) if base.rules is None else base
    base.readout(words)  # what is wrong with model, prompt or words is told before the long part
    idle = without_effect([chosen], look_alikes=look_alikes, safe_per_unsafe=safe_per_unsafe, variants_per_image=variants_per_image)
    for note in idle:
        log.warning("%s", note)
    settings_of_data: dict[str, Any] = {
        "n_unsafe": n_unsafe,
        "safe_per_unsafe": safe_per_unsafe,
        "look_alikes": look_alikes,
        "variants_per_image": variants_per_image,
        "batch_size": batch_size,
        "all_views": all_views,
        "test_share": test_share,
        "split_seed": split_seed,
        "seed": seed,
    }
    pipeline = Edits.of(editor).pipeline(policy, EmbeddingStore(base, cache), cache)
    settings = {
        "source": source.asked,
        "policy": policy.digest,
        "encoder": base.fingerprint,
        "editor": pipeline.editor.config,
        "verifier": pipeline.verifier.config,
        "lora": [list(words), rank, alpha],
        "arm": [chosen.name, chosen.kinds, chosen.transform, chosen.variants_per_image or variants_per_image],
        "data": settings_of_data,
        "loss": recipe.objective.settings,
        "trainer": {name: str(value) for name, value in recipe.trainer.items()},
        "optimizer": named(optimizer),
        "threshold": threshold,
    }
    owned = nullcontext() if folder is None else claim(folder, "finetune", settings)
    with owned, opened_logger(logger) as told:
        tuned_by = base.with_adapter(None)  # a model of its own, because the adapters change it
        del encoder
        base_device = tuned_by.model.device
        images = NumberedImages(tuned_by)
        data = data_module(source, policy, images, pipeline, chosen, **settings_of_data)  # type: ignore[arg-type]
        torch.manual_seed(seed)
        head = TunedHead(tuned_by, images, len(policy.categories), words=words, rank=rank, alpha=alpha, images_at_once=images_at_once)
        module = GuardModule(head, optimizer, recipe.objective)
        best = BestHead()
        callbacks: list[L.Callback] = [best, EpochProgress()]
        checkpoint = None
        if folder is not None:
            callbacks.append(_Last(folder / "checkpoints"))
            checkpoint = _resumable(folder / "checkpoints")
        callbacks.append(L.pytorch.callbacks.EarlyStopping("validation_loss", patience=recipe.patience))
        if base_device.type == "cuda":  # where the model is, its adapters are too
            recipe_trainer = {"accelerator": "gpu", "devices": [base_device.index or 0], **recipe.trainer}
        else:
            recipe_trainer = dict(recipe.trainer)
        fitting = time.perf_counter()
        try:
            run(make_trainer(recipe_trainer, logger=told, callbacks=callbacks), module, data, checkpoint)
        finally:
            data.close()
        place = Path(tempfile.mkdtemp(prefix="guardkit-adapter-")) if folder is None else folder / "guard"
        place.mkdir(exist_ok=True)
        head.write(place)
        readout = head.cpu().head().eval()
        del images, data, head, tuned_by
        tuned = base.with_adapter(place)
        if folder is None:
            weakref.finalize(tuned, shutil.rmtree, place, ignore_errors=True)
        gc.collect()
        parts = make_parts(source, policy, EmbeddingStore(tuned, cache), pipeline, chosen, **settings_of_data)
        try:
            parts.data.setup()
            guard = GuardClassifier(readout, tuned, policy, threshold=DEFAULT_THRESHOLD)
            set_threshold(guard, parts.data.validation_batch(), threshold)
            fitted = Fitted(guard, module, best.curve, best.epoch, best.loss, time.perf_counter() - fitting)
            return reported(
                fitted,
                parts,
                chosen,
                seed=seed,
                out_of_fold=_trained_once,
                notes=[*idle, *parts.data.notes],
                is_trained=recipe.trains,
                extend=None,
                folder=folder,
                logger=told,
                started=started,
            )
        finally:
            parts.data.close()


def _trained_once() -> NoReturn:
    raise InputError("a LoRA guard is trained once: five more trainings for this figure would take five times as long")


class _Last(L.pytorch.callbacks.ModelCheckpoint):
    """Keeps the state after the last whole epoch, its validation included, which a run goes on from."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), "last", save_on_train_epoch_end=True, enable_version_counter=False)


def _resumable(folder: Path) -> Path | None:
    """The checkpoint of an earlier run; None: there is none, or none that can be gone on from."""
    path = folder / "last.ckpt"
    if not path.is_file():
        return None
    try:
        check_checkpoint(path)
    except InputError as error:
        log.warning("%s; the training begins anew", error)
        return None
    log.info("goes on from %s", path)
    return path
