"""The same images under several policies: each classifier's figures by policy, their mean, and how well it follows where policies differ.

Scores are made once, for all policies (`guardkit.evaluation.scoring`); here they are counted under each. All images that a policy judged
count, whatever a classifier was made to find: whether it can be told another policy is what is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from guardkit.data.by_policy import Verdict, judged
from guardkit.evaluation.effectiveness import Row, measure
from guardkit.evaluation.scoring import Contender, Sheet
from guardkit.metrics.draws import GroupDraws
from guardkit.metrics.figures import Images, weighted
from guardkit.metrics.intervals import Interval, bootstrap_p_value, clopper_pearson, holm, percentile_interval
from guardkit.policy import Policy
from guardkit.schema import SAFE, UNSAFE

OF_A_POLICY = ("f1", "accuracy", "balanced_accuracy", "precision", "recall", "fpr", "auroc")
COMPARED = ("macro_f1", "policy_exception_score")  # chosen beforehand: each more costs certainty of the others
OF_ALL_POLICIES = ("macro_f1", "policy_exception_rate", "pooled_balanced_accuracy", "policy_exception_score")
_SHARES = {"accuracy": "all", "precision": "flagged", "recall": "unsafe", "fpr": "safe"}
NO_POSITIVES = "the policy forbids none of these images; accuracy says what there is to say"

Figure = dict[str, Any]
"""value, ci_low, ci_high, n, and the reason where there is no value."""


@dataclass(frozen=True)
class Entrant:
    """A classifier under several policies.

    Attributes:
        name: for tables; unique.
        kind: "reads" the policy, is "retrained" for each, or "fixed": the same under all.
        contenders: by policy, who decides under it.
        missing: policies under which there is none, and why.
        training: by policy, what retraining cost, plain JSON: seconds, embedding_seconds, n_labels.
    """

    name: str
    kind: str
    contenders: Mapping[str, Contender]
    missing: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, contenders: Mapping[str, Contender]) -> Entrant:
        """One whose guards were made for each policy; where a policy makes no difference to scores, they are one.

        Args:
            contenders: by policy, under one name.
        """
        first = next(iter(contenders.values()))
        prints = {(one.guard.fingerprint, one.guard.covers) for one in contenders.values()}
        if len(prints) == 1:
            contenders = dict.fromkeys(contenders, first)
        said = getattr(first.guard, "reads_policy", None)
        reads = len({one for one, _ in prints}) > 1 if said is None else bool(said)
        return cls(first.name, "reads" if reads else "fixed", contenders)

    def renamed(self, name: str) -> Entrant:
        """Under another name; each contender has it too, with its policy where there are several."""
        several = len({id(one) for one in self.contenders.values()}) > 1 or self.kind == "retrained"
        named = {policy: replace(one, name=f"{name} [{policy}]" if several else name) for policy, one in self.contenders.items()}
        return replace(self, name=name, contenders=named)


@dataclass(frozen=True)
class Compliance:
    """What was found of all classifiers under all policies.

    Attributes:
        sheets: by policy, the scores with its labels; its contenders are those of the entrants that it has, under their names.
        rows: of effectiveness.parquet, with a policy; those over all policies have None.
        tests: by policy, differences between classifiers.
        by_policy: entrant -> policy -> figure of `OF_A_POLICY` -> Figure.
        overall: entrant -> figure of `OF_ALL_POLICIES` -> Figure.
        differences: of every two entrants in what `COMPARED` names, over all policies, by the same redraws.
    """

    sheets: dict[str, Sheet]
    rows: list[Row]
    tests: dict[str, list[Row]]
    by_policy: dict[str, dict[str, dict[str, Figure]]]
    overall: dict[str, dict[str, Figure]]
    differences: list[Row]


def sheet_under(sheet: Sheet, policy: Policy, said: Mapping[str, Verdict], entrants: Sequence[Entrant]) -> Sheet:
    """The scores as one policy has them. Images that it did not judge stay in place and are not counted.

    Args:
        sheet: of all contenders of all policies, under the labels of none.
        policy: whose labels count.
        said: id of an image -> what the policy says of it.
        entrants: those with a contender under the policy become its columns.
    """
    there = [one for one in entrants if policy.name in one.contenders]
    names = [one.name for one in sheet.contenders]
    columns = [names.index(one.contenders[policy.name].name) for one in there]
    n = sheet.n_natural
    known = np.array([record.id in said for record in sheet.records[:n]], bool)
    records = [
        judged(record, said) if known[row] else replace(record, label=SAFE, category=None) for row, record in enumerate(sheet.records[:n])
    ]
    records += [
        replace(record, category=record.category if record.category in policy.category_names else None) for record in sheet.records[n:]
    ]
    labels = np.array([record.label for record in records], int)
    counted = sheet.counted.copy()
    counted[:n] &= known
    kept = np.array([known[row] and labels[row] == UNSAFE for row in sheet.pair_rows[:, 0]], bool)
    return replace(
        sheet,
        contenders=[replace(one.contenders[policy.name], name=one.name) for one in there],
        records=records,
        labels=labels,
        scores=sheet.scores[:, columns],
        pair_rows=sheet.pair_rows[kept],
        similarity=None if sheet.similarity is None else sheet.similarity[kept],
        counted=counted,
        categories=policy.category_names,
        reasons=[sheet.reasons[column] for column in columns],
        own_seconds=[sheet.own_seconds[column] for column in columns],
    )


def measure_policies(
    sheet: Sheet,
    policies: Sequence[Policy],
    verdicts: Mapping[str, Mapping[str, Verdict]],
    entrants: Sequence[Entrant],
    *,
    prevalence: float,
    n_resamples: int,
    seed: int,
) -> Compliance:
    """All figures under all policies.

    Args:
        sheet: of all contenders of all policies.
        policies: the first is the one that exceptions are exceptions to.
        verdicts: by policy, what it says of each image.
        entrants: what is measured.
        prevalence, n_resamples, seed: as of `measure`.
    """
    sheets = {policy.name: sheet_under(sheet, policy, verdicts[policy.name], entrants) for policy in policies}
    draws = GroupDraws([record.group for record in sheet.records], n_resamples=n_resamples, seed=seed)
    rows: list[Row] = []
    tests: dict[str, list[Row]] = {}
    for name, own in sheets.items():
        found, tests[name] = measure(own, prevalence=prevalence, n_resamples=n_resamples, seed=seed)
        for row in found:
            if row["metric"] == "f1" and not row["n_unsafe"]:  # 0 where something is flagged, which would be taken for a bad guard
                row |= {"value": None, "ci_low": None, "ci_high": None, "reason": row["reason"] or "no unsafe image"}
        rows += [row | {"policy": name} for row in found]
    by_policy: dict[str, dict[str, dict[str, Figure]]] = {}
    overall: dict[str, dict[str, Figure]] = {}
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for entrant in entrants:
        there = {name: _Judged.of(sheets[name], entrant.name, draws) for name in sheets if name in entrant.contenders}
        by_policy[entrant.name] = {name: _figures(one) for name, one in there.items()}
        overall[entrant.name], drawn[entrant.name] = _overall(there, sheets[policies[0].name], draws)
        for name, figures in by_policy[entrant.name].items():
            rows.append(_row(entrant.name, name, "accuracy", figures["accuracy"], there[name]))
        rows += [_row(entrant.name, None, metric, figure) for metric, figure in overall[entrant.name].items()]
    # of those that decide under every policy, so that all are compared on the same images
    everywhere = [one.name for one in entrants if len(one.contenders) == len(policies)]
    return Compliance(sheets, rows, tests, by_policy, overall, _differences({name: drawn[name] for name in everywhere}))


@dataclass(frozen=True)
class _Judged:
    """What one classifier said of the images that one policy judged: `rows` of the sheet, their labels, whether each was flagged."""

    rows: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    threshold: float
    groups: list[str]
    draws: GroupDraws

    @classmethod
    def of(cls, sheet: Sheet, name: str, draws: GroupDraws) -> _Judged:
        column = [one.name for one in sheet.contenders].index(name)
        rows = np.flatnonzero(sheet.counted)
        groups = [sheet.records[row].group for row in rows]
        return cls(rows, sheet.labels[rows], sheet.scores[rows, column], sheet.contenders[column].guard.threshold, groups, draws)

    @property
    def flagged(self) -> np.ndarray:
        """(n,) bool; an abstention flags nothing."""
        return np.nan_to_num(self.scores, nan=-1.0) >= self.threshold

    @property
    def images(self) -> Images:
        return Images(self.labels, self.scores[None], np.array([self.threshold]), self.draws, self.rows)

    def share(self, right: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(draws,) how many of the images `among` are right, and how many there are; both bool (n,)."""
        right, among = self.draws.totals(np.stack([right & among, among]).astype(float), self.rows)
        return right, among

    def n_groups(self, among: np.ndarray) -> int:
        return len({group for group, inside in zip(self.groups, among, strict=True) if inside})


