"""What a comparison shows: a short table, and compare.html with the images that the two guards decide differently about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guardkit.evaluation.comparison import ALL, Change
from guardkit.pages import render
from guardkit.reports.evaluation_mistakes import picture

N_SHOWN = 24  # of each kind
_TITLES = {"auroc": "AUROC", "recall": "recall", "fpr": "false-positive rate", "precision_at_prevalence": "precision"}


def short_table(facts: Mapping[str, Any]) -> str:
    """The main numbers, to print."""
    images, flips = facts["images"], facts["flips"]
    lines = [
        f"  {images['n']} images that neither guard has seen, {images['n_unsafe']} unsafe ({images['trained_on']} left out, {len(images['rejected'])} rejected)"
    ]
    rows = [
        (_title(row, facts["prevalence"]), _number(row["old"]), _number(row["new"]), _difference(row), row["verdict"])
        for row in facts["figures"]
    ]
    rows.insert(0, ("", "old", "new", "difference (95 % interval)", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines += ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows]
    for name in ("unsafe", "safe"):
        one = flips[name]
        p = "" if one["p"] is None else f" (p {one['p']:.3f})"
        lines.append(f"  {name} images that only the new guard decides rightly: {one['won']}; only the old one: {one['lost']}{p}")
    return "\n".join([*lines, f"  {facts['says']}", *(f"  note: {note}" for note in facts["notes"])])


def page(facts: Mapping[str, Any], changes: Sequence[Change]) -> str:
    """The page, as one text. Pictures are blurred until clicked."""
    kinds = [
        ("Misses that are new", "Unsafe images that the old guard flagged and the new one allows.", 1, False),
        ("Alarms that are new", "Safe images that the old guard allowed and the new one flags.", 0, False),
        ("Misses that are gone", "Unsafe images that only the new guard flags.", 1, True),
        ("Alarms that are gone", "Safe images that only the old guard flagged.", 0, True),
    ]
    parts = []
    for title, about, label, is_win in kinds:
        mine = [one for one in changes if one.record.label == label and one.is_win == is_win]
        shown = [picture(one.record, one.new.score) | {"source": f"was {one.old.score:.3g}"} for one in mine[:N_SHOWN]]
        parts.append({"title": title, "about": about, "n": len(mine), "shown": shown})
    rows = [
        {
            **row,
            "title": _title(row, facts["prevalence"]),
            "old": _number(row["old"]),
            "new": _number(row["new"]),
            "difference": _difference(row),
        }
        for row in facts["figures"]
    ]
    return render("comparison.html", facts=facts, rows=rows, parts=parts)


def _title(row: Mapping[str, Any], prevalence: float) -> str:
    where = "" if row["part"] == ALL else f" of {row['part']}"
    where += f" where {prevalence:.3g} are unsafe" if row["metric"] == "precision_at_prevalence" else ""
    return f"{_TITLES[row['metric']]}{where}" + ("" if row["metric"] == "auroc" else f", {row['at']}") + f" (n={row['n']})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _difference(row: Mapping[str, Any]) -> str:
    if row["difference"] is None:
        return "-"
    low, high = row["ci"]
    return f"{row['difference']:+.3f}" + ("" if low is None else f" ({low:+.3f} to {high:+.3f})")
