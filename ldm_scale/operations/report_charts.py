"""Line charts as SVG within the page: they take its colours, light or dark, and need no script and no other file.

Many points are put together in columns: the line is their mean, the faint band behind it their range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ldm_scale.operations.report_html import Html, joined, tag

MAX_COLUMNS = 160
MAX_LINES = 8
_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 24
_LOG_SPAN = 30.0  # a range of values wider than this is drawn by its logarithm
_SHARE_OF_OUTLIERS = 0.01
_Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """Points (x, y) by growing x; y None or not finite is a gap. `is_reference`: only there to compare with, dashed."""

    name: str
    points: Sequence[tuple[float, float | None]]
    is_reference: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over one axis; `places` names the places 0, 1, ... of an axis that has no numbers."""

    title: str
    lines: Sequence[Line]
    x_label: str = "images seen"
    places: Sequence[str] = ()
    is_ordered: bool = False  # the lines are steps of one scale, and get shades of one colour
    is_share: bool = False  # y is a share from 0 to 1


@dataclass(frozen=True)
class _Column:
    x: float
    low: float
    mean: float
    high: float


def draw(chart: Chart) -> Html:
    """The chart as a figure with its legend, the last value of each line among it; empty without any value."""
    lines = [(line, _columns(line.points)) for line in chart.lines[:MAX_LINES]]
    lines = [(line, columns) for line, columns in lines if columns]
    if not lines:
        return Html("")
    everything = [column for _, columns in lines for column in columns]
    xs = [column.x for column in everything]
    x_low, x_high = min(xs), max(xs)
    scale = _Scale.of([c.mean for c in everything], chart.is_share)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT), _TOP + (1 - scale.place(y)) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [*_grid(scale), *_x_axis(chart, x_low, x_high)]
    for number, (line, columns) in enumerate(lines):
        parts.append(_drawn(line, columns, place, _style(chart, number, len(lines))))
    svg = tag(
        "svg",
        tag("title", chart.title),
        *parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=chart.title,
    )
    legend = [
        tag(
            "li",
            tag(
                "span", "", class_="key dashed" if line.is_reference else "key", style=_style(chart, number, len(lines))
            ),
            f"{line.name} ",
            tag("b", number_text(columns[-1].mean)),
        )
        for number, (line, columns) in enumerate(lines)
    ]
    notes = " (logarithmic)" if scale.is_log else ""
    if scale.outliers:
        notes += f" ({scale.outliers} points beyond the range)"
    return tag("figure", tag("figcaption", chart.title, tag("small", notes)), svg, tag("ul", *legend), class_="chart")


