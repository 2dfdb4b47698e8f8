"""Which classifiers an evaluation measures, and under which policy: from a configuration to guards and baselines.

Whatever cannot be had is found before the long part and said of all classifiers at once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from guardkit.api.evaluate import common_policy, load_contender
from guardkit.artifacts import fingerprint
from guardkit.encoders.base import Encoder, told
from guardkit.evaluation.policies import Entrant
from guardkit.evaluation.scoring import Contender
from guardkit.fitting.retraining import Retrained
from guardkit.policy import Policy
from guardkit.runs.hydra import compose_group, factory, make, plain, policy
from guardkit.schema import Guard, InputError

_DEFAULT_POLICY = "scenes"
T = TypeVar("T")


def build_contenders(cfg: DictConfig) -> tuple[Policy, list[Contender]]:
    """Guards and baselines that the configuration names; equal encoders are one object.

    What cannot be had is said of all of them at once, and before the encoder of any baseline is loaded.

    Returns:
        The policy to measure under, and the classifiers.
    Raises:
        InputError: nothing is named, a folder is no guard, there is no such baseline or no such weights, or guards were
            trained under different policies and none is chosen.
    """
    asked = _named_baselines(cfg.baselines)
    places = _named_guards(cfg.guard)
    if not asked and not places:
        raise InputError("nothing to evaluate: give guard=DIR (the folder guard/ that training wrote), or baselines=[zero_shot,...]")
    problems = _Problems(len(asked) + len(places))
    encoders: dict[str, Encoder] = {}
    found, baselines = _begun(cfg, asked, places, encoders, problems)
    rules = _rules(cfg, found) if not problems.found else None
    if rules is not None:
        tried = [problems.catch(_tried, one, rules) for one in baselines]
        problems.check()
        built = [problems.catch(_built, one, rules, encoders, ready) for one, ready in zip(baselines, tried, strict=True)]
        found += [Contender(guard.name, guard, origin=f"baseline {one.name}") for one, guard in zip(baselines, built, strict=True) if guard]
    problems.check()
    assert rules is not None
    return rules, found


def build_for_policies(cfg: DictConfig, policies: Sequence[Policy]) -> tuple[list[Contender | Entrant], list[Retrained]]:
    """The same under several policies: guards as they are, baselines made for each policy, and heads that are trained for each.

    Raises:
        InputError: as `build_contenders`, or a head or a setting that there is not.
    """
    asked = _named_baselines(cfg.baselines)
    places = _named_guards(cfg.guard)
    heads = _named_baselines(cfg.retrain, "retrain", "[linear,anchored]")
    if not asked and not places and not heads:
        raise InputError(
            "nothing to evaluate: give guard=DIR, baselines=[zero_shot,...], or retrain=[linear]: heads that are trained for each policy"
        )
    problems = _Problems(len(asked) + len(places) + len(heads))
    encoders: dict[str, Encoder] = {}
    guards, baselines = _begun(cfg, asked, places, encoders, problems)
    composed = [problems.catch(_composed_head, name, settings) for name, settings in heads]
    problems.check()
    tried = [problems.catch(_tried, one, policies[0]) for one in baselines]
    problems.check()
    found: list[Contender | Entrant] = list(guards)
    for one, ready in zip(baselines, tried, strict=True):
        made = problems.catch(_built_for_each, one, policies, encoders, ready)
        found += [made] if made is not None else []
    everything = Policy.joined(policies)
    retrained = [problems.catch(_retrained, *one, everything, encoders) for one in composed if one is not None]
    problems.check()
    return found, [one for one in retrained if one is not None]


def _begun(
    cfg: DictConfig, asked: Sequence[Any], places: Sequence[Any], encoders: dict[str, Encoder], problems: _Problems
) -> tuple[list[Contender], list[_Baseline]]:
    """Saved guards, and baselines whose settings are checked; nothing of these is loaded."""
    composed = [problems.catch(_composed, name, settings, cfg.cache_dir) for name, settings in asked]
    problems.check()
    guards = [problems.catch(load_contender, place, name, encoders, plain(cfg.trained_on), plain(cfg.trust)) for name, place in places]
    return [guard for guard in guards if guard is not None], [one for one in composed if one is not None]


def _built_for_each(baseline: _Baseline, policies: Sequence[Policy], encoders: dict[str, Encoder], ready: Guard | None) -> Entrant:
    first = _built(baseline, policies[0], encoders, ready)
    made = {policies[0].name: first}
    for rules in policies[1:]:
        if getattr(first, "reads_policy", False) and hasattr(first, "for_policy"):  # a model that is loaded once for all
            made[rules.name] = first.for_policy(rules)
        else:
            made[rules.name] = _built(baseline, rules, encoders, _tried(baseline, rules))
    named = {name: Contender(guard.name, guard, origin=f"baseline {baseline.name}") for name, guard in made.items()}
    return Entrant.of(named)


_RETRAINED = ("n_unsafe", "safe_per_unsafe", "threshold", "seed")


def _composed_head(name: str, settings: dict[str, Any]) -> tuple[str, DictConfig, DictConfig, dict[str, Any]]:
    """A head, its encoder and the settings of its training; nothing is loaded."""
    own = {key: settings.pop(key) for key in list(settings) if key in _RETRAINED}
    chosen = settings.pop("encoder", "scenes_clip")
    further: dict[str, Any] = {}
    if isinstance(chosen, dict) and len(chosen) == 1:
        ((chosen, further),) = chosen.items()
    if not isinstance(chosen, str) or not isinstance(further, dict):
        raise InputError(f"retrain.{name}.encoder must be a name in conf/encoder, or {{name: {{setting: value}}}}, got {chosen!r}")
    head, encoder = compose_group("head", name, [], root={}), compose_group("encoder", chosen, [], root={})
    for what, cfg, given in (("head", head, settings), (f"encoder {chosen}", encoder, further)):
        try:
            cfg.merge_with(given)
        except OmegaConfBaseException as error:
            names = ", ".join(str(one) for one in cfg if one != "_target_") or "no settings"
            raise InputError(
                f"retrain.{name} does not take {given} ({str(error).splitlines()[0]}); settings are encoder, {', '.join(_RETRAINED)}, and of {what}: {names}"
            ) from error
    return name, head, encoder, own


def _retrained(
    name: str, head: DictConfig, encoder: DictConfig, own: Mapping[str, Any], rules: Policy, encoders: dict[str, Encoder]
) -> Retrained:
    """An encoder that reads policies is told all of them at once: images are embedded once, and heads tell the policies apart."""
    return Retrained(f"{name}, retrained", _shared_encoder(encoder, rules, encoders), factory(head), **own)


def _rules(cfg: DictConfig, guards: Sequence[Contender]) -> Policy:
    """The policy that was asked for, else that of the guards, else the scenes'."""
    if cfg.policy_file is not None or cfg.get("policy") is not None:
        return policy(cfg)
    own = common_policy(guards)
    if own is not None:
        return own
    return Policy.from_dict(plain(compose_group("policy", _DEFAULT_POLICY, [], root={})))