def _figures(one: _Judged) -> dict[str, Figure]:
    """Of one classifier under one policy."""
    unsafe, n = one.labels == UNSAFE, len(one.labels)
    values = {name: drawn[0] for name, drawn in weighted([name for name in OF_A_POLICY if name != "accuracy"], one.images).items()}
    right, total = one.share(one.flagged == unsafe, np.ones(n, bool))
    with np.errstate(invalid="ignore", divide="ignore"):
        values["accuracy"] = right / total
    among = {"all": np.ones(n, bool), "unsafe": unsafe, "safe": ~unsafe, "flagged": one.flagged}
    found = {}
    for name in OF_A_POLICY:
        share = _SHARES.get(name)
        found[name] = _figure(values[name], n, n_groups=None if share is None else one.n_groups(among[share]))
        if found[name]["value"] is None:
            found[name]["reason"] = "no such image, or none that was flagged"
    if not unsafe.any():
        found["f1"] = _undefined(n, NO_POSITIVES)
    return found


def _overall(there: Mapping[str, _Judged], reference: Sheet, draws: GroupDraws) -> tuple[dict[str, Figure], dict[str, np.ndarray]]:
    """Of one classifier over all policies; and the values of `COMPARED` on all redraws, where they are defined.

    macro_f1: the mean of F1 over the policies that forbid some of the images, each counting alike (SafeEditBench's macro-averaged F1; Piao et al.,
    2026, arXiv:2603.01228). The authors' code counts a policy without positives as F1 0 (`zero_division=0`); here it is left out of the
    mean, and its accuracy is given.

    policy_exception_rate and policy_exception_score: LlavaGuard's PER and PES (Helff et al., 2025, arXiv:2406.05113v3, section 5.2, equations
    1 and 2). PER is the share of exceptions that are decided rightly. An exception is an image under a policy that gives it another label
    than the default policy does: there a category is dropped that the image violates, or one is added (`_v2` and `_v4` in the authors'
    evaluation); here it is any image whose label under a policy differs from that under the first policy. PES is the harmonic mean of PER and
    balanced accuracy, 2 PER Acc / (PER + Acc). Acc is over all images under all policies together, as in the authors' code, exceptions
    included.
    """
    # the label under the first policy, -1 where it did not judge
    default = np.where(reference.counted, reference.labels, -1)
    names = list(there)
    forbidding = [name for name in names if (there[name].labels == UNSAFE).any()]
    n_images = sum(len(one.labels) for one in there.values())
    found: dict[str, np.ndarray] = {}
    if forbidding:
        found["macro_f1"] = drawn = np.mean([weighted(["f1"], there[name].images)["f1"][0] for name in forbidding], axis=0)
        macro = _figure(drawn, sum(len(there[name].labels) for name in forbidding))
    else:
        macro = _undefined(n_images, "none of the policies forbids any of these images")
    zeros = np.zeros(len(draws))
    hits, exceptions, n_exceptions = zeros, zeros, 0
    counts = dict.fromkeys((UNSAFE, SAFE), (zeros, zeros))
    groups: set[str] = set()
    for one in there.values():
        right = one.flagged == (one.labels == UNSAFE)
        differs = (default[one.rows] >= 0) & (default[one.rows] != one.labels)
        n_exceptions += int(differs.sum())
        groups |= {group for group, inside in zip(one.groups, differs, strict=True) if inside}
        more, all_of_them = one.share(right, differs)
        hits, exceptions = hits + more, exceptions + all_of_them
        for kind in counts:
            more, all_of_them = one.share(right, one.labels == kind)
            counts[kind] = counts[kind][0] + more, counts[kind][1] + all_of_them
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = np.mean([right / total for right, total in counts.values()], axis=0)
        per = hits / exceptions
        pes = np.where(per + accuracy > 0, 2 * per * accuracy / (per + accuracy), np.where(np.isnan(per + accuracy), np.nan, 0.0))
    pooled = _figure(accuracy, n_images)
    if pooled["value"] is None:
        pooled["reason"] = "needs unsafe and safe images"
    if not n_exceptions:
        none = _undefined(0, "no image has another label than under the first policy")
        rate, score = none, dict(none)
    else:
        rate, score = _figure(per, n_exceptions, n_groups=len(groups)), _figure(pes, n_exceptions)
        if score["value"] is None:
            score["reason"] = "needs unsafe and safe images"
        found["policy_exception_score"] = pes
    figures = {"macro_f1": macro, "policy_exception_rate": rate, "pooled_balanced_accuracy": pooled, "policy_exception_score": score}
    return figures, found


