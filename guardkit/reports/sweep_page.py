"""The words and tables of a sweep: Markdown, a page that stands alone, and a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardkit.efficiency.plan import in_sentences
from guardkit.metrics.figures import METRICS
from guardkit.pages import render

_PICTURE_SAYS = "Learning curves, labels to a target, gain by category"
_N_SAID = 8  # reasons for what was left out, at the terminal

Table = tuple[str, str, list[str], list[list[str]]]
"""Heading, a line about it, column names, rows."""


def markdown(summary: dict[str, Any], picture: str) -> str:
    """report.md."""
    parts = [
        f"# Sample efficiency: {summary['metric']}",
        "",
        *_lead(summary),
        "",
        f"![{_PICTURE_SAYS}]({picture})",
    ]
    for heading, about, columns, rows in _tables(summary):
        parts += ["", f"## {heading}", ""]
        if about:
            parts += [about, ""]
        parts += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        parts += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(parts) + "\n"


def page(summary: dict[str, Any], picture: str) -> str:
    """report.html; `picture` is a data URL, so that nothing else is needed."""
    return render(
        "sweep.html",
        title=summary["metric"],
        lead=_lead(summary),
        picture=picture,
        picture_says=_PICTURE_SAYS,
        tables=_tables(summary),
    )


def short_table(summary: dict[str, Any]) -> str:
    """The main numbers in a few lines."""
    sizes = [str(size) for size in summary["sizes"]]
    shown = sizes if len(sizes) <= 9 else [*sizes[:4], *sizes[-5:]]
    width = max(len(name) for name in summary["arms"])
    chosen = "".join(f", head {name}{_became(summary, name)}" for name in summary["heads_became"])
    lines = [f"{summary['metric']} by labelled unsafe images, mean of {len(summary['seeds'])} seeds{chosen}"]
    lines.append("  " + " " * width + "".join(f"{size:>8}" for size in shown))
    for arm in summary["arms"]:
        values = [summary["curves"][arm][size]["mean"] for size in shown]
        lines.append(f"  {arm:<{width}}" + "".join(f"{'-':>8}" if value is None else f"{value:>8.3f}" for value in values))
    for row in summary["samples_to_target"]:
        if row["arm"].split("/")[0] == summary["baseline"]:
            origin = f"what {row['arm']} reaches with {row['target_size']}" if row["target_size"] else "a set target"
            lines.append(f"labels to reach {row['target']:.3f} ({origin})")
            lines += [
                f"  {one['arm']:<{width}}  {_labels(one):>6}   {_ratio(one)}"
                for one in _same_target(summary, row)
                if one["arm"] != row["arm"]
            ]
    if summary["left_out"]:
        said = in_sentences(summary["left_out"], summary["arms"], summary["sizes"], len(summary["seeds"]))
        lines.append(f"{sum(len(row['seeds']) for row in summary['left_out'])} cells were left out; report.md lists them")
        lines += [f"  {sentence}" for sentence in said[:_N_SAID]]
        lines += [f"  and {len(said) - _N_SAID} more reasons"] if said[_N_SAID:] else []
    lines += [f"note: {note}" for note in summary["notes"]]
    return "\n".join(lines)


# --- contents --------------------------------------------------------------------------------------------------------------


def _lead(summary: dict[str, Any]) -> list[str]:
    n_test, engine = summary["n_test"], summary["engine"]
    what = METRICS[summary["metric"]].of
    return [
        f"Mean over {len(summary['seeds'])} labelled subsets, {n_test['units']} test {what} ({n_test['pairs_made_by']}), 95 % intervals over "
        f"subsets and test images ({summary['n_resamples']} redraws of both). A budget counts every labelled unsafe image, validation included; "
        "regularisation is chosen on the validation images of each budget, never on test images.",
        f"Head {', '.join(f'`{name}`{_became(summary, name)}' for name in summary['heads'])}. Engine `{engine['name']}`: {engine['fits']} fits in {engine['seconds']:.1f} s.",
    ]


def _became(summary: dict[str, Any], head: str) -> str:
    """What a head is that chose for itself, in brackets; "" of another."""
    return f" (here {summary['heads_became'][head]})" if head in summary["heads_became"] else ""


def _tables(summary: dict[str, Any]) -> list[Table]:
    tables = [_curve_table("Learning curves", summary, summary["curves"])]
    if summary["samples_to_target"]:
        about = (
            f"Monotone fits over the logarithm of the budget, read between budgets and never beyond them. The ratio is the labels that `{summary['baseline']}` "
            "needs over those that the arm needs; in a redraw that never reaches the target it is 0."
        )
        tables.append(("Labels to reach a target", about, ["target", "arm", "labels", "ratio", "95 % interval", ""], _target_rows(summary)))
    tables += [
        _curve_table(f"Learning curves on {name} ({'as' if one['in_training'] else 'not'} in training)", summary, one["curves"])
        for name, one in summary["by_source"].items()
        if len(summary["by_source"]) > 1
    ]
    if len(summary["by_source"]) > 1 and summary["samples_to_target"]:
        rows = [
            [name, *row]
            for name, one in summary["by_source"].items()
            for row in _target_rows({**summary, "samples_to_target": one["samples_to_target"]})
        ]
        tables.append(
            ("Labels to reach a target, by source", "", ["source", "target", "arm", "labels", "ratio", "95 % interval", ""], rows)
        )
    tables += [_category_table(summary), *_test_tables(summary), _cost_table(summary), _strength_table(summary)]
    if summary["left_out"]:
        rows = [[row["arm"], str(row["size"]), ", ".join(map(str, row["seeds"])), row["reason"]] for row in summary["left_out"]]
        tables.append(("Left out", "", ["arm", "labels", "seeds", "reason"], rows))
    return [table for table in tables if table[3]]


def _curve_table(heading: str, summary: dict[str, Any], points: dict[str, Any]) -> Table:
    sizes = [str(size) for size in summary["sizes"]]
    rows = [[f"`{arm}`", *(_with_interval(points[arm][size]) for size in sizes)] for arm in summary["arms"]]
    return heading, "", ["arm", *sizes], rows


def _target_rows(summary: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in summary["samples_to_target"]:
        origin = f"{row['target']:.3f}" + (f" (baseline at {row['target_size']})" if row["target_size"] else "")
        note = "; ".join(text for text in (row["bound"], row["reason"]) if text)
        low, high = row["ratio_ci"]
        ends = "-" if low is None and high is None else f"{_short(low)} to {_short(high)}"
        rows.append([origin, f"`{row['arm']}`", _labels(row), _short(row["ratio"]), ends, note])
    return rows


def _category_table(summary: dict[str, Any]) -> Table:
    table = summary["by_category"]
    arms = [arm for arm in summary["arms"] if any(arm in row for row in table["categories"].values())]
    rows = []
    for category, row in table["categories"].items():
        cells = []
        for arm in arms:
            one = row.get(arm)
            gain = (one or {}).get("against_baseline")
            cells.append("-" if one is None else _with_interval(one) + (f", {gain['difference']:+.3f}" if gain else ""))
        rows.append([category, *cells])
    about = f"With {table['size']} labelled unsafe images; after the comma the difference to `{summary['baseline']}`."
    return "By category", about, ["category", *(f"`{arm}`" for arm in arms)], rows


def _test_tables(summary: dict[str, Any]) -> list[Table]:
    tests = summary["tests"]
    overall = [
        [f"`{row['arm']}` - `{row['against']}`", _signed(row["difference"]), _signed_interval(row["ci"]), _p(row["p"]), _p(row["p_holm"])]
        for row in tests["overall"]
    ]
    sizes = [str(size) for size in summary["sizes"]]
    by_arm: dict[str, dict[str, str]] = {}
    for row in tests["by_size"]:
        by_arm.setdefault(row["arm"], {})[str(row["size"])] = f"{_signed(row['difference'])} (p {_p(row['p_holm'])})"
    by_size = [[f"`{arm}`", *(cells.get(size, "-") for size in sizes)] for arm, cells in by_arm.items()]
    return [
        (
            "Arms against each other, over all sizes",
            "Difference of the mean of the curves over the sizes that both have; p values from redraws of subsets and test images, corrected for "
            "the number of comparisons (Holm).",
            ["arms", "difference", "95 % interval", "p", "p, corrected"],
            overall,
        ),
        (f"Difference to {summary['baseline']} at every size", "p values corrected for all of the table (Holm).", ["arm", *sizes], by_size),
    ]


def _cost_table(summary: dict[str, Any]) -> Table:
    rows = []
    for arm, cost in summary["cost"].items():
        if cost["sizes"]:
            size = str(summary["by_category"]["size"])
            one = cost["sizes"].get(size) or next(iter(cost["sizes"].values()))
            rows.append(
                [
                    f"`{arm}`",
                    f"{one['labels_unsafe']}",
                    f"{one['labels_safe']:.0f}",
                    f"{one['edits_requested']:.0f}",
                    f"{one['edits_accepted']:.0f}",
                    f"{1000 * one['fit_seconds']:.1f} ms",
                    f"{cost['seconds_for_edits_now']:.1f} s",
                ]
            )
    about = "Means over seeds, at the size of the table by category. Edits that were stored, or made for an arm above, take no time again."
    return (
        "Cost",
        about,
        ["arm", "unsafe labels", "safe labels", "edits asked", "edits kept", "fit, all strengths", "edits of the sweep"],
        rows,
    )


def _strength_table(summary: dict[str, Any]) -> Table:
    strengths = list(next(iter(summary["chosen_strengths"].values()), {}))
    rows = [[f"`{arm}`", *(str(counts[name]) for name in strengths)] for arm, counts in summary["chosen_strengths"].items()]
    return "Regularisation that was chosen", "How many cells chose each strength.", ["arm", *strengths], rows


def _same_target(summary: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    head = row["arm"].split("/")[1:]
    return [
        one
        for one in summary["samples_to_target"]
        if (one["target"], one["target_size"]) == (row["target"], row["target_size"]) and one["arm"].split("/")[1:] == head
    ]


def _labels(row: dict[str, Any]) -> str:
    if row["n"] is None:
        return "never"
    return ("<= " if row["bound"] else "") + f"{row['n']:.0f}"


def _ratio(row: dict[str, Any]) -> str:
    low, high = row["ratio_ci"]
    if row["ratio"] is None:
        return row["reason"] or "-"
    return f"ratio {_short(row['ratio'])} ({_short(low)} to {_short(high)})"


def _with_interval(point: dict[str, Any]) -> str:
    return "-" if point["mean"] is None else f"{point['mean']:.3f} ({point['ci_low']:.3f} to {point['ci_high']:.3f})"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _signed_interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:+.3f} to {ends[1]:+.3f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
