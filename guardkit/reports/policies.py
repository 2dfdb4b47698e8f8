"""What an evaluation under several policies says: the same files as under one, with tables by policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from guardkit import __version__
from guardkit.artifacts import write_json, write_table, written
from guardkit.data.columns import listing
from guardkit.evaluation.costs import cost
from guardkit.evaluation.outcome import PolicyEvaluation, plain
from guardkit.evaluation.policies import NO_POSITIVES, OF_A_POLICY, Entrant, Figure
from guardkit.metrics.figures import METRICS
from guardkit.pages import render
from guardkit.reports.costs import COST_ABOUT, COST_HEADER, COST_TITLE, cost_rows
from guardkit.reports.evaluation import EFFECTIVENESS, prediction_columns
from guardkit.reports.evaluation_page import section
from guardkit.schema import SAFE, UNSAFE, takes_embeddings

_KINDS = {"reads": "reads the policy", "retrained": "retrained for each", "fixed": "the same for all"}
_OVERALL_TITLES = {"macro_f1": "mean F1", "policy_exception_score": "exceptions, score"}
_TITLES = {name: metric.heading for name, metric in METRICS.items()} | {"accuracy": "Accuracy"}


# --- summary.json -----------------------------------------------------------------------------------------------------


def policies_summary(outcome: PolicyEvaluation) -> dict[str, Any]:
    """The figures for machines: summary.json."""
    benchmark, sheet = outcome.benchmark, outcome.sheet
    return {
        "benchmark": {
            "name": benchmark.name,
            "chosen": benchmark.chosen,
            "policies": [policy.name for policy in outcome.policies],
            "given": benchmark.given,
            "scored": sheet.n_natural,
            "n_seen_left_out": benchmark.n_left_out,
            **listing(benchmark.rejected, sheet.rejected),
        },
        "policies": {
            policy.name: {
                "digest": policy.digest,
                "categories": list(policy.category_names),
                **_counts(outcome, policy.name),
                "n_exceptions": _differing(outcome, policy.name, outcome.policies[0].name),
            }
            for policy in outcome.policies
        },
        "forbidden_and_allowed": {
            policy.name: {other.name: _forbidden_and_allowed(outcome, policy.name, other.name) for other in outcome.policies}
            for policy in outcome.policies
        },
        "default_policy": outcome.policies[0].name,
        "notes": list(outcome.notes),
        "prevalence": outcome.prevalence,
        "classifiers": {one.name: _entrant_summary(outcome, one) for one in outcome.entrants},
        "tests": outcome.found.differences,
        "tests_by_policy": outcome.found.tests,
        "passes": sheet.counts,
        "timing_s": dict(outcome.timing_s),
        "command": outcome.command,
        "settings": outcome.settings,
        "guardkit_version": __version__,
    }


def _entrant_summary(outcome: PolicyEvaluation, entrant: Entrant) -> dict[str, Any]:
    sheet, names = outcome.sheet, [one.name for one in outcome.sheet.contenders]
    first = next(iter(entrant.contenders.values()), None)
    facts: dict[str, Any] = {
        "kind": entrant.kind,
        "origin": None if first is None else first.origin,
        "trained_under": first.policy.name if first is not None and first.policy is not None and entrant.kind == "fixed" else None,
        "encoder": first.guard.encoder.name if first is not None and takes_embeddings(first.guard) else None,
        "cost": None,
        "by_policy": {
            policy.name: {
                "figures": outcome.found.by_policy[entrant.name].get(policy.name),
                "reason": entrant.missing.get(policy.name),
                "threshold": float(entrant.contenders[policy.name].guard.threshold) if policy.name in entrant.contenders else None,
                "fingerprint": entrant.contenders[policy.name].guard.fingerprint if policy.name in entrant.contenders else None,
                "training": dict(entrant.training[policy.name]) if policy.name in entrant.training else None,
            }
            for policy in outcome.policies
        },
        "overall": outcome.found.overall[entrant.name],
    }
    if first is not None:
        encoder = sheet.encoder_seconds[first.guard.encoder.fingerprint] if takes_embeddings(first.guard) else None
        facts["cost"] = cost(first, sheet.own_seconds[names.index(first.name)], encoder)
    return facts


def _counts(outcome: PolicyEvaluation, policy: str) -> dict[str, int]:
    """Images that were counted under a policy."""
    sheet = outcome.found.sheets[policy]
    labels = sheet.labels[sheet.counted]
    return {
        "n": len(labels),
        "n_unsafe": int((labels == UNSAFE).sum()),
        "n_safe": int((labels == SAFE).sum()),
        "n_not_judged": int((~sheet.counted[: sheet.n_natural]).sum()),
    }


def _forbidden_and_allowed(outcome: PolicyEvaluation, policy: str, other: str) -> int:
    """Images that the one policy forbids and the other allows."""
    mine, theirs = outcome.found.sheets[policy], outcome.found.sheets[other]
    both = mine.counted & theirs.counted
    return int((both & (mine.labels == UNSAFE) & (theirs.labels == SAFE)).sum())


def _differing(outcome: PolicyEvaluation, policy: str, other: str) -> int:
    return _forbidden_and_allowed(outcome, policy, other) + _forbidden_and_allowed(outcome, other, policy)


# --- tables -----------------------------------------------------------------------------------------------------------


def _cell(figure: Figure | None, digits: int = 3, mark: str = "") -> dict[str, Any]:
    if figure is None or figure["value"] is None:
        return {
            "text": "–",
            "interval": "",
            "title": "not there" if figure is None else figure["reason"],
            "is_best": False,
            "is_text": False,
        }
    interval = "" if figure["ci_low"] is None else f"{figure['ci_low']:.{digits}f}–{figure['ci_high']:.{digits}f}"
    return {
        "text": f"{mark}{figure['value']:.{digits}f}",
        "interval": interval,
        "title": f"n = {figure['n']}",
        "is_best": False,
        "is_text": False,
    }


def _plain_cell(text: Any, title: str = "", *, is_text: bool = False) -> dict[str, Any]:
    return {"text": str(text), "interval": "", "title": title, "is_best": False, "is_text": is_text}


def _kind(entrant: Entrant) -> str:
    first = next(iter(entrant.contenders.values()), None)
    under = f", trained under {first.policy.name}" if entrant.kind == "fixed" and first is not None and first.policy is not None else ""
    return _KINDS[entrant.kind] + under


def _by_policy_cell(outcome: PolicyEvaluation, entrant: Entrant, policy: str) -> dict[str, Any]:
    """F1, or accuracy where the policy forbids none of the images."""
    figures = outcome.found.by_policy[entrant.name].get(policy)
    if figures is None:
        return _plain_cell("–", entrant.missing.get(policy, "not measured"))
    if figures["f1"]["reason"] == NO_POSITIVES:
        return _cell(figures["accuracy"], mark="accuracy ") | {"title": NO_POSITIVES}
    return _cell(figures["f1"])


def _seconds_cell(entrant: Entrant) -> dict[str, Any]:
    """What a new policy costs this classifier."""
    if entrant.kind == "reads":
        return _plain_cell("0", "it reads the new policy")
    if not entrant.training:
        return _plain_cell("–", "it stays what it is, whatever the policy")
    seconds = [one["seconds"] for one in entrant.training.values()]
    return _plain_cell(
        f"{sum(seconds) / len(seconds):.2f}", f"mean of {len(seconds)} policies, from the policy to the guard, on stored embeddings"
    )


def _sections(outcome: PolicyEvaluation, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything as tables: title, what it is, header, rows of a name and cells."""
    names = [policy.name for policy in outcome.policies]
    entrants, overall = outcome.entrants, outcome.found.overall
    main: list[dict[str, Any]] = [
        {
            "name": one.name,
            "cells": [
                _plain_cell(_kind(one), is_text=True),
                *(_by_policy_cell(outcome, one, name) for name in names),
                *(_cell(overall[one.name][metric]) for metric in ("macro_f1", "policy_exception_rate", "policy_exception_score")),
                _seconds_cell(one),
            ],
        }
        for one in entrants
    ]
    columns = range(1, len(names) + 4)
    for column in columns:
        cells = [row["cells"][column] for row in main]
        values = {cell["text"] for cell in cells if cell["text"] != "–"}
        for cell in cells:
            cell["is_best"] = len(values) > 1 and cell["text"] == max(values)
    every = [
        {
            "name": one.name,
            "cells": [
                _plain_cell(name, is_text=True),
                _plain_cell(plain(one.contenders[name].guard.threshold)),
                *(_cell(outcome.found.by_policy[one.name][name][metric]) for metric in OF_A_POLICY),
            ],
        }
        for one in entrants
        for name in names
        if name in one.contenders
    ]
    policies = [
        {
            "name": name,
            "cells": [_plain_cell(", ".join(about["categories"]), is_text=True)]
            + [_plain_cell(about[key]) for key in ("n", "n_unsafe", "n_not_judged", "n_exceptions")],
        }
        for name, about in facts["policies"].items()
    ]
    matrix = [
        {"name": name, "cells": [_plain_cell("·" if other == name else facts["forbidden_and_allowed"][name][other]) for other in names]}
        for name in names
    ]
    training = [
        {
            "name": one.name,
            "cells": [
                _plain_cell(name, is_text=True),
                _plain_cell(about["n_labels"]),
                _plain_cell(f"{about['seconds']:.2f}"),
                _plain_cell(f"{about['embedding_seconds']:.2f}"),
            ],
        }
        for one in entrants
        for name, about in one.training.items()
    ]
    differences = [
        {
            "name": test["first"],
            "cells": [
                _plain_cell(test["second"], is_text=True),
                _plain_cell(_OVERALL_TITLES[test["metric"]], is_text=True),
                {**_plain_cell(f"{test['difference']:+.3f}"), "interval": f"{test['ci_low']:+.3f} to {test['ci_high']:+.3f}"},
                _plain_cell(f"{test['p']:.4f}"),
                _plain_cell(f"{test['p_holm']:.4f}"),
            ],
        }
        for test in outcome.found.differences
    ]
    costs = cost_rows({name: one["cost"] for name, one in facts["classifiers"].items() if one["cost"] is not None})
    return [
        {
            "id": "glance",
            "title": "F1 by policy",
            "about": "All images that a policy judges count, whatever a classifier was made to find. Where a policy forbids none of the images there is no F1 "
            "and its accuracy stands in its place, outside the mean. Exceptions are images with another label than under "
            f"{names[0]}: rate (PER) is the share decided rightly, score (PES) its harmonic mean with the balanced accuracy over all policies "
            "(LlavaGuard). Seconds: what one more policy takes on stored embeddings.",
            "header": [
                "classifier",
                "policies",
                *names,
                "mean F1",
                "exceptions, rate",
                "exceptions, score",
                "seconds for a new policy",
            ],
            "rows": main,
        },
        {
            "id": "policies",
            "title": "The policies",
            "about": f"Exceptions: images with another label than under {names[0]}.",
            "header": ["policy", "categories", "images", "unsafe", "not judged", "exceptions"],
            "rows": policies,
        },
        {
            "id": "differences",
            "title": "Forbidden by one, allowed by another",
            "about": "Images that the policy of the row forbids and the policy of the column allows.",
            "header": ["forbidden by", *names],
            "rows": matrix,
        },
        {
            "id": "figures",
            "title": "All figures",
            "about": "",
            "header": ["classifier", "policy", "threshold", *(_TITLES[metric] for metric in OF_A_POLICY)],
            "rows": every,
        },
        {
            "id": "retraining",
            "title": "What a new policy takes",
            "about": "Seconds from the policy to the guard, on embeddings that are stored. Images that no earlier policy had needed were embedded first, which is "
            "counted apart.",
            "header": ["classifier", "policy", "labels", "seconds", "seconds of embedding"],
            "rows": training,
        },
        {
            "id": "tests",
            "title": "Differences between classifiers",
            "about": "Every two that decide under all policies, by the same redrawn images; p values corrected for their number within each figure (Holm).",
            "header": ["first", "second", "figure", "first − second", "p", "p (Holm)"],
            "rows": differences,
        },
        {"id": "costs", "title": COST_TITLE, "about": COST_ABOUT, "header": list(COST_HEADER), "rows": costs},
    ]


