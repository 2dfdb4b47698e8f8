"""Measuring guards side by side on images that none of them was trained on."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from guardkit.artifacts import read_json
from guardkit.checks import check_choice, check_number, check_path, check_whole, is_list
from guardkit.classifier import GuardClassifier
from guardkit.data.by_policy import ByPolicy, by_category, by_own_labels, check_policies
from guardkit.data.sources.base import Source
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder
from guardkit.encoders.known import unknown_images
from guardkit.engines.base import Engine
from guardkit.engines.local import engine_of
from guardkit.evaluation.benchmark import SPLITS, Benchmark, read_benchmark
from guardkit.evaluation.effectiveness import covered_rows, measure
from guardkit.evaluation.elsewhere import look_elsewhere
from guardkit.evaluation.held_out import Seen, leave_out_seen, sentences
from guardkit.evaluation.outcome import Evaluation, PolicyEvaluation
from guardkit.evaluation.policies import Entrant, measure_policies
from guardkit.evaluation.scoring import Contender, LazyImages, Sheet, embedding_stores, judgment_stores, score
from guardkit.evaluation.verdicts import untested
from guardkit.fitting.retraining import Retrained
from guardkit.fitting.retraining import retrain as retrain_head
from guardkit.folders import claim, refuse_others
from guardkit.policy import Policy
from guardkit.reports.evaluation import short_table, write_report
from guardkit.reports.policies import policies_table, write_policies_report
from guardkit.robustness.measuring import RobustnessSettings, measure_robustness, write_robustness
from guardkit.schema import SAFE, UNSAFE, Guard, InputError, takes_embeddings
from guardkit.shards.work import LEDGER

log = logging.getLogger(__name__)

WRITTEN = ("effectiveness.parquet", "predictions.parquet", "robustness.parquet", "summary.json", "report.html", "report.md", "*.png")

GuardLike = Guard | Contender | str | Path
"""A guard, the folder or Hub id of a saved one, or a contender that says more of it."""

ReadsPolicies = Callable[[Policy], Guard] | Entrant
"""Under several policies: a function that makes a guard of a policy, or an entrant that says more of it."""


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation leaves: its folder, the content of summary.json, and a table to print."""

    folder: Path
    summary: dict[str, Any]
    table: str