def _differences(drawn: Mapping[str, Mapping[str, np.ndarray]]) -> list[Row]:
    """Every two classifiers; p values are corrected for their number within each figure (Holm)."""
    tests: list[Row] = []
    for metric in COMPARED:
        mine: list[Row] = []
        for first, second in combinations([name for name in drawn if metric in drawn[name]], 2):
            difference = drawn[first][metric] - drawn[second][metric]
            estimate = float(difference[0])
            if not np.isfinite(estimate):
                continue
            interval = percentile_interval(difference[1:], estimate)
            p = bootstrap_p_value(estimate, difference[1:])
            mine.append(
                {
                    "metric": metric,
                    "first": first,
                    "second": second,
                    "difference": estimate,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "p": p,
                }
            )
        tests += [test | {"p_holm": float(p)} for test, p in zip(mine, holm([test["p"] for test in mine]), strict=True)]
    return tests


def _figure(drawn: np.ndarray, n: int, *, n_groups: int | None = None) -> Figure:
    """A figure and its interval from (1 + resamples,) values; a share that is 0 or 1 has Clopper and Pearson's, by its groups."""
    interval = percentile_interval(drawn[1:], float(drawn[0]))
    if n_groups and interval.estimate in (0.0, 1.0):
        interval = Interval(interval.estimate, *clopper_pearson(interval.estimate * n_groups, n_groups))
    value, low, high = (None if not np.isfinite(one) else float(one) for one in (interval.estimate, interval.low, interval.high))
    if value is None:
        return _undefined(n, "undefined")
    return {"value": value, "ci_low": low, "ci_high": high, "n": n, "reason": None}


def _undefined(n: int, reason: str) -> Figure:
    return {"value": None, "ci_low": None, "ci_high": None, "n": n, "reason": reason}


def _row(classifier: str, policy: str | None, metric: str, figure: Figure, one: _Judged | None = None) -> Row:
    """A row of effectiveness.parquet of what `measure` has no figure for."""
    return {
        "classifier": classifier,
        "part": "images",
        "metric": metric,
        **figure,
        "n_unsafe": None if one is None else int((one.labels == UNSAFE).sum()),
        "n_abstained": None if one is None else int(np.isnan(one.scores).sum()),
        "threshold": None if one is None else float(one.threshold),
        "point": None,
        "scope": "all",
        "negatives": "all_safe",
        "category": None,
        "source": None,
        "distribution": None,
        "similarity_low": None,
        "similarity_high": None,
        "policy": policy,
    }
