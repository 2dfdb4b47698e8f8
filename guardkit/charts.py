"""Charts for pages, as SVG inside them: lines, and dots with intervals. Drawn by matplotlib, the same bytes every time.

A chart takes the page's fonts and its colours, which the base template names (--c0 to --c7, --ink, --muted, --line), so
it follows the reader's light or dark ones. Text from data is escaped, and never read as mathematics.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 42
_DASHES: tuple[Any, ...] = ("-", *((0, pattern) for pattern in ((7, 3), (2, 3), (9, 3, 2, 3), (5, 2, 1, 2), (12, 4), (1, 3), (4, 4))))
# colours that stand for those of the page
_COLOURS = ("#000001", "#000002", "#000003", "#000004", "#000005", "#000006", "#000007", "#000008")
_INK, _MUTED, _LINE = "#000009", "#00000a", "#00000b"
_ON_PAGE = {colour: f"var(--c{i})" for i, colour in enumerate(_COLOURS)} | {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "guardkit",
    "text.parse_math": False,
    "lines.scale_dashes": False,
    "axes.edgecolor": "none",
    "axes.labelcolor": _INK,
    "axes.labelsize": 12,
    "grid.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: said when pointed at.
        points: (x, y) in order.
        colour: 0 to 7, of the page's palette; the same for a classifier everywhere.
        low, high: y of the ends of the intervals at the points; None: no interval is drawn.
        is_stepped: y holds from one point to the next.
        has_dots: marks the points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    is_stepped: bool = False
    has_dots: bool = False


@dataclass(frozen=True)
class Dot:
    """A figure with its interval, in a row of a dot chart.

    Attributes:
        value, low, high: of the figure; low and high may be None.
        colour: 0 to 7.
        text: said when pointed at.
    """

    value: float
    low: float | None
    high: float | None
    colour: int
    text: str


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] = (0.0, 1.0),
    x_ticks: Sequence[float] | None = None,
    diagonal: bool = False,
) -> Markup:
    """Lines over two axes, the upright one from 0 to 1.

    Args:
        lines: drawn in order.
        label: what the chart shows, for readers who do not see it.
        x_label, y_label: with units.
        x_range: of the axis.
        x_ticks: None: about five round ones.
        diagonal: a thin line from corner to corner, where both axes agree.
    """
    from matplotlib.transforms import ScaledTranslation

    said: dict[str, str] = {}
    with _drawing():
        figure, axes = _frame(_HEIGHT, _LEFT, x_range, x_label)
        axes.set_ylim(0, 1)
        axes.set_ylabel(y_label)
        axes.yaxis.set_label_coords(12 / _WIDTH, 0.5 + (_BOTTOM - _TOP) / 2 / _HEIGHT, transform=figure.transFigure)
        axes.grid(axis="y")
        if x_ticks:
            axes.set_xticks(list(x_ticks), [f"{tick:g}" for tick in x_ticks])
        if diagonal:
            axes.plot(x_range, (0, 1), color=_MUTED, linewidth=1, linestyle=(0, (2, 4)))
        for place, line in enumerate(lines):
            colour = _COLOURS[line.colour % len(_COLOURS)]
            # intervals at one x would hide each other
            aside = 3.0 * (place - (len(lines) - 1) / 2) if line.low is not None else 0.0
            moved = axes.transData + ScaledTranslation(aside / 72, 0, figure.dpi_scale_trans)
            for (x, _), low, high in zip(line.points, line.low or (), line.high or (), strict=False):
                if low is not None and high is not None:
                    axes.plot((x, x), (low, high), color=colour, alpha=0.35, linewidth=2, transform=moved, solid_capstyle="butt")
            (path,) = axes.plot(
                *zip(*line.points, strict=True),
                color=colour,
                linewidth=2,
                linestyle=_DASHES[line.colour % len(_DASHES)],
                drawstyle="steps-post" if line.is_stepped else "default",
                marker="o" if line.has_dots else "",
                markersize=6,
                markeredgewidth=0,
                transform=moved,
            )
            path.set_gid(f"said-{place}")
            said[f"said-{place}"] = line.name
        return _svg(figure, label, said)


def dot_chart(rows: Sequence[tuple[str, Sequence[Dot]]], *, label: str, x_label: str) -> Markup:
    """One row a name, with dots and their intervals one below the other, from 0 to 1.

    Args:
        rows: names and their dots.
        label: what the chart shows, for readers who do not see it.
        x_label: of the one axis.
    """
    step, apart = 15, 12
    heights = [max(1, len(dots)) * step + apart for _, dots in rows]
    said: dict[str, str] = {}
    with _drawing():
        figure, axes = _frame(sum(heights) + _TOP + _BOTTOM, 130, (0.0, 1.0), x_label)
        axes.set_ylim(sum(heights), 0)
        axes.grid(axis="x")
        top, middles = 0, []
        for (_, dots), own in zip(rows, heights, strict=True):
            for i, dot in enumerate(dots):
                at, colour = top + apart / 2 + step * (i + 0.5), _COLOURS[dot.colour % len(_COLOURS)]
                if dot.low is not None and dot.high is not None:
                    axes.plot((dot.low, dot.high), (at, at), color=colour, alpha=0.35, linewidth=2, solid_capstyle="butt")
                (mark,) = axes.plot(dot.value, at, marker="o", markersize=7, markeredgewidth=0, color=colour)
                mark.set_gid(f"said-{len(said)}")
                said[f"said-{len(said)}"] = dot.text
            middles.append(top + own / 2)
            top += own
        axes.set_yticks(middles, [_short(name, 18) for name, _ in rows], color=_INK, fontsize=12)
        return _svg(figure, label, said)


@contextmanager
def _drawing() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_STYLE), warnings.catch_warnings():
        # letters that matplotlib's own font lacks are drawn by the browser
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _frame(height: float, left: float, x_range: tuple[float, float], x_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
    axes = figure.add_axes((left / _WIDTH, _BOTTOM / height, 1 - (left + _RIGHT) / _WIDTH, 1 - (_TOP + _BOTTOM) / height))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.set_xlim(x_range)
    axes.set_xlabel(x_label)
    axes.xaxis.set_label_coords(0.5, (20 - _BOTTOM) / (height - _TOP - _BOTTOM))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure, axes


def _svg(figure: Figure, label: str, said: Mapping[str, str]) -> Markup:
    """The picture for use inside a page.

    Args:
        figure: drawn.
        label: what it shows, for readers who do not see it.
        said: by the id of a part, what is said when it is pointed at.
    """
    for part in figure.findobj(include_self=False):
        part.set_clip_on(False)  # nothing lies outside, and clipping needs ids that are unique in the page
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    box = re.search(r'viewBox="([^"]*)"', whole)
    assert box is not None
    inside = whole[whole.index(">", box.end()) + 1 :]
    inside = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inside, flags=re.DOTALL)  # a style would hold for the whole page
    inside = re.sub(r'<g id="[^"]*"/>', "", inside)
    inside = re.sub(r'<g id="([^"]*)">', lambda found: f"<g><title>{escape(said[found[1]])}</title>" if found[1] in said else "<g>", inside)
    inside = re.sub(r'font-family: [^;"]*', "font-family: system-ui, sans-serif", inside)
    inside = re.sub("#00000[1-9ab]", lambda found: _ON_PAGE[found[0]], inside)
    return Markup(f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(label)}"><title>{escape(label)}</title>{inside}')


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"
