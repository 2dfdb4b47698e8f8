"""Tables and pictures of `photographs.py`, from a row for each policy, arm, editor, number of safe images, label budget and seed.

Figures are means over policies, each the mean of its seeds, with 95 % intervals over policies (Student's t); differences are
taken within a policy first. "Labels to reach" are read off the mean learning curve of the policies, made monotone; their intervals are of
2,000 redraws of the policies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy import stats

from guardkit.metrics.intervals import isotonic, reached_at

Key = tuple[str, str, int]  # arm, editor, safe images for each unsafe one

BASELINE = "unpaired"
CONTROLS = ("permuted_labels", "null_edits", "shuffled_pairs")
MEASURES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "recall": "recall at 5 % false positives",
    "auroc_look_alikes": "AUROC against look-alikes",
    "look_alikes_flagged": "look-alikes flagged there",
}
N_REDRAWS = 2000
# Okabe and Ito's colours, by arm; dashes by editor
_COLOURS = {
    "unpaired": "#2a3038",
    "look_alikes": "#56b4e9",
    "pairs_aug": "#0072b2",
    "pairs_plus": "#009e73",
    "pairs_balanced": "#cc79a7",
    "pairs_transplanted": "#d55e00",
}
_DASHES = {"": "-", "inpaint": "-", "paste": (0, (5, 2))}


def interval(values: np.ndarray) -> str:
    """Mean and half the 95 % interval over policies."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{values.mean():.3f} ± {half:.3f}"


def _difference(values: np.ndarray) -> str:
    said = interval(values)
    return said if said.startswith("-") else f"+{said}"


