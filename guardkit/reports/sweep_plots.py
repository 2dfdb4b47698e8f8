"""The picture of a sweep. The one file of this room that knows matplotlib; it draws without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from guardkit.metrics.figures import METRICS

# Okabe and Ito's colours, which colour-blind readers can tell apart; the arms that ship have fixed ones
_COLOURS = {
    "unpaired": "#6b7480",
    "pairs_aug": "#0072b2",
    "pairs_plus": "#009e73",
    "shuffled_pairs": "#e08a00",
    "null_edits": "#a6761d",
    "classic_aug": "#cc79a7",
    "look_alikes": "#56b4e9",
    "pairs_balanced": "#7b5ea7",
    "pairs_transplanted": "#d55e00",
}
_OTHERS = ("#444444", "#b8b000", "#9c4f4f", "#5f8a8b", "#b38cd9")
_LINES = ("-", "--", ":", "-.")
_INK, _FAINT = "#2a3038", "#8a939d"
_DIVERGING = LinearSegmentedColormap.from_list("gain", ["#c2543d", "#f7f5f2", "#2f7d6b"])


def sample_efficiency(summary: dict[str, Any], path: Path) -> None:
    """Learning curves with bands, labels saved as bars, gain by category as a small table."""
    categories = summary["by_category"]["categories"]
    compared = [arm for arm in summary["arms"] if arm.split("/")[0] != summary["baseline"]]
    gains = bool(categories) and any("against_baseline" in (row.get(arm) or {}) for row in categories.values() for arm in compared)
    below = 0.34 * len(categories) + 1.1 if gains else 0.0
    figure = Figure(figsize=(13, 5.6 + below), facecolor="white")
    top = 1 - 0.62 / (5.6 + below)
    bottom = (below + 0.72) / (5.6 + below)
    curve_axis = figure.add_axes((0.05, bottom, 0.455, top - bottom))
    bar_axis = figure.add_axes((0.705, bottom, 0.28, top - bottom))
    _curves(curve_axis, summary)
    _bars(bar_axis, summary)
    if gains:
        height = 0.34 * len(categories) / (5.6 + below)
        _categories(figure.add_axes((0.165, 0.12 / (5.6 + below), 0.815, height)), summary, compared)
    figure.savefig(path, dpi=120)


def _look(arm: str, arms: list[str]) -> dict[str, Any]:
    name, _, head = arm.partition("/")
    unknown = [one for one in dict.fromkeys(other.split("/")[0] for other in arms) if one not in _COLOURS]
    heads = list(dict.fromkeys(other.partition("/")[2] for other in arms))
    colour = _COLOURS.get(name) or _OTHERS[unknown.index(name) % len(_OTHERS)]
    return {"color": colour, "linestyle": _LINES[heads.index(head) % len(_LINES)]}


def _curves(axis: Axes, summary: dict[str, Any]) -> None:
    sizes = np.array(summary["sizes"])
    ends = []
    for arm in summary["arms"]:
        points = [(size, summary["curves"][arm][str(size)]) for size in sizes]
        points = [(size, point) for size, point in points if point["mean"] is not None]
        if not points:
            continue
        look = _look(arm, summary["arms"])
        x = [size for size, _ in points]
        mean, low, high = ([point[name] for _, point in points] for name in ("mean", "ci_low", "ci_high"))
        axis.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)
        axis.plot(x, mean, marker="o", markersize=4.2, markeredgecolor="white", markeredgewidth=0.7, linewidth=2, **look)
        ends.append((mean[-1], x[-1], arm, look["color"]))
    for target in {row["target"] for row in summary["samples_to_target"]}:
        axis.axhline(target, color=_FAINT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    axis.set_xscale("log")
    axis.set_xlim(sizes[0] / 1.12, sizes[-1] * 1.12)
    axis.set_xticks(sizes)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("labelled unsafe images, validation included", color=_INK)
    _title(axis, f"{METRICS[summary['metric']].title} against the label budget")
    _clean(axis)
    axis.grid(axis="y", color="#eceff2", linewidth=0.8)
    axis.set_axisbelow(True)
    _label_ends(axis, ends)


def _label_ends(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Each arm's name beside the end of its curve, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    gap = (high - low) * 0.047
    places = sorted(ends)
    heights = [end[0] for end in places]
    for _ in range(200):
        moved = False
        for i in range(1, len(heights)):
            if heights[i] - heights[i - 1] < gap - 1e-9:
                middle = (heights[i] + heights[i - 1]) / 2
                heights[i - 1], heights[i] = middle - gap / 2, middle + gap / 2
                moved = True
        if not moved:
            break
    for height, (_, _, arm, colour) in zip(heights, places, strict=True):
        axis.annotate(
            arm, (1.0, height), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=9.5, color=colour, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _bars(axis: Axes, summary: dict[str, Any]) -> None:
    rows = [row for row in summary["samples_to_target"] if row["arm"].split("/")[0] != summary["baseline"]]
    _clean(axis)
    if not rows:
        axis.axis("off")
        axis.text(0.5, 0.5, "no target: the baseline is not part of this sweep,\nor its curve is unknown there", ha="center", color=_FAINT)
        return
    # the largest budget's target is what is shown; the report has the others
    target = max(rows, key=lambda row: (row["target_size"] or 0, row["target"]))
    rows = [row for row in rows if (row["target"], row["target_size"]) == (target["target"], target["target_size"])]
    largest, floor = summary["sizes"][-1], 0.5
    ends = [end for row in rows for end in (*row["ratio_ci"], row["ratio"]) if end is not None]
    widest = max(2.0, *ends) if ends else 2.0
    for y, row in enumerate(reversed(rows)):
        colour = _look(row["arm"], summary["arms"])["color"]
        low, high = row["ratio_ci"]
        low, high = max(floor, low if low is not None else floor), high if high is not None else widest * 1.3
        if row["ratio"] is not None:
            axis.barh(y, row["ratio"] - 1, left=1, height=0.58, color=colour, alpha=0.9)
            axis.plot([low, high], [y, y], color=_INK, linewidth=1.3, solid_capstyle="butt")
            for end in (low, high):
                axis.plot([end, end], [y - 0.12, y + 0.12], color=_INK, linewidth=1.3)
            text = f"{'≥ ' if row['bound'] else ''}{row['ratio']:.1f}×  ({row['n']:.0f} labels)"
            axis.annotate(
                text, (max(high, row["ratio"]), y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9.5, color=_INK
            )
        else:
            axis.annotate(
                f"never, up to {largest} labels", (1, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9.5, color=_FAINT
            )
    axis.axvline(1, color=_INK, linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(floor, floor * (widest / floor) ** 1.75)  # room for the words beside the bars
    axis.set_xticks([tick for tick in (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256) if tick <= widest * 1.2])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_yticks(range(len(rows)), [row["arm"] for row in reversed(rows)], color=_INK)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(f"times fewer labels than {summary['baseline']}, with 95 % interval", color=_INK)
    origin = f" ({summary['baseline']} at {target['target_size']})" if target["target_size"] else ""
    _title(axis, f"Labels to reach {target['target']:.3f}{origin}")


def _categories(axis: Axes, summary: dict[str, Any], arms: list[str]) -> None:
    table = summary["by_category"]
    names = list(table["categories"])
    values = np.full((len(names), len(arms)), np.nan)
    for i, name in enumerate(names):
        for j, arm in enumerate(arms):
            gain = (table["categories"][name].get(arm) or {}).get("against_baseline")
            if gain:
                values[i, j] = gain["difference"]
                certain = gain["ci_low"] > 0 or gain["ci_high"] < 0
                weight = "bold" if certain else "normal"
                axis.text(j, i, f"{gain['difference']:+.2f}", ha="center", va="center", fontsize=9.5, fontweight=weight)
    limit = max(0.05, float(np.nanmax(np.abs(values))))
    for text in axis.texts:
        text.set_color("white" if abs(float(text.get_text())) > 0.62 * limit else _INK)
    axis.imshow(values, cmap=_DIVERGING, norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    axis.set_xticks(range(len(arms)), arms)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.tick_params(length=0, labelsize=9.5, colors=_INK, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_xticks(np.arange(len(arms) - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=2.5)
    axis.tick_params(which="minor", length=0)
    title = f"Difference to {summary['baseline']} by category, with {table['size']} labels (bold: the interval leaves out 0)"
    axis.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold", pad=24, x=0)


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=11.5, color=_INK, fontweight="bold", pad=12)


def _clean(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#c3c9d0")
    axis.tick_params(colors=_INK, labelsize=9.5)
