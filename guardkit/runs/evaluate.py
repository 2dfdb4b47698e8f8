"""`evaluate`: from its configuration to objects to one call."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from guardkit.api.evaluate import EvaluationReport, check_settings, evaluate
from guardkit.folders import refuse_others
from guardkit.runs.contenders import build_contenders
from guardkit.runs.hydra import cache_dir, make, make_source, plain


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
    rules, contenders = build_contenders(cfg)
    return evaluate(
        contenders,
        make_source(cfg, rules),
        rules,
        output_dir=folder,
        **{name: cfg[name] for name in ("split", "test_share", "split_seed", "prevalence", "n_resamples", "seed")},
        robustness=robustness,
        cache_dir=cache_dir(cfg),
        settings=json.loads(json.dumps(plain(cfg), default=str)),
        command=_command(),
    )


def _command() -> str:
    """How this evaluation was started, if from a shell."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("output_dir=")]
    return shlex.join(["python", "-m", "guardkit.evaluate", *arguments])