def evaluate(
    guards: GuardLike | ReadsPolicies | Sequence[GuardLike | ReadsPolicies] | Mapping[str, GuardLike | ReadsPolicies],
    source: Source | Mapping[str, Source],
    policy: Policy | None = None,
    *,
    output_dir: str | Path,
    policies: Sequence[Policy] | None = None,
    retrain: Sequence[Retrained] = (),
    split: Literal["test", "all"] = "test",
    test_share: float = 0.3,
    split_seed: int = 0,
    trained_on: Sequence[str] | None = None,
    trust: Sequence[str] = (),
    robustness: RobustnessSettings | None = None,
    prevalence: float = 0.01,
    n_resamples: int = 1000,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    command: str = "guardkit.evaluate(...)",
    engine: Engine | None = None,
) -> EvaluationReport:
    """Measures guards side by side, and writes tables, figures and a report.

    The same as `python -m guardkit.evaluate`, with the same defaults and results. Images that a guard was trained or validated
    on are left out for all, counted and named.

    Args:
        guards: what is measured: `GuardClassifier`s, folders or Hub ids of saved ones, or anything else that is an
            `EmbeddingGuard` or `ImageGuard`, such as the baselines; one, a list, or {name: guard}. Under several policies also a function that
            makes a guard of a policy; a guard that reads policies is asked for one under each, by its `for_policy`.
        source: the benchmark. Under several policies: one that was made with `Policy.joined(policies)`, whose categories say which policy
            forbids an image; or {policy: source}, the same images with labels of its own for each.
        policy: to measure under; None: the guards' own.
        policies: several, in place of `policy`: the same images under each. The first is the one that exceptions are exceptions to.
        retrain: heads that are trained anew for each of the policies, on the training images of the source.
        output_dir: of the results. An earlier evaluation there is replaced as a whole.
        split: "test": the source's own test images, or the share that training holds out; "all": everything.
        test_share, split_seed: of that share.
        trained_on: sources of the guards' training images, where the guards do not say.
        trust: packages that saved guards may take their heads and encoders from.
        robustness: which attacks and everyday edits to try; None: none.
        prevalence: share of unsafe images to state precision for, in (0, 1).
        n_resamples: of the bootstrap.
        seed: of the bootstrap.
        cache_dir: where embeddings and judgments are kept for later runs; None keeps them in memory.
        settings: what the report says of how it came about, in plain JSON types.
        command: the same as a line to type.
        engine: embeds and judges the images; None: this process. All else is done here: figures, the bootstrap, attacks, heads that are retrained.
    Raises:
        InputError: a wrong value, no guard, guards of different policies and none given, or nothing left to test on.
    """
    started = time.perf_counter()
    check_settings(split=split, seed=seed, split_seed=split_seed, n_resamples=n_resamples, prevalence=prevalence, trained_on=trained_on)
    folder, cache = check_path("output_dir", output_dir), None if cache_dir is None else Path(cache_dir).expanduser()
    engine = engine_of(engine)
    refuse_others(folder, "evaluate", replaces=True)
    attacks = robustness or RobustnessSettings(protocols=())
    if policies is not None:
        check_several(policies, policy=policy, robustness=attacks, retrain=retrain, split=split)
        several = _under_several(
            guards, _by_policy(source, policies), policies, retrain, cache, trained_on, trust, split, test_share, split_seed, engine, folder
        )
        return _report_policies(several, folder, prevalence, n_resamples, seed, settings, command, started)
    if isinstance(source, Mapping) or retrain:
        raise InputError("a source for each policy, and heads to retrain, go with several policies; give policies=[POLICY,POLICY]")
    found = unique(_contenders(guards, trained_on, trust))
    rules = policy or common_policy(found)
    if rules is None:
        raise InputError("the guards name no policy to measure them under; give one")
    notes = notes_on(rules, found)
    everything = read_benchmark(source, split=split, test_share=test_share, split_seed=split_seed)
    asked = dict(settings) if settings is not None else {"source": source.asked, "split": split, "prevalence": prevalence, "seed": seed}
    stores, judges = embedding_stores(found, cache), judgment_stores(found, cache)
    if not engine.is_here:
        look_elsewhere(engine, [*everything.records, *everything.counterfactuals], stores, judges, folder)
    benchmark, seen = leave_out_seen(everything, found, stores)
    notes += sentences(benchmark, seen)
    for note in notes:
        log.warning("%s", note)
    built = time.perf_counter()
    sheet = score(benchmark, found, stores, judges, rules.category_names)
    if not sheet.records:
        raise InputError(
            f"none of the {len(sheet.rejected)} images of source={benchmark.name} can be read, the first is {sheet.rejected[0].id}: {sheet.rejected[0].reason}"
        )
    for note in _unknown_to(stores, benchmark, sheet):
        notes.append(note)
        log.warning("%s", note)
    counted = sheet.labels[sheet.counted]
    if lack := untested(int((counted == UNSAFE).sum()), int((counted == SAFE).sum())):
        notes.append(f"what is tested on has {lack}, and without both labels there is no AUROC; choose another source= or split=all.")
        log.warning("%s", notes[-1])
    at_scored = time.perf_counter()
    rows, tests = measure(sheet, prevalence=float(prevalence), n_resamples=n_resamples, seed=seed)
    measured = time.perf_counter()
    robust = [row for one in found for row in _attack(one, sheet, attacks, stores)]
    attacked = time.perf_counter()
    evaluation = Evaluation(
        benchmark=benchmark,
        policy=rules,
        sheet=sheet,
        rows=rows,
        tests=tests,
        robustness=robust,
        seen=seen,
        notes=notes,
        prevalence=float(prevalence),
        settings={**asked, "policy": rules.to_dict()},
        command=command,
        timing_s={
            "load": built - started,
            "score": at_scored - built,
            "figures": measured - at_scored,
            "robustness": attacked - measured,
        },
    )
    with claim(folder, "evaluate", evaluation.settings, replaces=WRITTEN):
        write_robustness(folder / "robustness.parquet", robust)
        report = EvaluationReport(folder, write_report(folder, evaluation), short_table(evaluation))
        shutil.rmtree(folder / LEDGER, ignore_errors=True)
    return report


def check_settings(*, split: object, seed: object, split_seed: object, n_resamples: object, prevalence: object, trained_on: object) -> None:
    """Raises InputError for a setting that is out of range."""
    check_choice("split", split, SPLITS)
    for name, value, least in (("seed", seed, 0), ("split_seed", split_seed, 0), ("n_resamples", n_resamples, 100)):
        check_whole(name, value, least)
    check_number("prevalence", prevalence, "(0, 1)")
    if trained_on is not None and not is_list(trained_on):
        raise InputError(f"trained_on must be a list of sources, as in trained_on=[{trained_on}], got {trained_on!r}")