def policies_table(outcome: PolicyEvaluation) -> str:
    """The main numbers, for the terminal."""
    names = [policy.name for policy in outcome.policies]
    width = max(len(one.name) for one in outcome.entrants)
    rows = [
        [
            one.name,
            *(_by_policy_cell(outcome, one, name)["text"].replace("accuracy ", "acc ") for name in names),
            *(_cell(outcome.found.overall[one.name][metric])["text"] for metric in ("macro_f1", "policy_exception_score")),
            _seconds_cell(one)["text"],
        ]
        for one in outcome.entrants
    ]
    header = ["", *names, "mean F1", "exceptions", "s/policy"]
    widths = [width, *(max(len(title), *(len(row[i]) for row in rows)) for i, title in enumerate(header[1:], 1))]
    sheet = outcome.sheet
    lines = [f"{outcome.benchmark.name}: {sheet.n_natural} images under {len(names)} policies ({outcome.benchmark.chosen})"]
    for row in [header, *rows]:
        lines.append(
            "  "
            + "  ".join(f"{cell:<{size}}" if i == 0 else f"{cell:>{size}}" for i, (cell, size) in enumerate(zip(row, widths, strict=True)))
        )
    lines.append("  F1 by policy; exceptions: LlavaGuard's policy exception score; s/policy: seconds that a new policy takes")
    return "\n".join([*lines, *(f"  {note}" for note in outcome.notes)])