class Results:
    """Means over seeds, by arm and policy.

    Args:
        table: a row for each cell.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        fitted = table[table["n_unsafe"].notna()]
        self.cells = fitted.groupby(["arm", "editor", "safe_per_unsafe", "n_unsafe", "policy"]).mean(numeric_only=True)
        self.zero_shot = table[table["arm"] == "zero_shot"].set_index("policy")
        self.traces = table[table["arm"] == "trace"]
        self.n_policies = table["policy"].nunique()
        self.sizes = sorted(int(size) for size in fitted["n_unsafe"].unique())
        self.ratios = sorted(int(safe) for safe in fitted["safe_per_unsafe"].unique())
        self.tested = [name.partition(", ")[2] for name in table.columns if name.startswith("ranking_accuracy, ")]

    @property
    def keys(self) -> list[Key]:
        """All arms: natural ones first, controls last."""
        order = [*_COLOURS, *reversed(CONTROLS)]
        found = {(arm, editor, int(safe)) for arm, editor, safe, _, _ in self.cells.index}
        return sorted(found, key=lambda key: (key[2], order.index(key[0]), key[1]))

    def arms(self, safe: int, *, controls: bool = False) -> list[Key]:
        """Those with so many safe images."""
        return [key for key in self.keys if key[2] == safe and (key[0] in CONTROLS) == controls]

    def values(self, key: Key, size: int, measure: str) -> pd.Series:
        """By policy; empty where it was not tried."""
        try:
            return self.cells.loc[(*key, size), measure].dropna()
        except KeyError:
            return pd.Series(dtype=float)

    def differences(self, key: Key, size: int, measure: str) -> np.ndarray:
        """To the baseline with one safe image for each, by policy."""
        both = pd.concat([self.values(key, size, measure), self.values((BASELINE, "", self.ratios[0]), size, measure)], axis=1).dropna()
        return both.iloc[:, 0].to_numpy() - both.iloc[:, 1].to_numpy()

    def curves(self, key: Key, measure: str) -> tuple[list[int], np.ndarray]:
        """Label budgets, and (policies, budgets) of those policies that have all of them."""
        sizes = [size for size in self.sizes if len(self.values(key, size, measure))]
        return sizes, pd.concat([self.values(key, size, measure) for size in sizes], axis=1).dropna().to_numpy()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def _name(key: Key) -> str:
    return f"`{key[0]}`{f', {key[1]}' if key[1] else ''}"


def report(table: pd.DataFrame) -> str:
    """All tables, in Markdown."""
    results = Results(table)
    first = results.ratios[0]
    shown = results.sizes[1::2] if len(results.sizes) > 4 else results.sizes
    middle = results.sizes[(len(results.sizes) - 1) // 2]
    zero = {measure: interval(results.zero_shot[measure].to_numpy()) for measure in MEASURES}
    lines = [f"{results.n_policies} policies. Zero-shot AUROC {zero['auroc']}.", ""]
    lines += [f"## AUROC on natural photographs, {first} safe for each unsafe one", ""]
    lines += _by_size(results, results.arms(first), shown, zero["auroc"])
    lines += [f"## With {middle} labels, {first} safe for each unsafe one: differences to {BASELINE}", ""]
    rows = [["zero-shot, as it is", *zero.values()]]
    rows += [[f"`{BASELINE}`, as it is", *(interval(results.values((BASELINE, "", first), middle, one).to_numpy()) for one in MEASURES)]]
    rows += [
        [_name(key), *(_difference(found) if len(found := results.differences(key, middle, one)) else "–" for one in MEASURES)]
        for key in results.arms(first)
        if key[0] != BASELINE
    ]
    lines += _table(["training", *MEASURES.values()], rows)
    lines += [f"## Safe photographs for each unsafe one, {middle} labels: differences to {BASELINE} with {first}", ""]
    for measure in ("auroc", "auroc_look_alikes"):
        lines += [MEASURES[measure], ""]
        rows = []
        for arm, editor, _ in results.arms(first):
            cells = [
                _difference(found) if len(found := results.differences((arm, editor, safe), middle, measure)) else "–"
                for safe in results.ratios
            ]
            rows.append([_name((arm, editor, first)), *cells])
        lines += _table(["training", *(str(safe) for safe in results.ratios)], rows)
    lines += [f"## Pairs by each editor, {middle} labels: ranking accuracy (pair accuracy)", ""]
    lines += _matrix(results, [*results.arms(first), *results.arms(first, controls=True)], middle)
    lines += ["## Labels to reach the score of unpaired", ""]
    lines += _labels_to_reach(results)
    lines += [f"## Controls: AUROC, {first} safe for each unsafe one", ""]
    lines += _by_size(results, [(BASELINE, "", first), *results.arms(first, controls=True)], results.sizes, zero["auroc"])
    rows = [[editor, interval(part["auroc"].dropna().to_numpy())] for editor, part in results.traces.groupby("editor")]
    lines += ["## A probe that tells null edits from photographs: AUROC", "", *_table(["editor", "AUROC"], rows)]
    return "\n".join(lines)


def _by_size(results: Results, keys: Sequence[Key], sizes: Sequence[int], zero: str) -> list[str]:
    sizes = [size for size in sizes if any(len(results.values(key, size, "auroc")) for key in keys[1:])]
    rows = [["zero-shot (no label)", *[zero] * len(sizes)]]
    for key in keys:
        cells = []
        for size in sizes:
            values = results.values(key, size, "auroc").to_numpy()
            if not len(values):
                cells.append("–")
            elif key[0] == BASELINE:
                cells.append(interval(values))
            else:
                cells.append(f"{values.mean():.3f} ({_difference(results.differences(key, size, 'auroc'))})")
        rows.append([_name(key), *cells])
    return _table(["training", *(f"{size} labels" for size in sizes)], rows)


def _matrix(results: Results, keys: Sequence[Key], size: int) -> list[str]:
    """Trained with, by tested on."""
    names = [[f"{measure}, {editor}" for measure in ("ranking_accuracy", "pair_accuracy")] for editor in results.tested]
    rows = [["zero-shot", *(" ".join(_both([results.zero_shot[name] for name in pair])) for pair in names)]]
    for key in keys:
        found = [[results.values(key, size, name) for name in pair] for pair in names]
        if all(len(one) for pair in found for one in pair):
            rows.append([_name(key), *(" ".join(_both(pair)) for pair in found)])
    return _table(["trained with", *(f"pairs by {editor}" for editor in results.tested)], rows)


def _both(pair: Sequence[pd.Series]) -> Iterator[str]:
    yield interval(pair[0].to_numpy())
    yield f"({pair[1].mean():.2f})"


def _labels_to_reach(results: Results) -> list[str]:
    """Of the baseline with one safe image for each, at its larger budgets."""
    base = (BASELINE, "", results.ratios[0])
    targets = [size for size in (results.sizes[-1] // 4, results.sizes[-1]) if size in results.sizes]
    rows = []
    for key in [key for safe in results.ratios for key in results.arms(safe)]:
        if key != base:
            rows.append([f"{_name(key)}, {key[2]} safe", *(_ratio(results, key, base, target) for target in targets)])
    lines = _table(["training", *(f"{size} labels of `{BASELINE}`: ratio" for size in targets)], rows)
    sizes, curves = results.curves(base, "auroc")
    level = results.zero_shot["auroc"].mean()
    reached = float(reached_at(sizes, isotonic(curves.mean(axis=0)), level))
    said = f"with {reached:.0f} labels" if np.isfinite(reached) else f"with none of up to {sizes[-1]} labels"
    return [*lines, f"`{BASELINE}` reaches the AUROC of zero-shot {said}.", ""]


def _ratio(results: Results, key: Key, base: Key, target: int) -> str:
    """How many times fewer labels an arm needs than the baseline has; above 1 is a gain."""
    sizes, mine = results.curves(key, "auroc")
    every, plain = results.curves(base, "auroc")
    n = min(len(mine), len(plain))
    if n < 2:
        return "–"
    at = every.index(target)

    def ratio(rows: np.ndarray) -> np.ndarray:
        score = isotonic(plain[rows].mean(axis=1))[:, at]
        return target / reached_at(sizes, isotonic(mine[rows].mean(axis=1)), score)

    rows = np.random.default_rng(0).integers(n, size=(N_REDRAWS, n))
    point = float(ratio(np.arange(n)[None])[0])
    low, high = np.quantile(ratio(rows), [0.025, 0.975])
    if point == 0:
        most = f"not with {sizes[-1]} labels"
        return most if sizes[-1] < target else f"no gain ({most})"
    said = f"{point:.2f} ({low:.2f} to {high:.2f})"
    return said if point > 1 else f"no gain: {said}"


# --- pictures --------------------------------------------------------------------------------------------------------------


def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Learning curves: natural photographs, look-alikes only, and more safe photographs."""
    results = Results(table)
    first = results.ratios[0]
    figure = Figure(figsize=(15, 6.4), facecolor="white")
    axes = [figure.add_axes((left, 0.26, 0.28, 0.67)) for left in (0.045, 0.37, 0.695)]
    for axis, measure in zip(axes[:2], ("auroc", "auroc_look_alikes"), strict=True):
        for key in results.arms(first):
            sizes, values = results.curves(key, measure)
            if not len(values):
                continue
            look = {"color": _COLOURS[key[0]], "linestyle": _DASHES.get(key[1], ":")}
            axis.plot(sizes, values.mean(axis=0), marker="o", markersize=4, linewidth=2, label=_label(key), **look)
            if key[0] == BASELINE:
                _band(axis, sizes, values, look["color"])
        axis.set_title(f"{MEASURES[measure]}, {first} safe for each unsafe one", fontsize=11)
        _finish(axis, results, measure)
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=9.5, frameon=False, ncols=5, loc="upper left", bbox_to_anchor=(0.03, 0.185)
    )
    for safe, shade in zip(results.ratios, ("#2a3038", "#7b5ea7", "#e08a00"), strict=False):
        sizes, values = results.curves((BASELINE, "", safe), "auroc")
        axes[2].plot(sizes, values.mean(axis=0), marker="o", markersize=4, linewidth=2, color=shade, label=f"{BASELINE}, {safe} safe")
        _band(axes[2], sizes, values, shade)
    axes[2].set_title(f"AUROC of {BASELINE}, more safe photographs", fontsize=11)
    _finish(axes[2], results, "auroc")
    axes[2].legend(fontsize=9.5, frameon=False, loc="lower right")
    low = min(axis.get_ylim()[0] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, 1.0)
    figure.text(
        0.045, 0.03, f"Means of {results.n_policies} policies; bands: 95 % over policies. Labels: labelled unsafe photographs.", fontsize=9
    )
    figure.savefig(path, dpi=110)