# --- who is measured --------------------------------------------------------------------------------------------------------


def load_contender(
    place: str | Path, name: str | None, encoders: dict[str, Encoder], trained_on: Sequence[str] | None, trust: Sequence[str]
) -> Contender:
    """A saved guard, with all that its folder says of it.

    Args:
        place: a folder or Hub id.
        name: for tables; None: the guard's own.
        encoders: by fingerprint, those that are loaded already; a new one is added.
        trained_on: sources of its training images, where it does not say.
        trust: packages that it may take its head and encoder from.
    """
    folder = Path(place).expanduser()
    guard = GuardClassifier.from_pretrained(
        folder if folder.is_dir() else str(place), encoder=encoders.get(_encoder_of(folder)), trust=trust
    )
    encoders.setdefault(guard.encoder.fingerprint, guard.encoder)
    return _contender_of(guard, name, trained_on, str(place))


def _contender_of(guard: Guard, name: str | None = None, trained_on: Sequence[str] | None = None, origin: str = "") -> Contender:
    """A guard with all that it says of itself."""
    if not isinstance(guard, GuardClassifier):
        return Contender(name or guard.name, guard, origin=origin)
    said = guard.training.get("sources", trained_on)
    return Contender(
        name or guard.name,
        guard,
        {point: float(figures["threshold"]) for point, figures in guard.operating_points.items() if figures["threshold"] is not None},
        None if said is None else frozenset(map(str, said)),
        origin,
        guard.policy,
        guard.training_images,
    )


