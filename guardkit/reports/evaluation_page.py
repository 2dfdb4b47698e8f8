"""report.html and report.md: the same figures for a browser and for a text. Both stand alone; the page loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardkit.evaluation.outcome import TITLES, Evaluation, plain
from guardkit.metrics.figures import OF_IMAGES, OF_PAIRS
from guardkit.pages import render
from guardkit.reports import evaluation_parts as parts
from guardkit.reports.costs import COST_ABOUT, COST_HEADER, COST_TITLE, cost_rows
from guardkit.reports.evaluation_mistakes import mistakes
from guardkit.reports.evaluation_parts import SOURCE_METRICS

_SHORT_TITLES = {"fpr": "FPR", "balanced_accuracy": "Balanced accuracy", "ece": "Calib. error", "precision_at_prevalence": "Precision at"}


def html(evaluation: Evaluation, facts: dict[str, Any]) -> str:
    """The page, as one text.

    Args:
        evaluation: what was found.
        facts: the content of summary.json.
    """
    return render(
        "evaluation.html",
        titles=TITLES,
        short_titles=TITLES | _SHORT_TITLES,
        facts=facts,
        classifiers=parts.classifiers(evaluation),
        glance=parts.glance(evaluation, "covered"),
        outside=parts.glance(evaluation, "all"),
        glance_metrics=OF_IMAGES,
        heats=parts.heats(evaluation),
        curves=parts.curves(evaluation),
        sources=parts.sources(evaluation),
        pairs=parts.pairs(evaluation),
        robustness=parts.robustness(evaluation),
        mistakes=mistakes(evaluation),
        points=parts.points(evaluation),
        prevalence=evaluation.prevalence,
        costs=[row | {"colour": colour} for colour, row in enumerate(cost_rows(_costs(facts)))],
        cost_title=COST_TITLE,
        cost_about=COST_ABOUT,
        cost_header=COST_HEADER,
    )


def markdown(evaluation: Evaluation, facts: dict[str, Any]) -> str:
    """The tables as Markdown. Arguments as for `html`."""
    about = facts["benchmark"]
    lines = [
        f"# Image guards on {about['name']}",
        "",
        f"`{facts['command']}`",
        "",
        f"{about['n']} images, {about['n_unsafe']} unsafe, {about['n_pairs']} pairs, policy `{about['policy']}`: {about['chosen']}. "
        f"{about.get('n_rejected', len(about['rejected']))} of {about['given']} inputs could not be used. F1 of flagging everything: {plain(facts['always_unsafe']['f1'])}. "
        "Intervals are 95 %, from a bootstrap of groups (a pair, near-duplicates).",
        *(f"\n**{note}**" for note in facts["notes"]),
    ]
    header = ["classifier", "n", "threshold", *(TITLES[metric] for metric in OF_IMAGES), "F1 of flagging everything", "abstained"]
    for title, scope in (("What each classifier covers", "covered"), ("All images, whatever a classifier covers", "all")):
        rows = [
            [row["name"], row["n"], plain(row["threshold"]), *_texts(row), plain(row["always_unsafe"]), row["n_abstained"]]
            for row in parts.glance(evaluation, scope)
        ]
        lines += section(title, header, rows)
    names = [one.name for one in evaluation.contenders]
    for heat in parts.heats(evaluation):
        rows = [[row["name"], row["n_unsafe"], *_texts(row)] for row in heat["rows"]]
        lines += section(f"{heat['title']}, by category", ["category", "unsafe", *names], rows)
    if sources := parts.sources(evaluation):
        rows = [[row["name"], row["source"], row["distribution"], row["n"], *_texts(row)] for row in sources["rows"]]
        lines += section("By source", ["classifier", "source", "trained on it", "n", *(TITLES[metric] for metric in SOURCE_METRICS)], rows)
    if pairs := parts.pairs(evaluation):
        rows = [[row["name"], row["similarity"], row["n"], *_texts(row)] for row in pairs["rows"]]
        lines += section("Pairs", ["classifier", "cosine of the pair", "n", *(TITLES[metric] for metric in OF_PAIRS)], rows)
    if robustness := parts.robustness(evaluation):
        for part in robustness["tables"]:
            lines += section(part["title"], [part["first"], *part["columns"]], [[row["name"], *_texts(row)] for row in part["rows"]])
        lines += [f"- {text}" for text in ("", *robustness["violations"], *robustness["notes"]) if text]
    costs = [[row["name"], *_texts(row)] for row in cost_rows(_costs(facts))]
    lines += section(COST_TITLE, COST_HEADER, costs, COST_ABOUT)
    rows = [
        [
            TITLES[test["metric"]],
            test["first"],
            test["second"],
            plain(test["difference"]),
            f"{plain(test['ci_low'])} to {plain(test['ci_high'])}",
            test["n"],
            plain(test["p"], 4),
            plain(test["p_holm"], 4),
        ]
        for test in evaluation.tests
    ]
    header = ["figure", "first", "second", "first − second", "95 % interval", "n", "p", "p (Holm)"]
    return "\n".join([*lines, *section("Differences between classifiers", header, rows), ""])


def _costs(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: one["cost"] for name, one in facts["classifiers"].items()}


def section(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], about: str = "") -> list[str]:
    """A heading, what the table is, and the table; nothing without rows."""
    if not rows:
        return []
    clean = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    table = ["| " + " | ".join(row) + " |" for row in [clean[0], ["---"] * len(header), *clean[1:]]]
    return ["", f"## {title}", "", *([about, ""] if about else []), *table]


def _texts(row: dict[str, Any]) -> list[str]:
    return [f"{cell['text']} ({cell['interval']})" if cell["interval"] else cell["text"] for cell in row["cells"]]