def _named_guards(value: Any) -> list[tuple[str | None, str]]:
    """guard=DIR, guard=[DIR, DIR] or guard={name: DIR}."""
    if value is None:
        return []
    if isinstance(value, DictConfig):
        return [(str(name), str(place)) for name, place in value.items()]
    if isinstance(value, ListConfig):
        return [(None, str(place)) for place in value]
    return [(None, str(value))]


def _named_baselines(
    value: Any, setting: str = "baselines", example: str = "[zero_shot,always_unsafe]"
) -> list[tuple[str, dict[str, Any]]]:
    """baselines=[name, {name: {setting: value}}]; an encoder is a setting, encoder: name or encoder: {name: {setting: value}}."""
    plain = OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
    if not isinstance(plain, list):
        raise InputError(f"{setting} must be a list such as {example}, got {value!r}")
    found: list[tuple[str, dict[str, Any]]] = []
    for one in plain:
        if isinstance(one, str):
            found.append((one, {}))
        elif isinstance(one, dict) and all(isinstance(settings, dict) for settings in one.values()):
            found += [(str(name), dict(settings)) for name, settings in one.items()]
        else:
            raise InputError(f"{setting} may hold names and {{name: {{setting: value}}}}, got {one!r}")
    return found


@dataclass(frozen=True)
class _Baseline:
    """A baseline whose settings are checked; nothing of it is loaded."""

    name: str
    cfg: DictConfig

    @property
    def parameters(self) -> frozenset[str]:
        target = str(self.cfg._target_)
        try:
            return frozenset(inspect.signature(resolve_name(target)).parameters)
        except (ImportError, AttributeError) as error:
            if target.startswith("guardkit."):
                raise
            raise InputError(
                f"baseline {self.name} names {target}, which cannot be imported ({error}); install its package in this environment, "
                "or correct its _target_"
            ) from error

    def make(self, rules: Policy, encoder: Any = None) -> Guard:
        given: dict[str, Any] = {"policy": rules} if "policy" in self.parameters else {}
        cfg = self.cfg.copy()
        if "encoder" in self.parameters:
            given["encoder"] = encoder
            with open_dict(cfg):
                del cfg.encoder
        guard: Guard = make(cfg, **given)
        return guard


