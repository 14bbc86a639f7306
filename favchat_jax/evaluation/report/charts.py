"""Draws line and strip charts as inline SVG in the page's colours, light and dark.

Every label is escaped. Colours are the classes `s0` to `s7` of the page's style sheet.
"""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44  # room around the plot
COLORS = 8


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    marked: float | None = None,
    dots: bool = True,
) -> Markup:
    """Draws a line chart with one line per series.

    Args:
        series: name -> x and y of its points.
        x_label, y_label: labels of the axes.
        bands: name of a series -> lower and upper ends of its points' intervals.
        marked: x of a dashed vertical line.
        dots: whether points are marked.
    """
    bands = bands or {}
    xs = [x for x_values, _ in series.values() for x in x_values] + ([] if marked is None else [marked])
    ys = [y for _, y_values in series.values() for y in y_values]
    ys += [y for ends in bands.values() for values in ends for y in values]
    if not xs or not ys:
        return Markup("<p class='muted'>nothing to draw</p>")
    x_axis, y_axis = _Axis(xs, LEFT, WIDTH - RIGHT), _Axis(ys, HEIGHT - BOTTOM, TOP)
    parts = [_grid(x_axis, y_axis, x_label, y_label)]
    if marked is not None:
        at = x_axis(marked)
        parts.append(Markup(f'<line class="mark" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'))
    for number, (name, (x_values, y_values)) in enumerate(series.items()):
        color = f"s{number % COLORS}"
        points = [(x_axis(x), y_axis(y)) for x, y in zip(x_values, y_values, strict=True)]
        if name in bands:
            low, high = ([y_axis(y) for y in ends] for ends in bands[name])
            outline = [*zip([x for x, _ in points], high, strict=True)] + [
                *zip([x for x, _ in points], low, strict=True)
            ][::-1]
            parts.append(Markup(f'<polygon class="band {color}" points="{_path(outline)}"/>'))
        parts.append(Markup(f'<polyline class="line {color}" points="{_path(points)}"/>'))
        if dots:
            parts += [Markup(f'<circle class="dot {color}" cx="{x}" cy="{y}" r="3"/>') for x, y in points]
    return _svg(parts, f"{y_label} over {x_label}") + _legend(list(series))


def strips(groups: Mapping[str, Sequence[float]], x_label: str) -> Markup:
    """Draws each group's values, between 0 and 1, as dots along a line, and its mean as a bar."""
    axis = _Axis([0, 1], 120, WIDTH - RIGHT)
    height = 46 * len(groups) + BOTTOM
    parts = [_ticks(axis, height)]
    for number, (name, values) in enumerate(groups.items()):
        middle = 24 + 46 * number
        parts.append(Markup('<text class="label" x="112" y="{}" text-anchor="end">{}</text>').format(middle + 4, name))
        for i, value in enumerate(values):
            shift = 9 * math.sin(2.4 * i)  # spreads overlapping dots; the golden angle never repeats
            parts.append(
                Markup(f'<circle class="speck s{number}" cx="{axis(value)}" cy="{middle + shift:.1f}" r="2"/>')
            )
        at = axis(sum(values) / len(values))
        parts.append(
            Markup(f'<line class="mean s{number}" x1="{at}" x2="{at}" y1="{middle - 15}" y2="{middle + 15}"/>')
        )
    where = (axis(0.5), height - 8)
    parts.append(Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(*where, x_label))
    return _svg(parts, x_label, height)


class _Axis:
    """Maps values to pixels, with round ticks that enclose the values."""

    def __init__(self, values: Sequence[float], begin: float, end: float):
        low, high = min(values), max(values)
        step = _round_step((high - low or abs(high) or 1) / 5)
        self.ticks = [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
        if len(self.ticks) == 1:
            self.ticks.append(self.ticks[0] + step)
        self.digits = max(0, -math.floor(math.log10(step) + 1e-9))
        self._low, self._scale = self.ticks[0], (end - begin) / (self.ticks[-1] - self.ticks[0])
        self._begin = begin

    def __call__(self, value: float) -> float:
        return round(self._begin + (value - self._low) * self._scale, 1)


def _round_step(least: float) -> float:
    power = 10 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> Markup:
    parts = [_ticks(x_axis, HEIGHT)]
    for tick in y_axis.ticks:
        y = y_axis(tick)
        parts.append(Markup(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'))
        parts.append(Markup(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:.{y_axis.digits}f}</text>'))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, HEIGHT - 8, x_label)
    )
    turned = Markup('<text class="label" transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>')
    parts.append(turned.format((TOP + HEIGHT - BOTTOM) / 2, y_label))
    return Markup("").join(parts)


def _ticks(axis: _Axis, height: float) -> Markup:
    bottom, parts = height - BOTTOM, []
    for tick in axis.ticks:
        x = axis(tick)
        parts.append(Markup(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>'))
        parts.append(Markup(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:.{axis.digits}f}</text>'))
    return Markup("").join(parts)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _svg(parts: Sequence[Markup], title: str, height: float = HEIGHT) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, title)
    return head + Markup("").join(parts) + Markup("</svg>")


def _legend(names: Sequence[str]) -> Markup:
    items = [
        Markup(f'<span><i class="s{i % COLORS}"></i>') + escape(name) + Markup("</span>")
        for i, name in enumerate(names)
    ]
    return Markup('<p class="legend">') + Markup("").join(items) + Markup("</p>")