# --- files ------------------------------------------------------------------------------------------------------------


def _write_tables(folder: Path, outcome: PolicyEvaluation) -> None:
    schema = EFFECTIVENESS.append(pa.field("policy", pa.string()))
    write_table(folder / "effectiveness.parquet", pa.Table.from_pylist(outcome.found.rows, schema=schema))
    parts = []
    for policy in outcome.policies:
        sheet, said = outcome.found.sheets[policy.name], outcome.verdicts[policy.name]
        judged = [row >= sheet.n_natural or record.id in said for row, record in enumerate(sheet.records)]
        table = pa.table(prediction_columns(sheet))
        table = table.filter(pa.array([there for there in judged for _ in sheet.contenders]))
        parts.append(table.append_column("policy", pa.array([policy.name] * len(table), pa.string())))
    write_table(folder / "predictions.parquet", pa.concat_tables(parts))


def write_policies_report(folder: Path, outcome: PolicyEvaluation) -> dict[str, Any]:
    """effectiveness.parquet, predictions.parquet, report.html, report.md and, last, summary.json.

    Returns:
        The content of summary.json.
    """
    _write_tables(folder, outcome)
    facts = policies_summary(outcome)
    sections = [one for one in _sections(outcome, facts) if one["rows"]]
    page = render("policies.html", facts=facts, sections=sections)
    for name, text in (("report.html", page), ("report.md", _markdown(facts, sections))):
        with written(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # it shows paths, which may be no text
    write_json(folder / "summary.json", facts)
    return facts


def _markdown(facts: dict[str, Any], sections: Sequence[dict[str, Any]]) -> str:
    about = facts["benchmark"]
    lines = [
        f"# Image guards on {about['name']}, under {len(about['policies'])} policies",
        "",
        f"`{facts['command']}`",
        "",
        f"{about['scored']} images: {about['chosen']}. {len(about['rejected'])} of {about['given']} inputs could not be used. Intervals are 95 %, from a "
        "bootstrap of groups (a pair, near-duplicates).",
        *(f"\n**{note}**" for note in facts["notes"]),
    ]
    for one in sections:
        rows = [[row["name"], *(_text(cell) for cell in row["cells"])] for row in one["rows"]]
        lines += section(one["title"], one["header"], rows, one["about"])
    return "\n".join([*lines, ""])


def _text(cell: dict[str, Any]) -> str:
    return f"{cell['text']} ({cell['interval']})" if cell["interval"] else cell["text"]
