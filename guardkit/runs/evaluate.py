"""`evaluate`: from its configuration to objects to one call."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, open_dict

from guardkit.api.evaluate import EvaluationReport, check_settings, check_several, evaluate
from guardkit.artifacts import SHIPPED
from guardkit.data.sources.base import Source
from guardkit.folders import refuse_others
from guardkit.policy import Policy
from guardkit.runs.contenders import build_contenders, build_for_policies
from guardkit.runs.hydra import cache_dir, compose_group, make, make_source, plain, policy
from guardkit.schema import InputError


def run(cfg: DictConfig, folder: Path) -> EvaluationReport:
    """Measures guards and baselines side by side and writes everything the contract promises of `evaluate`.

    Args:
        cfg: composed from conf/evaluate.yaml.
        folder: results are written there under their names when complete.
    Raises:
        InputError: a wrong value, named with what is allowed.
    """
    # asked here too: guards take seconds to load
    check_settings(**{name: plain(cfg[name]) for name in ("split", "seed", "split_seed", "n_resamples", "prevalence", "trained_on")})
    refuse_others(folder, "evaluate", replaces=True)
    robustness = make(cfg.robustness)
    if cfg.policies is None:
        _refuse(cfg)
        rules, contenders = build_contenders(cfg)
        what: dict[str, Any] = {"guards": contenders, "source": make_source(cfg, rules), "policy": rules}
    else:
        policies = policies_of(cfg)
        check_several(policies, policy=_one_policy(cfg), robustness=robustness, retrain=plain(cfg.retrain), split=cfg.split)
        source = source_for(cfg, policies)
        guards, heads = build_for_policies(cfg, policies)
        what = {"guards": guards, "source": source, "policies": policies, "retrain": heads}
    return evaluate(
        **what,
        output_dir=folder,
        **{name: cfg[name] for name in ("split", "test_share", "split_seed", "prevalence", "n_resamples", "seed")},
        robustness=robustness,
        cache_dir=cache_dir(cfg),
        settings=json.loads(json.dumps(plain(cfg), default=str)),
        command=_command(),
        engine=make(cfg.engine),
    )


# --- several policies -------------------------------------------------------------------------------------------------------


def policies_of(cfg: DictConfig) -> list[Policy]:
    """policies=[NAME,FILE]: names in conf/policy and YAML files; policies=items: those that the source's items file names.

    Raises:
        InputError: there is no such policy.
    """
    asked = plain(cfg.policies)
    if asked == "items":
        reader = getattr(get_object(cfg.source._target_), "policies_in", None)
        if reader is None:
            raise InputError(
                "policies=items takes the policies of an items file, which source=policy_items reads; give a list: policies=[NAME,FILE]"
            )
        given = {name: value for name, value in plain(cfg.source).items() if name != "_target_"}
        found: list[Policy] = reader(**given)
        return found
    if not isinstance(asked, list) or not all(isinstance(one, str) for one in asked):
        raise InputError(f"policies must be a list of names in conf/policy and files, as in [scenes,my.yaml], or items, got {asked!r}")
    return [_policy(one) for one in asked]


def _policy(name: str) -> Policy:
    if Path(name).suffix in (".yaml", ".yml") or name.startswith(SHIPPED):
        return Policy.load(name)
    return Policy.from_dict(plain(compose_group("policy", name, [], root={})))


def _one_policy(cfg: DictConfig) -> Policy | None:
    return policy(cfg) if cfg.policy_file is not None or cfg.get("policy") is not None else None


def _refuse(cfg: DictConfig) -> None:
    """Settings of several policies without these."""
    for name in ("label_columns", "retrain"):
        if plain(cfg[name]):
            raise InputError(f"{name} goes with several policies; give policies=[NAME,NAME]")


def source_for(cfg: DictConfig, policies: Sequence[Policy]) -> Source | dict[str, Source]:
    """What says which images each policy forbids: one source of all their categories, or one for each, where labels are each policy's own.

    Raises:
        InputError: `label_columns` names other policies, or is of no use to the source.
    """
    columns, names = plain(cfg.label_columns), [one.name for one in policies]
    if columns is not None:
        if not isinstance(columns, dict) or set(columns) != set(names):
            raise InputError(
                f"label_columns must name a column for each of the policies, {{{': COLUMN, '.join(names)}: COLUMN}}, got {columns!r}"
            )
        if "label_column" not in cfg.source:
            raise InputError(f"label_columns are of a table, and source={cfg.source._target_.rpartition('.')[2]} has none; leave it out")
        return {one.name: make_source(_with_labels(cfg, str(columns[one.name])), one) for one in policies}
    own = getattr(get_object(cfg.source._target_), "labels_by_policy", False) or cfg.source.get("class_column") is not None
    if own:
        return {one.name: make_source(cfg, one) for one in policies}
    return make_source(cfg, Policy.joined(policies))


def _with_labels(cfg: DictConfig, column: str) -> DictConfig:
    """The configuration with another label column. What a category column says an image shows need not be what the policy forbids."""
    changed = cfg.copy()
    with open_dict(changed):
        changed.source.label_column = column
        if "category_column" in changed.source:
            changed.source.category_column = None
    return changed


def _command() -> str:
    """How this evaluation was started, if from a shell."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("output_dir=")]
    return shlex.join(["python", "-m", "guardkit.evaluate", *arguments])
