"""One evaluation from a composed configuration to a folder of results."""

from __future__ import annotations

import inspect
import json
import logging
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from guardkit._hydra import cache_dir, compose_group, make, policy
from guardkit.artifacts import fingerprint
from guardkit.classifier import GuardClassifier
from guardkit.encoders.base import Encoder
from guardkit.evaluation.benchmark import Benchmark, read_benchmark
from guardkit.evaluation.effectiveness import Sheet, covered_rows, make_sheet, measure
from guardkit.evaluation.report import Evaluation, short_table, write_report
from guardkit.evaluation.robustness import RobustnessSettings, measure_robustness, write_robustness
from guardkit.evaluation.scoring import Contender, LazyImages, embedding_stores, score
from guardkit.policy import Policy
from guardkit.schema import InputError

log = logging.getLogger(__name__)


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
    for name, least in (("seed", 0), ("n_resamples", 100)):
        if not isinstance(cfg[name], int) or cfg[name] < least:
            raise InputError(f"{name} must be a whole number of at least {least}, got {cfg[name]!r}")
    if not isinstance(cfg.prevalence, (int, float)) or not 0 < cfg.prevalence < 1:
        raise InputError(f"prevalence must lie in (0, 1), got {cfg.prevalence!r}")
    folder.mkdir(parents=True, exist_ok=True)
    rules, cache = policy(cfg), cache_dir(cfg)
    attacks: RobustnessSettings = make(cfg.robustness)
    contenders = build_contenders(cfg, rules)
    benchmark = read_benchmark(make(cfg.source, policy=rules), split=cfg.split, test_share=cfg.test_share, split_seed=cfg.split_seed)
    stores = embedding_stores(contenders, cache)
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
        prevalence=float(cfg.prevalence),
        settings=json.loads(json.dumps(OmegaConf.to_container(cfg, resolve=True), default=str)),
        command=_command(),
        timing_s={
            "load": built - started,
            "score": at_scored - built,
            "figures": measured - at_scored,
            "robustness": attacked - measured,
        },
    )
    write_robustness(folder / "robustness.parquet", robustness)
    return Report(folder, write_report(folder, evaluation), short_table(evaluation))


def build_contenders(cfg: DictConfig, rules: Policy) -> list[Contender]:
    """Guards and baselines that the configuration names, each under a name of its own; equal encoders are one object.

    Raises:
        InputError: nothing is named, a folder is no guard, or there is no such baseline.
    """
    encoders: dict[str, Encoder] = {}
    trained_on = None if cfg.trained_on is None else frozenset(str(source) for source in cfg.trained_on)
    found = [_guard(name, place, encoders, trained_on) for name, place in _named_guards(cfg.guard)]
    found += [_baseline(name, settings, rules, encoders, cfg.cache_dir) for name, settings in _named_baselines(cfg.baselines)]
    if not found:
        raise InputError("nothing to evaluate: give guard=DIR (the folder guard/ that training wrote), or baselines=[zero_shot,...]")
    names: set[str] = set()
    unique = []
    for one in found:
        number = 2
        name = one.name
        while name in names:
            name, number = f"{one.name} {number}", number + 1
        names.add(name)
        one.guard.name = name  # rows of robustness carry the guard's own
        unique.append(Contender(name, one.guard, one.points, one.trained_on, one.origin))
    return unique


def _named_guards(value: Any) -> list[tuple[str | None, str]]:
    """guard=DIR, guard=[DIR, DIR] or guard={name: DIR}."""
    if value is None:
        return []
    if isinstance(value, DictConfig):
        return [(str(name), str(place)) for name, place in value.items()]
    if isinstance(value, ListConfig):
        return [(None, str(place)) for place in value]
    return [(None, str(value))]


def _guard(name: str | None, place: str, encoders: dict[str, Encoder], trained_on: frozenset[str] | None) -> Contender:
    folder = Path(place).expanduser()
    guard = GuardClassifier.from_pretrained(folder if folder.is_dir() else place, encoder=encoders.get(_encoder_of(folder)))
    encoders.setdefault(guard.encoder.fingerprint, guard.encoder)
    said = guard.training.get("sources")
    return Contender(
        name or guard.name,
        guard,
        {point: float(figures["threshold"]) for point, figures in guard.operating_points.items()},
        frozenset(said) if said is not None else trained_on,
        place,
    )


def _encoder_of(folder: Path) -> str:
    """The fingerprint of the encoder that a guard folder names, to load no encoder twice; "" where it cannot be told."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["encoder"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # `from_pretrained` says what is wrong


def _named_baselines(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """baselines=[name, {name: {setting: value}}]."""
    plain = OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
    if not isinstance(plain, list):
        raise InputError(f"baselines must be a list such as [zero_shot,always_unsafe], got {value!r}")
    found: list[tuple[str, dict[str, Any]]] = []
    for one in plain:
        if isinstance(one, str):
            found.append((one, {}))
        elif isinstance(one, dict) and all(isinstance(settings, dict) for settings in one.values()):
            found += [(str(name), dict(settings)) for name, settings in one.items()]
        else:
            raise InputError(f"baselines may hold names and {{name: {{setting: value}}}}, got {one!r}")
    return found


def _baseline(name: str, settings: dict[str, Any], rules: Policy, encoders: dict[str, Encoder], cache: str | None) -> Contender:
    chosen = settings.pop("encoder") if isinstance(settings.get("encoder"), str) else None
    cfg = compose_group("baseline", name, [f"encoder@baseline.encoder={chosen}"] if chosen else [], root={"cache_dir": cache})
    try:
        cfg.merge_with(settings)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"baseline {name} does not take {settings} ({reason}); it has {', '.join(cfg)}: see conf/baseline/{name}.yaml"
        ) from error
    missing = sorted(key.removeprefix("baseline.") for key in OmegaConf.missing_keys(cfg))
    if missing:
        nested = f"{missing[0].replace('.', ': {')}: VALUE" + "}" * missing[0].count(".")
        raise InputError(f"baseline {name} needs {', '.join(missing)}; give baselines=[{{{name}: {{{nested}}}}}]")
    given: dict[str, Any] = {}
    parameters = inspect.signature(get_object(cfg._target_)).parameters
    if "policy" in parameters:
        given["policy"] = rules
    if "encoder" in parameters:
        given["encoder"] = _shared_encoder(cfg.encoder, encoders)
        with open_dict(cfg):
            del cfg.encoder
    guard = make(cfg, **given)
    return Contender(guard.name, guard, origin=f"baseline {name}")


def _shared_encoder(cfg: DictConfig, encoders: dict[str, Encoder]) -> Encoder:
    """An encoder that was built before from the same settings or with the same weights, or a new one."""
    key = fingerprint(OmegaConf.to_container(cfg, resolve=True))
    if key not in encoders:
        encoder: Encoder = make(cfg)
        encoders[key] = encoders.setdefault(encoder.fingerprint, encoder)
    return encoders[key]


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


__all__ = ["Benchmark", "Report", "build_contenders", "run"]
