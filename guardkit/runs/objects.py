"""What several commands build from a configuration."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from guardkit.counterfactual.edits import Edits
from guardkit.data.arms import Arm
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder, told
from guardkit.fitting.parts import Parts, make_parts
from guardkit.policy import Policy
from guardkit.runs.hydra import cache_dir, factory, make, make_source, plain, policy
from guardkit.schema import InputError


def arm(cfg: DictConfig) -> Arm:
    """The arm that `experiment` set."""
    if not isinstance(cfg.experiment_name, str) or not cfg.experiment_name:
        raise InputError(f"experiment_name must be a text, as in experiment_name=mine, got {plain(cfg.experiment_name)!r}")
    data = plain(cfg.data)
    return Arm(cfg.experiment_name, data["negatives"], data["transform"], positives=data["positives"])


def encoder(cfg: DictConfig, rules: Policy) -> Encoder:
    """The chosen encoder; one that reads policies is told the run's."""
    return told(make(cfg.encoder), rules)


def edits(cfg: DictConfig) -> Edits:
    """Who edits, and how."""
    return Edits(make(cfg.editor), make(cfg.instructor), factory(cfg.verifier), cfg.edit_batch_size, cfg.edit_max_tries)


def loss(cfg: DictConfig) -> dict[str, Any]:
    """Settings of the objective, its further terms as objects."""
    terms = cfg.loss.get("terms") or {}
    return plain(cfg.loss) | ({"terms": {name: make(term) for name, term in terms.items()}} if terms else {})


def data(cfg: DictConfig) -> dict[str, Any]:
    """Settings of the data module that the arms of a comparison share."""
    names = ("safe_per_unsafe", "look_alikes", "variants_per_image", "batch_size", "all_views", "test_share", "split_seed")
    return {name: cfg.data[name] for name in names}


def build(cfg: DictConfig) -> Parts:
    """All parts of a training, for whoever wants them without the training.

    Args:
        cfg: composed from conf/train.yaml.
    """
    rules, cache = policy(cfg), cache_dir(cfg)
    store = EmbeddingStore(encoder(cfg, rules), cache)
    pipeline = edits(cfg).pipeline(rules, store, cache)
    source = make_source(cfg, rules)
    return make_parts(source, rules, store, pipeline, arm(cfg), n_unsafe=cfg.data.n_unsafe, seed=cfg.seed, **data(cfg))