def unique(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders, each under a name of its own."""
    names: set[str] = set()
    found = []
    for one in contenders:
        number, name = 2, one.name
        while name in names:
            name, number = f"{one.name} {number}", number + 1
        names.add(name)
        found.append(replace(one, name=name))
    return found


def common_policy(contenders: Sequence[Contender]) -> Policy | None:
    """The policy under which all guards were trained that name one; None where none does.

    Raises:
        InputError: they were trained under different ones.
    """
    own = {one.policy.digest: (one.name, one.policy) for one in contenders if one.policy is not None}
    if len(own) > 1:
        which = ", ".join(f"{name} under {rules.name}, digest {digest[:8]}" for digest, (name, rules) in own.items())
        raise InputError(
            f"the guards were trained under different policies ({which}); choose one with policy=NAME or policy_file=GUARD/policy.yaml"
        )
    return next(iter(own.values()))[1] if own else None


def _named(guards: Any) -> list[tuple[str | None, Any]]:
    """Guards with the names that they were given; None: they bring their own."""
    if isinstance(guards, Mapping):
        return list(guards.items())
    return [(None, one) for one in (guards if isinstance(guards, Sequence) and not isinstance(guards, str) else [guards])]


def _contenders(guards: Any, trained_on: Sequence[str] | None, trust: Sequence[str]) -> list[Contender]:
    named = _named(guards)
    if not named:
        raise InputError("nothing to evaluate: give at least one guard")
    makes = next((name or repr(one) for name, one in named if isinstance(one, Entrant) or _makes_guards(one)), None)
    if makes is not None:
        raise InputError(f"{makes} makes a guard of a policy, which goes with several; give policies=[POLICY,POLICY]")
    encoders: dict[str, Encoder] = {}
    return [_contender(one, name, encoders, trained_on, trust) for name, one in named]


def _contender(
    one: GuardLike, name: str | None, encoders: dict[str, Encoder], trained_on: Sequence[str] | None, trust: Sequence[str]
) -> Contender:
    if isinstance(one, Contender):
        return one
    return load_contender(one, name, encoders, trained_on, trust) if isinstance(one, str | Path) else _contender_of(one, name, trained_on)


def _encoder_of(folder: Path) -> str:
    """The fingerprint of the encoder that a guard folder names, to load no encoder twice; "" where it cannot be told."""
    try:
        return str(read_json(folder / "config.json", "a guard's configuration")["encoder"]["fingerprint"])
    except (InputError, KeyError, TypeError):
        return ""  # `from_pretrained` says what is wrong


def notes_on(rules: Policy, contenders: Sequence[Contender]) -> list[str]:
    """Of guards whose figures have to be read with care."""
    notes = []
    for one in contenders:
        if one.policy is not None and one.policy.digest != rules.digest:
            notes.append(
                f"{one.name} was trained under the policy {one.policy.name}, not under {rules.name} as given "
                f"(digests {one.policy.digest[:12]} and {rules.digest[:12]}); without policy= and policy_file= it is measured under its own."
            )
        notes += _own_notes(one)
    return notes


# --- several policies -------------------------------------------------------------------------------------------------------


def check_several(
    policies: Sequence[Policy], *, policy: Policy | None, robustness: RobustnessSettings, retrain: Sequence[Retrained], split: str
) -> None:
    """Raises InputError for settings that do not go with several policies."""
    check_policies(policies)
    if policy is not None:
        raise InputError("policy and policies are both given; give one of them")
    if robustness.protocols:
        raise InputError("robustness is measured under one policy; leave it out here, or give policy= instead of policies=")
    if retrain and split == "all":
        raise InputError("split=all tests on the images that retrain= would train on; use split=test")


def _by_policy(source: Source | Mapping[str, Source], policies: Sequence[Policy]) -> ByPolicy:
    if not isinstance(source, Mapping):
        return by_category(source, policies)
    names = [policy.name for policy in policies]
    if set(source) != set(names):
        raise InputError(
            f"sources are given for {', '.join(map(str, source)) or 'none'}, policies are {', '.join(names)}; give one for each"
        )
    return by_own_labels({name: source[name] for name in names})


@dataclass(frozen=True)
class _Several:
    """All that is measured under several policies, scored."""

    policies: Sequence[Policy]
    by_policy: ByPolicy
    entrants: list[Entrant]
    benchmark: Benchmark
    sheet: Sheet
    seen: Mapping[str, Seen]
    notes: list[str]
    scored: float


def _under_several(
    guards: Any,
    images: ByPolicy,
    policies: Sequence[Policy],
    asked: Sequence[Retrained],
    cache: Path | None,
    trained_on: Sequence[str] | None,
    trust: Sequence[str],
    split: str,
    test_share: float,
    split_seed: int,
    engine: Engine,
    folder: Path,
) -> _Several:
    """Builds, retrains and scores; every image is read and embedded once."""
    named = [(one.name, one) for one in asked]
    entrants = _entrants(guards, policies, trained_on, trust)
    if not entrants and not named:
        raise InputError("nothing to evaluate: give at least one guard, or a head to retrain")
    everything = read_benchmark(images, split=split, test_share=test_share, split_seed=split_seed)
    notes = list(images.notes)
    told: list[str] = []  # notes that training has shown already
    stores = embedding_stores([one for entrant in entrants for one in entrant.contenders.values()], cache)
    for name, one in named:
        store = stores.setdefault(one.encoder.fingerprint, EmbeddingStore(one.encoder, cache))
        if images.loaded.encoder_fingerprint not in (None, one.encoder.fingerprint):
            raise InputError(
                f"source={images.name} holds embeddings of another encoder than retrain={name} is given, {one.encoder.name}; give theirs"
            )
        contenders, missing, training = {}, {}, {}
        for policy in policies:
            try:
                made = retrain_head(one, images.under(policy.name, test_share, split_seed), policy, store)
            except InputError as error:
                missing[policy.name] = str(error)
                notes.append(f"{name} was not trained under {policy.name}: {error}.")
                continue
            contenders[policy.name] = replace(_contender_of(made.guard, name), origin=f"retrained on {images.name}")
            figures = {"seconds": made.seconds, "embedding_seconds": made.embedding_seconds, "n_labels": made.n_labels}
            training[policy.name] = figures | {"threshold": made.guard.threshold}
            told += [f"{name} under {policy.name}: {note}." for note in made.notes]
        entrants.append(Entrant(name, "retrained", contenders, missing, training))
    entrants = _unique_entrants(entrants)
    flat = list({one.name: one for entrant in entrants for one in entrant.contenders.values()}.values())
    if not flat:
        raise InputError(f"nothing to evaluate: no head could be trained ({notes[-1]})")
    judges = judgment_stores(flat, cache)
    if not engine.is_here:
        look_elsewhere(engine, [*everything.records, *everything.counterfactuals], stores, judges, folder)
    benchmark, seen = leave_out_seen(everything, flat, stores)
    notes += [note for one in flat for note in _own_notes(one)] + sentences(benchmark, seen)
    sheet = score(benchmark, flat, stores, judges, Policy.joined(policies).category_names)
    if not sheet.records:
        raise InputError(
            f"none of the {len(sheet.rejected)} images of source={benchmark.name} can be read, the first is {sheet.rejected[0].id}: {sheet.rejected[0].reason}"
        )
    notes += _unknown_to(stores, benchmark, sheet)
    for note in notes:
        log.warning("%s", note)
    return _Several(policies, images, entrants, benchmark, sheet, seen, [*notes, *told], time.perf_counter())


def _report_policies(
    several: _Several,
    folder: Path,
    prevalence: float,
    n_resamples: int,
    seed: int,
    settings: Mapping[str, Any] | None,
    command: str,
    started: float,
) -> EvaluationReport:
    found = measure_policies(
        several.sheet,
        several.policies,
        several.by_policy.verdicts,
        several.entrants,
        prevalence=float(prevalence),
        n_resamples=n_resamples,
        seed=seed,
    )
    asked = dict(settings) if settings is not None else {"source": several.by_policy.asked, "prevalence": prevalence, "seed": seed}
    outcome = PolicyEvaluation(
        benchmark=several.benchmark,
        policies=list(several.policies),
        entrants=several.entrants,
        sheet=several.sheet,
        found=found,
        verdicts=several.by_policy.verdicts,
        seen=several.seen,
        notes=several.notes,
        prevalence=float(prevalence),
        settings={**asked, "policies": [policy.to_dict() for policy in several.policies]},
        command=command,
        timing_s={"load, retrain and score": several.scored - started, "figures": time.perf_counter() - several.scored},
    )
    with claim(folder, "evaluate", outcome.settings, replaces=WRITTEN):
        report = EvaluationReport(folder, write_policies_report(folder, outcome), policies_table(outcome))
        shutil.rmtree(folder / LEDGER, ignore_errors=True)
    return report


def _makes_guards(one: Any) -> bool:
    """Whether it is a function of a policy rather than a guard."""
    return callable(one) and not hasattr(one, "threshold")


def _entrants(guards: Any, policies: Sequence[Policy], trained_on: Sequence[str] | None, trust: Sequence[str]) -> list[Entrant]:
    found = []
    encoders: dict[str, Encoder] = {}
    for name, one in _named(guards):
        if isinstance(one, Entrant):
            found.append(one)
            continue
        if _makes_guards(one):
            made = {policy.name: _contender_of(one(policy), name, trained_on) for policy in policies}
        else:
            known = _contender(one, name, encoders, trained_on, trust)
            again = getattr(known.guard, "for_policy", None) if getattr(known.guard, "reads_policy", False) else None
            made = {
                policy.name: known if again is None else replace(known, guard=again(policy), policy=policy, name=known.name)
                for policy in policies
            }
        found.append(Entrant.of(made))
    return found


def _unique_entrants(entrants: Sequence[Entrant]) -> list[Entrant]:
    """Each under a name of its own."""
    names = [one.name for one in unique([Contender(one.name, None) for one in entrants])]  # type: ignore[arg-type]
    return [one.renamed(name) for one, name in zip(entrants, names, strict=True)]


def _natural(embeddings: np.ndarray, n_natural: int) -> np.ndarray:
    """Of natural images, as far as they have an embedding."""
    natural = embeddings[:n_natural]
    return natural[natural.any(axis=1)]


def _own_notes(contender: Contender) -> list[str]:
    """Whatever the policy."""
    notes = []
    if isinstance(contender.guard, GuardClassifier) and contender.training_images is None:
        notes.append(
            f"{contender.name} keeps no list of its training images, as guards of an earlier guardkit: whether it is tested on some of them is not known."
        )
    return notes + [f"{contender.name}: {note}." for note in getattr(contender.guard, "notes", ())]


def _unknown_to(encoders: Mapping[str, EmbeddingStore], benchmark: Benchmark, sheet: Sheet) -> list[str]:
    """Encoders that do not know images like these, in sentences."""
    known = [
        (name, store) for name, store in encoders.items() if benchmark.encoder_fingerprint in (None, name) and name in sheet.embeddings
    ]
    return [
        f"{note}."
        for name, store in known
        for note in unknown_images(store.encoder, partial(_natural, sheet.embeddings[name], sheet.n_natural))
    ]


def _attack(contender: Contender, sheet: Sheet, settings: RobustnessSettings, stores: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not settings.protocols:
        return []
    covered = covered_rows(sheet, contender) & sheet.counted
    chosen = [record for record, inside in zip(sheet.records, covered, strict=True) if inside and record.content is not None]
    if not chosen:
        log.warning("%s is not attacked: the benchmark holds no image that it covers", contender.name)
        return []
    guard = contender.guard
    return measure_robustness(
        guard,
        LazyImages(chosen),
        [record.label for record in chosen],
        [record.group for record in chosen],
        settings,
        name=contender.name,
        store=stores[guard.encoder.fingerprint] if takes_embeddings(guard) else None,
    )
