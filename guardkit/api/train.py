"""Training one guard, measuring it, and what a run leaves in its folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from guardkit.api.trained import WRITTEN, TrainingReport, reported
from guardkit.checks import MAX_SEED, check_path, check_whole
from guardkit.classifier import GuardClassifier
from guardkit.counterfactual.edits import Edits
from guardkit.data.arms import Arm, arm_named, without_effect
from guardkit.data.look_alikes import LookAlikes
from guardkit.data.sources.base import Source
from guardkit.editors.base import Editor
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.encoders.ways import going_alike
from guardkit.fitting.cross_validation import cross_validate
from guardkit.fitting.module import DEFAULT_THRESHOLD, EpochProgress, check_checkpoint
from guardkit.fitting.objective import Objective
from guardkit.fitting.parts import HeadFactory, check_parts, head_factory, make_parts, new_head
from guardkit.fitting.recipe import ADAMW, OptimizerFactory, Recipe, check_threshold, named, opened_logger
from guardkit.folders import claim, refuse_others
from guardkit.heads import Head, JoinedHead
from guardkit.policy import Policy
from guardkit.schema import InputError

log = logging.getLogger(__name__)


def train_guard(
    source: Source,
    policy: Policy,
    *,
    encoder: Encoder,
    head: str | type[Head] | HeadFactory = "auto",
    arm: str | Arm = "unpaired",
    editor: Editor | Edits | None = None,
    n_unsafe: int | Literal["all"] = 64,
    safe_per_unsafe: int | Literal["all"] = 1,
    look_alikes: LookAlikes = "marked",
    variants_per_image: int = 1,
    batch_size: int = 64,
    all_views: bool = False,
    test_share: float = 0.3,
    split_seed: int = 0,
    seed: int = 0,
    threshold: float | str = DEFAULT_THRESHOLD,
    loss: Mapping[str, float] | None = None,
    optimizer: OptimizerFactory = ADAMW,
    trainer: Mapping[str, Any] | None = None,
    early_stopping_patience: int = 12,
    callbacks: Sequence[L.Callback] | None = None,
    ckpt_path: str | Path | None = None,
    logger: Any = False,
    extend: GuardClassifier | None = None,
    cache_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
) -> TrainingReport:
    """Trains a guard on labelled images and counterfactuals made on the fly, and measures it.

    The same as `python -m guardkit.train`, with the same defaults and results. Only the editor has none here: the command's
    default draws scenes.

    Args:
        source: of labelled images.
        policy: says what is unsafe.
        encoder: frozen; images to unit vectors.
        head: "auto" ("anchored" where the encoder reads the policy's texts, else "linear"), "linear", "linear_whitened", "linear_texts", "anchored", "mlp" or "prompt", or a function of `encoder` and `policy`.
        arm: a name of `guardkit.data.arms.ARMS`, or an `Arm`: what the unsafe images are told from.
        editor: makes counterfactuals; with an instructor, a verifier or several tries: `Edits`. None: none can be made, which suits
            arms that edit nothing.
        n_unsafe: labelled unsafe images, validation included: the label budget; or "all" there are.
        safe_per_unsafe: natural safe images for each unsafe one, or "all"; of arms that use some.
        look_alikes: "marked" by a category, or found by the policy's "texts"; of arms that use some.
        variants_per_image: counterfactuals, or other edits, of each image, where the arm does not say.
        batch_size: unsafe images in a batch.
        all_views: every view in every epoch, rather than one after the other.
        test_share: of a source that brings no test set of its own, in (0, 1).
        split_seed: of that test set.
        seed: of the labelled subset, the order of batches and the head's first weights.
        threshold: a number in [0, 1], or an operating point: "balanced", "fpr_0.01", "fpr_0.05".
        loss: arguments of `guardkit.fitting.objective.Objective` that differ from its defaults, such as {"l2": 0.1}.
        optimizer: a function of parameters.
        trainer: keyword arguments of `lightning.Trainer` that differ from `guardkit.fitting.recipe.TRAINER`.
        early_stopping_patience: validations without a better loss.
        callbacks: Lightning's, beside early stopping and the one that keeps the best head. A ModelCheckpoint without a folder
            writes into output_dir/checkpoints. None: one that writes best.ckpt there at every better validation.
        ckpt_path: such a checkpoint of an earlier run with the same settings, to go on from.
        logger: Lightning's, or a function that opens one; False: none.
        extend: a guard on the same encoder, to which the policy's categories are added: what is trained and measured is a head for these alone,
            and the guard that comes out has both.
        cache_dir: where embeddings and edits are kept for later runs; None keeps them in memory.
        output_dir: where guard, figures and pictures go; None: nowhere.
    Raises:
        InputError: a wrong value, named with what is allowed; too few images; a folder of another command; a checkpoint of
            other settings.
    """
    started = time.perf_counter()
    check_whole("seed", seed, 0, MAX_SEED)
    recipe = Recipe(Objective.of(loss or {}), optimizer, trainer or {}, early_stopping_patience)
    recipe.check()
    check_threshold(threshold)
    chosen, make_head = arm_named(arm), head_factory(head)
    encoder = going_alike(encoder, getattr(source, "encoder_fingerprint", None), "the source's embeddings are")
    if extend is not None:
        encoder = going_alike(encoder, extend.encoder.fingerprint, "the guard that is extended is")
        _check_extension(extend, encoder, policy)
    folder, cache = _path("output_dir", output_dir), _path("cache_dir", cache_dir)
    if folder is not None:
        refuse_others(folder, "train", replaces=True)
    if ckpt_path is not None:
        check_checkpoint(ckpt_path)
        if folder is not None and folder.resolve() in Path(ckpt_path).resolve().parents:
            raise InputError(f"ckpt_path={ckpt_path} lies in output_dir, where this run replaces what is there; choose another output_dir")
    idle = without_effect([chosen], look_alikes=look_alikes, safe_per_unsafe=safe_per_unsafe, variants_per_image=variants_per_image)
    for note in idle:
        log.warning("%s", note)
    torch.manual_seed(seed)
    store = EmbeddingStore(encoder, cache)
    pipeline = Edits.of(editor).pipeline(policy, store, cache)
    settings_of_data: dict[str, Any] = {
        "n_unsafe": n_unsafe,
        "safe_per_unsafe": safe_per_unsafe,
        "look_alikes": look_alikes,
        "variants_per_image": variants_per_image,
        "batch_size": batch_size,
        "all_views": all_views,
        "test_share": test_share,
        "split_seed": split_seed,
    }
    parts = make_parts(source, policy, store, pipeline, chosen, seed=seed, **settings_of_data)
    try:
        check_parts(encoder, pipeline, policy, [make_head])
        parts.data.setup()
        made = new_head(make_head, parts, seed)
        if made.chosen == "linear" and not recipe.trains:
            raise InputError(
                f"with trainer.max_epochs=0 (experiment=zero_shot) nothing is learned from labels, and {'; '.join(made.notes)}; choose another "
                "encoder, or train (experiment=unpaired)"
            )
        settings = {
            "source": source.asked,
            "policy": policy.digest,
            "encoder": encoder.fingerprint,
            "editor": pipeline.editor.config,
            "verifier": pipeline.verifier.config,
            "head": [made.kind, made.config],
            "arm": [chosen.name, chosen.kinds, chosen.transform, chosen.variants_per_image or variants_per_image],
            "data": [n_unsafe, safe_per_unsafe, look_alikes, batch_size, all_views, test_share, split_seed, seed],
            "loss": recipe.objective.settings,
            "trainer": {name: str(value) for name, value in recipe.trainer.items()},
            "optimizer": named(optimizer),
            "threshold": threshold,
        }
        owned = nullcontext() if folder is None else claim(folder, "train", settings, replaces=WRITTEN)
        with owned, opened_logger(logger) as told:
            every = [EpochProgress(), *_callbacks(callbacks, folder)]
            fitted = recipe.fit(made, parts, logger=told, callbacks=every, threshold=threshold, ckpt_path=ckpt_path)
            report = reported(
                fitted,
                parts,
                chosen,
                seed=seed,
                out_of_fold=lambda: cross_validate(make_head, parts, recipe, chosen, fitted, seed, **settings_of_data),
                notes=[*idle, *parts.data.notes, *parts.unlabelled.notes, *made.notes],
                is_trained=recipe.trains,
                extend=extend,
                folder=folder,
                logger=told,
                started=started,
            )
    finally:
        parts.data.close()
    return report


def _check_extension(guard: GuardClassifier, encoder: Encoder, policy: Policy) -> None:
    """Before anything is trained, what `extended_by` would refuse."""
    if guard.encoder.fingerprint != encoder.fingerprint:
        raise InputError(f"the guard that is extended is on encoder {guard.encoder.name}, got {encoder.name}; train with the guard's own")
    both = [name for name in policy.category_names if name in guard.policy.category_names]
    if both:
        raise InputError(f"the guard that is extended has the category {both[0]!r} already; give a policy with the new categories alone")
    JoinedHead.of(guard.head)


def _path(setting: str, place: str | Path | None) -> Path | None:
    return None if place is None else check_path(setting, place)


def _callbacks(given: Sequence[L.Callback] | None, folder: Path | None) -> list[L.Callback]:
    if given is None:
        best = L.pytorch.callbacks.ModelCheckpoint(filename="best", monitor="validation_loss", enable_version_counter=False)
        given = [] if folder is None else [best]
    for one in given:
        if folder is not None and isinstance(one, L.pytorch.callbacks.ModelCheckpoint) and one.dirpath is None:
            one.dirpath = str(folder.resolve() / "checkpoints")
    return list(given)
