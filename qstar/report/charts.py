"""Charts of pages and notebooks: inline SVG whose colours follow the reader's light or dark setting.

Points and bars carry a <title>, which browsers show as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup, escape

# CSS variable -> colour on a light and on a dark ground; c0, c1 ... are the lines of a chart in their order. The verdicts
# (kept ...) have entries of their own: their colours may differ from those of lines.
COLOURS = {
    "kept": ("#0b6fb5", "#5fb0ea"),
    "rationalised": ("#c2560a", "#f39a55"),
    "rejected": ("#737b87", "#9aa3b1"),
    "c0": ("#0b6fb5", "#5fb0ea"),
    "c1": ("#c2560a", "#f39a55"),
    "c2": ("#00805c", "#3ecb9c"),
    "c3": ("#a8448a", "#e394c8"),
    "c4": ("#8a6d00", "#e0c04a"),
    "c5": ("#2f8fc4", "#9bd4f5"),
    "c6": ("#6b5bd0", "#b0a4ff"),
    "up": ("#1f77c9", "#3d8fe0"),
    "down": ("#d9660a", "#e07b1a"),
}
SERIES = 7
WIDTH, HEIGHT = 480, 290
LEFT, TOP, BOTTOM = 46, 14, 40
LINE_HEIGHT = 14
LONGEST_NAME = 22  # characters of a line's name beside it; tooltips and tables have all of it
# A longer line is thinned: the chart has few more pixels, and every point is an element of the page.
_POINTS = 300
_DASH = 7  # pixels of a line's dash where several run through the same points


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
    shape: int = 0  # of the marks: not everyone can tell lines apart by colour


class Card(NamedTuple):
    """A titled chart with what stands below it."""

    title: str
    chart: Markup
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()  # (name, CSS colour)


@dataclass(frozen=True)
class _Axes:
    """Data coordinates to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float = LEFT
    right: float = 12

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1) * (WIDTH - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)


def series(number: int) -> str:
    """The CSS colour of a chart's n-th line."""
    return f"var(--c{number % SERIES})"


def colour_rules() -> str:
    """COLOURS as declarations of CSS variables."""
    return " ".join(f"--{name}: light-dark({light}, {dark});" for name, (light, dark) in COLOURS.items())


# -------------------------------------------------------------------------------------------------------------- charts


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_format: Callable[[float], str],
    y_range: tuple[float, float] | None = None,
    x_name: Callable[[float], str] = lambda value: f"{value:g}",
) -> Markup:
    """Lines with markers, confidence bands, and their names in a column at the right; `title` is the ARIA label."""
    # At least one unit wide: a run with one iteration would divide by zero.
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in (*line.y, *line.low, *line.high)]
    ticks = nice_ticks(min(xs), max(max(xs), min(xs) + 1), 8, integers=True)
    # With 0, unless the caller knows better: a cut axis exaggerates small differences.
    low, high = y_range or (min(0.0, *ys), max(0.0, *ys))
    y_ticks = nice_ticks(low, high if high > low else low + 1.0, 5)
    names = [line.name if len(line.name) <= LONGEST_NAME else line.name[: LONGEST_NAME - 1] + "…" for line in lines]
    # About 6.6 pixels for a character: without a script, a page cannot measure text. Likewise 6.2 and 6.4 below.
    room = 24 + 6.6 * max(map(len, names), default=0)
    axes = _Axes((ticks[0], max(*xs, ticks[0] + 1)), (y_ticks[0], y_ticks[-1]), right=room)
    parts = [_frame(axes, y_ticks, y_format, x_label)]
    parts += [_text(axes.x(t), HEIGHT - BOTTOM + 18, x_name(t), "middle") for t in ticks if t <= axes.x_range[1]]
    # All bands before all lines: SVG paints in this order, and a band would cover another line.
    parts += [_band(axes, line) for line in lines if line.low]
    turns = _turns([[(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.y)] for line in lines])
    parts += [_line(axes, line, turn, y_format, x_name) for line, turn in zip(lines, turns)]
    column = WIDTH - room + 16
    # Lines that end close together would print their names over each other.
    heights = spread([axes.y(line.y[-1]) for line in lines], LINE_HEIGHT, TOP, HEIGHT - BOTTOM)
    for line, name, y in zip(lines, names, heights):
        x_end, y_end = axes.x(line.x[-1]) + 6, axes.y(line.y[-1])
        # A leader from the last point, where the name could not stand beside it.
        if x_end < column - 12 or abs(y - y_end) > 2:
            points = _points([(x_end, y_end), (max(x_end, column - 8), y_end), (column - 2, y)])
            parts.append(_tag("polyline", points=points, class_="leader", style=f"stroke:{line.colour}"))
        parts.append(_text(column, y + 4, name, "start", "name", f"fill:{line.colour}"))
    return _svg(parts, title)