def number_text(value: float | None) -> str:
    """A number for people, in four digits."""
    if value is None or not math.isfinite(value):
        return "-"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def count_text(value: float) -> str:
    """A count for people: 12, 3.4k, 1.2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Scale:
    """The y axis: its range in values, or in their logarithms."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]
    outliers: int = 0

    @staticmethod
    def of(values: Sequence[float], is_share: bool) -> _Scale:
        """The range that holds all values but the few that lie far from all others."""
        if is_share:
            return _Scale(0.0, max(1.0, *values), False, (0.0, 0.25, 0.5, 0.75, 1.0))
        ordered = sorted(values)
        skipped = int(len(ordered) * _SHARE_OF_OUTLIERS)
        low, high = ordered[skipped], ordered[-1 - skipped]
        is_log = low > 0 and high / low > _LOG_SPAN
        if is_log:
            low, high = math.log10(low), math.log10(high)
            ticks = tuple(10.0**n for n in range(math.ceil(low), math.floor(high) + 1))
            return _Scale(low, high, True, ticks[:: max(1, len(ticks) // 5)], _beyond(values, 10**low, 10**high))
        margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        bottom = max(0.0, low - margin) if low >= 0 else low - margin
        top = high + margin
        return _Scale(bottom, top, False, _ticks(bottom, top), _beyond(values, bottom, top))

    def place(self, value: float) -> float:
        """Where a value lies, 0 below and 1 above; those beyond the range lie on its edge."""
        if self.is_log:
            value = math.log10(value) if value > 0 else self.low
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return min(1.0, max(0.0, share))


def _beyond(values: Sequence[float], low: float, high: float) -> int:
    slack = 1e-9 * max(abs(low), abs(high))
    return sum(not low - slack <= value <= high + slack for value in values)


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """About four round numbers within the range."""
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next((size * factor for factor in (1, 2, 5) if size * factor >= rough), size * 10)
    return tuple(n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1))


def _tick_text(value: float) -> str:
    """A round number in few characters: 0.25, 3000, 1e-5."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.6g}"


def _columns(points: Sequence[tuple[float, float | None]]) -> list[_Column]:
    """Points, or as many neighbours together as leave `MAX_COLUMNS`; those without a value are left out."""
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    size = max(1, math.ceil(len(known) / MAX_COLUMNS))
    columns = []
    for start in range(0, len(known), size):
        part = known[start : start + size]
        values = [y for _, y in part]
        columns.append(_Column(part[-1][0], min(values), sum(values) / len(values), max(values)))
    return columns


def _drawn(line: Line, columns: list[_Column], place: _Place, style: str) -> Html:
    parts = []
    if any(column.high > column.low for column in columns):
        upper = [place(column.x, column.high) for column in columns]
        lower = [place(column.x, column.low) for column in reversed(columns)]
        parts.append(tag("path", d=f"M{_path([*upper, *lower])}Z", class_="band"))
    means = [place(column.x, column.mean) for column in columns]
    parts.append(tag("path", d=f"M{_path(means)}", class_="line dashed" if line.is_reference else "line"))
    if len(columns) <= 24:
        parts += [
            tag(
                "circle",
                tag("title", f"{line.name}: {number_text(c.mean)} at {count_text(c.x)}"),
                cx=f"{x:.1f}",
                cy=f"{y:.1f}",
                r=2.5,
            )
            for c, (x, y) in zip(columns, means, strict=True)
        ]
    return tag("g", *parts, style=style)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _style(chart: Chart, number: int, count: int) -> str:
    if chart.is_ordered:
        return f"--line: var(--s1); opacity: {0.25 + 0.75 * (number + 1) / count:.2f}"
    return f"--line: var(--s{number + 1})"


def _grid(scale: _Scale) -> list[Html]:
    parts = []
    for value in scale.ticks:
        y = _TOP + (1 - scale.place(value)) * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        parts.append(tag("text", _tick_text(value), x=_LEFT - 5, y=f"{y + 3.5:.1f}", text_anchor="end"))
    return parts


def _x_axis(chart: Chart, low: float, high: float) -> list[Html]:
    y = _HEIGHT - 8
    names = (chart.places[0], chart.places[-1]) if chart.places else (count_text(low), count_text(high))
    return [
        tag("text", names[0], x=_LEFT, y=y),
        tag("text", chart.x_label, x=(_LEFT + _WIDTH) / 2, y=y, text_anchor="middle"),
        tag("text", names[1], x=_WIDTH - _RIGHT, y=y, text_anchor="end"),
    ]


def stacked_bar(title: str, shares: Sequence[tuple[str, float]]) -> Html:
    """Shares of a whole as one bar with its legend."""
    x, parts = 0.0, []
    for number, (name, share) in enumerate(shares):
        label = tag("title", f"{name}: {share:.1%}")
        parts.append(
            tag(
                "rect",
                label,
                x=f"{x:.2f}",
                y=0,
                width=f"{100 * share:.2f}",
                height=10,
                style=f"fill: var(--s{number + 1})",
            )
        )
        x += 100 * share
    legend = [
        tag("li", tag("span", "", class_="key", style=f"--line: var(--s{n + 1})"), f"{name} ", tag("b", f"{share:.1%}"))
        for n, (name, share) in enumerate(shares)
    ]
    svg = tag(
        "svg",
        joined(parts),
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        role="img",
        aria_label=title,
        class_="bar",
    )
    return tag("figure", tag("figcaption", title), svg, tag("ul", *legend), class_="chart wide")