def _composed(name: str, settings: dict[str, Any], cache: str | None) -> _Baseline:
    chosen = settings.pop("encoder") if isinstance(settings.get("encoder"), str) else None
    root = {"cache_dir": cache}
    cfg = compose_group("baseline", name, [f"encoder@baseline.encoder={chosen}"] if chosen else [], root=root)
    inner = settings.get("encoder")
    if isinstance(inner, dict) and len(inner) == 1 and "encoder" in cfg:
        ((first, its),) = inner.items()
        if isinstance(its, dict) and first not in cfg.encoder:  # no setting, but another encoder with settings of its own
            chosen, settings = str(first), settings | {"encoder": its}
            cfg = compose_group("baseline", name, [f"encoder@baseline.encoder={chosen}"], root=root)
    try:
        cfg.merge_with(settings)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"baseline {name} does not take {settings} ({reason}); it has {', '.join(cfg)}: see baseline/{name}.yaml"
        ) from error
    missing = sorted(key.removeprefix("baseline.") for key in OmegaConf.missing_keys(cfg))
    if missing:
        first = missing[0] if chosen is None else missing[0].replace("encoder.", f"encoder.{chosen}.", 1)
        nested = f"{first.replace('.', ': {')}: VALUE" + "}" * first.count(".")
        raise InputError(f"baseline {name} needs {', '.join(missing)}; give baselines=[{{{name}: {{{nested}}}}}]")
    return _Baseline(name, cfg)


class _EncoderNeeded(Exception):
    """Everything that comes before the encoder is there."""


class _NoEncoder:
    """Stands in for an encoder that is not to be loaded yet."""

    def __getattr__(self, name: str) -> Any:
        raise _EncoderNeeded(name)


def _tried(baseline: _Baseline, rules: Policy) -> Guard | None:
    """Makes a baseline up to the point where it needs its encoder: its weights, its packages and its settings are there.

    Returns:
        The baseline, if it has no encoder of ours.
    """
    if "encoder" not in baseline.parameters:
        return baseline.make(rules)
    make(baseline.cfg.encoder)  # says if its files are not there; loads none
    with contextlib.suppress(_EncoderNeeded):
        baseline.make(rules, _NoEncoder())
    return None


def _built(baseline: _Baseline, rules: Policy, encoders: dict[str, Encoder], ready: Guard | None) -> Guard:
    return ready if ready is not None else baseline.make(rules, _shared_encoder(baseline.cfg.encoder, rules, encoders))


def _shared_encoder(cfg: DictConfig, rules: Policy, encoders: dict[str, Encoder]) -> Encoder:
    """An encoder that was built before from the same settings or with the same weights, or a new one."""
    key = fingerprint([OmegaConf.to_container(cfg, resolve=True), rules.digest])
    if key not in encoders:
        encoder = told(make(cfg), rules)
        encoders[key] = encoders.setdefault(encoder.fingerprint, encoder)
    return encoders[key]


class _Problems:
    """Collects what is wrong with several things, to say it all at once.

    Args:
        n: how many things there are.
    """

    def __init__(self, n: int) -> None:
        self.found: list[InputError] = []
        self._n = n

    def catch(self, run: Callable[..., T], *arguments: Any) -> T | None:
        """What it gives; None where the user's input is at fault."""
        try:
            return run(*arguments)
        except InputError as error:
            self.found.append(error)
            return None

    def check(self) -> None:
        """Raises InputError if there was a problem."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            each = "; ".join(f"({number}) {error}" for number, error in enumerate(self.found, 1))
            raise InputError(f"{len(self.found)} of {self._n} classifiers cannot be had, and nothing was measured: {each}")