def series_card(
    title: str, named: Iterable[tuple[str, Sequence[Sequence[float]]]], *, marks: bool = False, **axes: Any
) -> Card | None:
    """A card with a line per (name, [x, y] or [x, y, low, high]); None without a point. `axes`: of `line_chart`."""
    lines = []
    for number, (name, (x, y, *bounds)) in enumerate(named):
        if x:
            low, high = bounds or ((), ())
            style: dict[str, Any] = {"marks": marks or len(x) == 1, "shape": number, "dashed": number >= SERIES}
            lines.append(Line(name, x, y, series(number), low, high, **style))
    return Card(title, line_chart(lines, title=title, **axes)) if lines else None


def stacked_bars(
    columns: Sequence[tuple[str, Sequence[float]]],
    parts: Sequence[tuple[str, str]],
    *,
    title: str,
    x_label: str,
    y_format: Callable[[float], str],
    y_max: float,
) -> Markup:
    """One bar per column (name, one value per part), its parts (name, CSS colour) from the bottom up."""
    y_ticks = nice_ticks(0.0, y_max, 5)
    axes = _Axes((0, len(columns)), (0, y_ticks[-1]))
    drawn = [_frame(axes, y_ticks, y_format, x_label)]
    width = min(0.72 * (axes.x(1) - axes.x(0)), 72)
    for number, (name, values) in enumerate(columns):
        middle, below = axes.x(number + 0.5), 0.0
        for value, (part, colour) in zip(values, parts):
            if value:
                top, bottom = axes.y(below + value), axes.y(below)
                tip = f"{part}, {x_label} {name}: {y_format(value)}"
                drawn.append(_bar(middle - width / 2, top, width, bottom - top, colour, tip))
                # A value that does not fit into its part is in the tooltip alone.
                if bottom - top > LINE_HEIGHT and width > 6.2 * len(y_format(value)):
                    drawn.append(_text(middle, (top + bottom) / 2 + 4, y_format(value), "middle", "inside"))
            below += value
        drawn.append(_text(middle, HEIGHT - BOTTOM + 18, name, "middle"))
    return _svg(drawn, title)


def horizontal_bars(
    rows: Sequence[tuple[str, float, str]],
    *,
    title: str,
    x_max: float,
    x_format: Callable[[float], str],
    intervals: Sequence[tuple[float | None, float | None]] = (),
) -> Markup:
    """A bar per row (name, value, CSS colour), its name at the left, its value at the end; `intervals`: one per bar."""
    left, step = 14 + 6.4 * max(len(name) for name, *_ in rows), 20
    axes, drawn = _Axes((0, x_max), (0, 1), left=left, right=52), []
    for number, (name, value, colour) in enumerate(rows):
        y, ends = 4 + step * number, [value if x is None else x for x in (intervals[number] if intervals else ())]
        drawn += [
            _text(left - 8, y + 12, name, "end"),
            _bar(left, y, max(1.0, axes.x(value) - left), step - 6, colour, f"{name}: {x_format(value)}"),
            _text(max(map(axes.x, (value, *ends))) + 6, y + 12, x_format(value), "start", "name"),
        ]
        if ends:
            x1, x2 = (f"{axes.x(end):.1f}" for end in ends)
            drawn.append(_tag("line", x1=x1, x2=x2, y1=y + 7, y2=y + 7, class_="interval"))
    return _svg(drawn, title, height=step * len(rows) + 6)


def histogram(edges: Sequence[float], counts: Sequence[float], *, title: str, x_label: str, colour: str) -> Markup:
    """Bars over a number line on a logarithmic scale; edges [n + 1], rising, counts [n]."""
    # Logarithms, so that small counts show beside large ones; of 1 + count, so that an empty bar has no height.
    top = math.ceil(math.log10(1 + max(counts)))
    axes = _Axes((edges[0], edges[-1]), (0, top))
    powers = [math.log10(1 + 10**power) if power else 0.0 for power in range(top)]
    drawn = [_frame(axes, powers, lambda y: f"{10**y - 1:,.0f}", x_label)]
    for low, high, count in zip(edges, edges[1:], counts):
        y = axes.y(math.log10(1 + count))
        if count:
            tip = f"{low:g} to {high:g}: {count:,.0f}"
            drawn.append(_bar(axes.x(low), y, axes.x(high) - axes.x(low), axes.y(0) - y, colour, tip))
    ticks = [t for t in nice_ticks(edges[0], edges[-1], 8) if edges[0] <= t <= edges[-1]]
    drawn += [_text(axes.x(t), HEIGHT - BOTTOM + 18, f"{t:g}", "middle") for t in ticks]
    return _svg(drawn, title)


# --------------------------------------------------------------------------------------------------------------- parts


