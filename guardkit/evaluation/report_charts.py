"""Charts of the report as SVG text: lines, and dots with intervals. Colours are the page's own variables --c0 to --c7.

Written by hand, because a picture inside a page should take the page's fonts and its light or dark colours, and stay
sharp at any size. Text from data is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 42
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2 1 2", "12 4", "1 3", "4 4")
N_COLOURS = 8


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend.
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


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] = (0.0, 1.0),
    y_range: tuple[float, float] = (0.0, 1.0),
    x_ticks: Sequence[float] | None = None,
    diagonal: bool = False,
) -> Markup:
    """Lines over two axes.

    Args:
        lines: drawn in order.
        label: what the chart shows, for readers who do not see it.
        x_label, y_label: with units.
        x_range, y_range: of the axes.
        x_ticks: None: five even ones.
        diagonal: a thin line from corner to corner, where both axes agree.
    """
    x, y = _scale(x_range, _LEFT, _WIDTH - _RIGHT), _scale(y_range, _HEIGHT - _BOTTOM, _TOP)
    parts = _frame(label, x, y, x_ticks or _even(x_range), _even(y_range), x_label, y_label)
    if diagonal:
        parts.append(f'<line class="guide" x1="{x(x_range[0])}" y1="{y(y_range[0])}" x2="{x(x_range[1])}" y2="{y(y_range[1])}"/>')
    for place, line in enumerate(lines):
        # intervals at one x would hide each other
        aside = 3.0 * (place - (len(lines) - 1) / 2) if line.low is not None else 0.0
        parts += _intervals(line, x, y, aside)
        parts.append(_path(line, x, y, aside))
        if line.has_dots:
            parts += [
                f'<circle style="fill:var(--c{line.colour % N_COLOURS})" cx="{x(a) + aside:g}" cy="{y(b)}" r="3"/>' for a, b in line.points
            ]
    return Markup("\n".join([*parts, "</svg>"]))


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


def dot_chart(rows: Sequence[tuple[str, Sequence[Dot]]], *, label: str, x_label: str, x_range: tuple[float, float] = (0.0, 1.0)) -> Markup:
    """One row a name, with dots and their intervals one below the other.

    Args:
        rows: names and their dots.
        label: what the chart shows, for readers who do not see it.
        x_label: of the one axis.
        x_range: of the axis.
    """
    left, step = 130, 15
    heights = [max(1, len(dots)) * step + 12 for _, dots in rows]
    height = sum(heights) + _TOP + _BOTTOM
    x = _scale(x_range, left, _WIDTH - _RIGHT)
    parts = [_open(label, height)]
    for tick in _even(x_range):
        parts.append(f'<line class="grid" x1="{x(tick)}" y1="{_TOP}" x2="{x(tick)}" y2="{height - _BOTTOM}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x(tick)}" y="{height - _BOTTOM + 15}">{tick:g}</text>')
    parts.append(f'<text class="axis" text-anchor="middle" x="{(left + _WIDTH - _RIGHT) / 2}" y="{height - 8}">{escape(x_label)}</text>')
    top = float(_TOP)
    for (name, dots), own in zip(rows, heights, strict=True):
        parts.append(f'<text class="name" text-anchor="end" x="{left - 10}" y="{top + own / 2 + 4}">{escape(_short(name, 18))}</text>')
        for i, dot in enumerate(dots):
            at = top + 6 + step * (i + 0.5)
            style = f'style="--own:var(--c{dot.colour % N_COLOURS})"'
            if dot.low is not None and dot.high is not None:
                parts.append(f'<line class="interval" {style} x1="{x(dot.low)}" y1="{at}" x2="{x(dot.high)}" y2="{at}"/>')
            parts.append(f'<circle class="dot" {style} cx="{x(dot.value)}" cy="{at}" r="4"><title>{escape(dot.text)}</title></circle>')
        top += own
    return Markup("\n".join([*parts, "</svg>"]))


class _scale:
    """From a value to a place, held inside the frame."""

    def __init__(self, values: tuple[float, float], start: float, end: float) -> None:
        self._values, self._start, self._end = values, start, end

    def __call__(self, value: float) -> float:
        low, high = self._values
        share = (min(max(value, low), high) - low) / ((high - low) or 1.0)
        return round(self._start + share * (self._end - self._start), 2)


def _frame(label: str, x: _scale, y: _scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> list[str]:
    bottom, left, right = _HEIGHT - _BOTTOM, _LEFT, _WIDTH - _RIGHT
    parts = [_open(label, _HEIGHT)]
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" y1="{y(tick)}" x2="{right}" y2="{y(tick)}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{left - 6}" y="{y(tick) + 4}">{tick:g}</text>')
    for tick in x_ticks:
        parts.append(f'<text class="tick" text-anchor="middle" x="{x(tick)}" y="{bottom + 15}">{tick:g}</text>')
    parts.append(f'<text class="axis" text-anchor="middle" x="{(left + right) / 2}" y="{_HEIGHT - 8}">{escape(x_label)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text class="axis" text-anchor="middle" transform="translate(12 {middle}) rotate(-90)">{escape(y_label)}</text>')
    return parts


def _open(label: str, height: float) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(label)}"><title>{escape(label)}</title>'


def _path(line: Line, x: _scale, y: _scale, aside: float) -> str:
    steps: list[str] = []
    before: float | None = None
    for a, b in line.points:
        if line.is_stepped and before is not None:
            steps.append(f"L{x(a) + aside:g} {before}")
        steps.append(f"{'L' if steps else 'M'}{x(a) + aside:g} {y(b)}")
        before = y(b)
    style = f"stroke:var(--c{line.colour % N_COLOURS})"
    dash = _DASHES[line.colour % len(_DASHES)]
    return f'<path class="line" style="{style}" stroke-dasharray="{dash}" d="{"".join(steps)}"><title>{escape(line.name)}</title></path>'


def _intervals(line: Line, x: _scale, y: _scale, aside: float) -> list[str]:
    if line.low is None or line.high is None:
        return []
    style = f'style="--own:var(--c{line.colour % N_COLOURS})"'
    return [
        f'<line class="interval" {style} x1="{x(a) + aside:g}" y1="{y(low)}" x2="{x(a) + aside:g}" y2="{y(high)}"/>'
        for (a, _), low, high in zip(line.points, line.low, line.high, strict=True)
        if low is not None and high is not None
    ]


def _even(values: tuple[float, float]) -> list[float]:
    """About five round ticks."""
    low, high = values
    size = 10 ** math.floor(math.log10((high - low) or 1.0))
    step = next(size * factor for factor in (0.1, 0.2, 0.25, 0.5, 1, 2) if (high - low) / (size * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"