def _label(key: Key) -> str:
    return f"{key[0]}{f' ({key[1]})' if key[1] else ''}"


def _band(axis, sizes: Sequence[int], values: np.ndarray, colour: str) -> None:  # type: ignore[no-untyped-def]
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(values))
        axis.fill_between(sizes, values.mean(axis=0) - half, values.mean(axis=0) + half, color=colour, alpha=0.13, linewidth=0)


def _finish(axis, results: Results, measure: str) -> None:  # type: ignore[no-untyped-def]
    axis.axhline(results.zero_shot[measure].mean(), color="#8a939d", linewidth=1.4, linestyle=(0, (1, 2)), label="zero-shot")
    axis.set_xscale("log")
    axis.set_xticks(results.sizes, [str(size) for size in results.sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("labels")
    axis.grid(color="#e6e9ec", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def draw_pairs(pairs: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], path: Path) -> None:
    """Two rows for each editor: photographs, and what it makes of them.

    Args:
        pairs: by editor, (h, w, 3) uint8 images.
        path: of the picture.
    """
    wide = max(len(some) for some in pairs.values())
    figure = Figure(figsize=(1.3 + 1.35 * wide, 0.1 + 2.85 * len(pairs)), facecolor="white")
    high = figure.get_figheight()
    left = 1.3
    for i, (editor, some) in enumerate(pairs.items()):
        top = high - 0.1 - 2.85 * i
        said = ("unsafe half", "safe half") if editor == "transplants" else ("photograph", "edited")
        for half in (0, 1):
            bottom = top - 1.3 * (half + 1) - 0.04 * half
            figure.text(0.06 / figure.get_figwidth(), (bottom + 0.65) / high, f"{editor}\n{said[half]}", fontsize=9, va="center")
            for column, pair in enumerate(some):
                box = ((left + 1.35 * column) / figure.get_figwidth(), bottom / high, 1.3 / figure.get_figwidth(), 1.3 / high)
                axis = figure.add_axes(box)
                axis.imshow(pair[half], interpolation="nearest")
                axis.set_axis_off()
    figure.savefig(path, dpi=100)