def nice_ticks(low: float, high: float, count: int, *, integers: bool = False) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten apart) that cover low..high."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    # Iterations and updates have no fractions: with `integers`, no tick stands between two of them.
    steps = [power * factor for factor in (1, 2, 2.5, 5, 10) if not integers or (power * factor) % 1 == 0]
    step = next((s for s in steps if span / s <= count), (steps or [1.0])[-1])
    # The tolerance keeps a bound that is a tick but for rounding from adding one more.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 10) for number in range(first, last + 1)]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves positions until neighbours are `gap` apart, within low..high."""
    # Upwards from the lowest, then downwards: the second pass brings back what the first pushed above `high`.
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    floor, ceiling = low, high
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _turns(pixels: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[int, int]]:
    # (turn, turns) per line. Lines that share half of their points would hide each other: they are drawn as dashes in
    # turn. Whole pixels, since closer points cannot be told apart.
    sets = [{(round(x), round(y)) for x, y in points} for points in pixels]
    first = [next(j for j in range(i + 1) if 2 * len(s & sets[j]) >= len(s)) for i, s in enumerate(sets)]
    return [(first[:i].count(f), first.count(f)) for i, f in enumerate(first)]


def _line(axes: _Axes, line: Line, turn: tuple[int, int], y_format: Callable, x_name: Callable) -> Markup:
    stride = math.ceil(len(line.x) / _POINTS) or 1
    # The last point stays, which the name and its leader are placed by.
    kept = [i for i in range(len(line.x)) if i % stride == 0 or i == len(line.x) - 1]
    points = [(axes.x(line.x[i]), axes.y(line.y[i])) for i in kept]
    number, several = turn
    style = f"stroke:{line.colour}"
    if several > 1 and not line.dashed:
        style += f";stroke-dasharray:{_DASH} {_DASH * (several - 1)};stroke-dashoffset:{-_DASH * number}"
    drawn = [_tag("polyline", points=_points(points), class_="line dashed" if line.dashed else "line", style=style)]
    fill = "var(--card)" if line.dashed or number < several - 1 else line.colour
    # Marks at the same place are rings around each other, up to twice the size.
    size = 1 + min(0.5, 1 / max(1, several - 1)) * (several - 1 - number)
    for i, (x, y) in zip(kept, points) if line.marks else ():
        bounds = f" [{y_format(line.low[i])}, {y_format(line.high[i])}]" if line.low else ""
        tip = _tag("title", f"{line.name}, {x_name(line.x[i])}: {y_format(line.y[i])}{bounds}")
        shape = _mark(line.shape, x, y, size)
        drawn.append(_tag("path", tip, d=shape, class_="mark", style=f"fill:{fill};stroke:{line.colour}"))
    return Markup("").join(drawn)


def _mark(number: int, x: float, y: float, size: float) -> str:
    # A disc, square, triangle or diamond; the factors make them look about equally large.
    r = 4 * size
    shapes = (
        f"m{-r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0z",
        f"m{-0.9 * r:.1f} {-0.9 * r:.1f}h{1.8 * r:.1f}v{1.8 * r:.1f}h{-1.8 * r:.1f}z",
        f"m0 {-1.2 * r:.1f}l{1.15 * r:.1f} {2 * r:.1f}h{-2.3 * r:.1f}z",
        f"m0 {-1.25 * r:.1f}l{1.25 * r:.1f} {1.25 * r:.1f}l{-1.25 * r:.1f} {1.25 * r:.1f}l{-1.25 * r:.1f} {-1.25 * r:.1f}z",
    )
    return f"M{x:.1f} {y:.1f}{shapes[number % len(shapes)]}"


def _band(axes: _Axes, line: Line) -> Markup:
    there = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.high)]
    back = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.low)]
    # The polygon of a single point has no width: its interval is drawn as a bar.
    if len(there) == 1:
        (x, top), (_, bottom) = there[0], back[0]
        there, back = [(x - 3, top), (x + 3, top)], [(x - 3, bottom), (x + 3, bottom)]
    return _tag("polygon", points=_points(there + back[::-1]), class_="band", style=f"fill:{line.colour}")


def _frame(axes: _Axes, ticks: Sequence[float], y_format: Callable[[float], str], x_label: str) -> Markup:
    right = WIDTH - axes.right
    parts = [_text((axes.left + right) / 2, HEIGHT - 4, x_label, "middle", "axis")]
    for tick in ticks:
        y, css = f"{axes.y(tick):.1f}", "grid" if tick > ticks[0] else "zero"
        parts.append(_tag("line", x1=axes.left, x2=f"{right:.1f}", y1=y, y2=y, class_=css))
        parts.append(_text(axes.left - 8, axes.y(tick) + 4, y_format(tick), "end"))
    return Markup("").join(parts)


def _bar(x: float, y: float, width: float, height: float, colour: str, tip: str) -> Markup:
    box = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    return _tag("rect", _tag("title", tip), **box, class_="bar", style=f"fill:{colour}")


def _text(x: float, y: float, text: str, anchor: str, class_: str = "tick", style: str | None = None) -> Markup:
    return _tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_, style=style)


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _svg(parts: Sequence[Markup], title: str, height: float = HEIGHT) -> Markup:
    return _tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=title)


def _tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    # Names of arms and groups come from files: children and attributes are escaped unless they are markup. `class_` is
    # written `class`, `text_anchor` `text-anchor`.
    named: Mapping[str, Any] = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    written = "".join(f' {key}="{escape(value)}"' for key, value in named.items() if value is not None)
    return Markup(f"<{name}{written}>{''.join(map(escape, children))}</{name}>")
