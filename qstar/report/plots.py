"""Charts as inline SVG: small, sharp at any size, and coloured by the page's style sheet, so that they follow
the reader's light or dark setting. Points and bars carry a <title>, which browsers show as a tooltip."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qstar.report.markup import Safe, join, tag

WIDTH, HEIGHT = 480, 290
LEFT, TOP, BOTTOM = 46, 14, 40
LINE_HEIGHT = 14
_POINTS = 300  # a longer line is thinned: the screen has no more pixels


@dataclass(frozen=True)
class Line:
    """One series. `colour` is a CSS colour; `low` and `high`, if given, are drawn as a band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False
    marks: bool = True
    label: str = ""  # at the line's end; `name` if empty
    shape: int = 0  # of the marks: colour alone does not tell lines apart for everyone


@dataclass(frozen=True)
class Axes:
    """A plotting area: data coordinates to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    right: float

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_format: Callable[[float], str],
    y_range: tuple[float, float] | None = None,
    x_name: Callable[[float], str] = lambda value: f"{value:g}",
) -> Safe:
    """Lines with markers, confidence bands and their names written at their right ends.

    Args:
        title: what the chart shows, for readers who cannot see it.
        y_range: None fits the data, and 0.
        x_name: text of a tick and, in tooltips, of a point.
    """
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in (*line.y, *line.low, *line.high)]
    ticks = nice_ticks(min(xs), max(max(xs), min(xs) + 1), 8, integers=True)
    low, high = y_range or (min(0.0, *ys), max(0.0, *ys))
    y_ticks = nice_ticks(low, high if high > low else low + 1.0, 5)
    named = [line.label or line.name for line in lines]
    axes = Axes((ticks[0], max(xs[0], *xs, ticks[0] + 1)), (y_ticks[0], y_ticks[-1]), _room(named))
    parts = [_frame(axes, y_ticks, y_format)]
    parts += [_text(axes.x(t), HEIGHT - BOTTOM + 18, x_name(t), "middle") for t in ticks if t <= axes.x_range[1]]
    parts.append(_text((LEFT + WIDTH - axes.right) / 2, HEIGHT - 4, x_label, "middle", "axis"))
    parts += [_band(axes, line) for line in lines if line.low]
    parts += [_line(axes, line, y_format, x_name) for line in lines]
    ends = spread([axes.y(line.y[-1]) for line in lines], LINE_HEIGHT, TOP, HEIGHT - BOTTOM)
    for line, name, y in zip(lines, named, ends):
        parts.append(_text(axes.x(line.x[-1]) + 10, y + 4, name, "start", "name", f"fill:{line.colour}"))
    return _svg(parts, title)


def stacked_bars(
    columns: Sequence[tuple[str, Sequence[float]]],
    parts: Sequence[tuple[str, str]],
    *,
    title: str,
    x_label: str,
    y_format: Callable[[float], str],
    y_max: float | None = None,
) -> Safe:
    """One bar per column, its parts from the bottom up; parts high enough carry their value, all a tooltip.

    Args:
        columns: (name, one value per part).
        parts: (name, CSS colour); draw `legend(parts)` beside the chart.
        y_max: None fits the data.
    """
    tops = [sum(values) for _, values in columns]
    y_ticks = nice_ticks(0.0, y_max or max(tops) or 1.0, 5)
    axes = Axes((0, len(columns)), (0, y_ticks[-1]), 12)
    drawn = [_frame(axes, y_ticks, y_format)]
    width = min(0.72 * (axes.x(1) - axes.x(0)), 72)
    for number, (name, values) in enumerate(columns):
        middle, below = axes.x(number + 0.5), 0.0
        for value, (part, colour) in zip(values, parts):
            if value:
                box = (
                    middle - width / 2,
                    axes.y(below + value),
                    width,
                    axes.y(below) - axes.y(below + value),
                )
                drawn.append(_bar(box, colour, y_format(value), f"{part}, {x_label} {name}: {y_format(value)}"))
            below += value
        drawn.append(_text(middle, HEIGHT - BOTTOM + 18, name, "middle"))
    drawn.append(_text((LEFT + WIDTH - axes.right) / 2, HEIGHT - 4, x_label, "middle", "axis"))
    return _svg(drawn, title)


def histogram(edges: Sequence[float], counts: Sequence[float], *, title: str, x_label: str, colour: str) -> Safe:
    """Bars over a number line; heights are logarithms of 1 + count, so that a few far out can be seen beside many.

    Args:
        edges: [n + 1], rising. counts: [n].
    """
    top = math.ceil(math.log10(1 + max(counts)))
    axes = Axes((edges[0], edges[-1]), (0, top), 12)
    powers = [math.log10(1 + 10**power) if power else 0.0 for power in range(top)]
    drawn = [_frame(axes, [p for p in powers if p <= top], lambda y: f"{10**y - 1:,.0f}")]
    for low, high, count in zip(edges, edges[1:], counts):
        y = axes.y(math.log10(1 + count))
        box = {"x": axes.x(low), "y": y, "width": axes.x(high) - axes.x(low), "height": axes.y(0) - y}
        tip = tag("title", f"{low:g} to {high:g}: {count:,.0f}")
        numbers = {name: f"{value:.1f}" for name, value in box.items()}
        drawn.append(tag("rect", tip, **numbers, class_="bar", style=f"fill:{colour}") if count else Safe(""))
    ticks = [t for t in nice_ticks(edges[0], edges[-1], 8) if edges[0] <= t <= edges[-1]]
    drawn += [_text(axes.x(t), HEIGHT - BOTTOM + 18, f"{t:g}", "middle") for t in ticks]
    drawn.append(_text((LEFT + WIDTH - axes.right) / 2, HEIGHT - 4, x_label, "middle", "axis"))
    return _svg(drawn, title)


def legend(parts: Sequence[tuple[str, str]]) -> Safe:
    """Names of parts with their colours, as HTML."""
    items = (tag("span", tag("i", style=f"background:{colour}"), name) for name, colour in parts)
    return tag("p", *items, class_="legend")


def nice_ticks(low: float, high: float, count: int, *, integers: bool = False) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten apart) that cover low..high."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    steps = [power * factor for factor in (1, 2, 2.5, 5, 10) if not integers or (power * factor) % 1 == 0]
    step = next((s for s in steps if span / s <= count), (steps or [1.0])[-1])
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 10) for number in range(first, last + 1)]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves positions until neighbours are `gap` apart, by as little as need be, within low..high."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    floor = low
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _room(names: Sequence[str]) -> float:
    """Pixels that the names at the right need."""
    return 18 + 6.6 * max(map(len, names), default=0)


def _frame(axes: Axes, ticks: Sequence[float], y_format: Callable[[float], str]) -> Safe:
    """Horizontal grid lines with their values."""
    right = WIDTH - axes.right
    parts = []
    for tick in ticks:
        y = axes.y(tick)
        parts.append(
            tag(
                "line",
                x1=LEFT,
                x2=f"{right:.1f}",
                y1=f"{y:.1f}",
                y2=f"{y:.1f}",
                class_="grid" if tick > ticks[0] else "zero",
            )
        )
        parts.append(_text(LEFT - 8, y + 4, y_format(tick), "end"))
    return join(parts)


def _band(axes: Axes, line: Line) -> Safe:
    there = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.high)]
    back = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.low)]
    if len(there) == 1:  # a band of no width: draw the interval as a bar
        (x, top), (_, bottom) = there[0], back[0]
        there, back = [(x - 3, top), (x + 3, top)], [(x - 3, bottom), (x + 3, bottom)]
    return tag("polygon", points=_points(there + back[::-1]), class_="band", style=f"fill:{line.colour}")


def _line(axes: Axes, line: Line, y_format: Callable, x_name: Callable) -> Safe:
    stride = math.ceil(len(line.x) / _POINTS) or 1
    kept = [i for i in range(len(line.x)) if i % stride == 0 or i == len(line.x) - 1]
    points = [(axes.x(line.x[i]), axes.y(line.y[i])) for i in kept]
    drawn = [
        tag(
            "polyline",
            points=_points(points),
            class_="line dashed" if line.dashed else "line",
            style=f"stroke:{line.colour}",
        )
    ]
    for i, (x, y) in zip(kept, points) if line.marks else ():
        bounds = f" [{y_format(line.low[i])}, {y_format(line.high[i])}]" if line.low else ""
        tip = f"{line.name}, {x_name(line.x[i])}: {y_format(line.y[i])}{bounds}"
        drawn.append(
            tag(
                "path",
                tag("title", tip),
                d=_mark(line.shape, x, y),
                class_="mark",
                style=f"fill:{'var(--card)' if line.dashed else line.colour};stroke:{line.colour}",
            )
        )
    return join(drawn)


def _mark(number: int, x: float, y: float) -> str:
    """A disc, square, triangle or diamond."""
    shapes = (
        "M{x:.1f} {y:.1f}m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        "M{x:.1f} {y:.1f}m-3.5 -3.5h7v7h-7z",
        "M{x:.1f} {y:.1f}m0 -4.8l4.6 8h-9.2z",
        "M{x:.1f} {y:.1f}m0 -5l5 5l-5 5l-5 -5z",
    )
    return shapes[number % len(shapes)].format(x=x, y=y)


def _bar(box: tuple[float, float, float, float], colour: str, value: str, tip: str) -> Safe:
    x, y, width, height = box
    numbers = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    bar = tag("rect", tag("title", tip), **numbers, class_="bar", style=f"fill:{colour}")
    fits = height > LINE_HEIGHT and width > 6.2 * len(value)
    return join([bar, _text(x + width / 2, y + height / 2 + 4, value, "middle", "inside") if fits else None])


def _text(x: float, y: float, text: str, anchor: str, class_: str = "tick", style: str | None = None) -> Safe:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_, style=style)


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _svg(parts: Sequence[Safe], title: str) -> Safe:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
