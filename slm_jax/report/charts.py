"""Charts as HTML with inline SVG: every scale is drawn beforehand, and style sheets choose the one to be seen, so that
they work without scripts. The lines stretch with the page; texts are HTML beside them and keep their size."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from slm_jax.report import escape
from slm_jax.report.axes import Scale, compact, span, tick_texts, time_ticks
from slm_jax.report.columns import AXES
from slm_jax.report.escape import Safe

AXIS_TEXT = {"step": "steps", "tokens": "tokens predicted", "seconds": "training time", "flops": "model FLOPs"}
MANY = 40  # points, from which on they are small
SERIES = 5  # colours; further lines take them again, dashed

Points = dict[str, np.ndarray]
"""Float [B] by axis."""


@dataclass(frozen=True)
class Line:
    """One line, or points on a line, of B values over each axis."""

    name: str
    x: Points
    y: np.ndarray  # [B]
    band: tuple[np.ndarray, np.ndarray] | None = None  # least and greatest, [B] each
    smooth: np.ndarray | None = None  # [B]; shown instead of y, which is then thin, when smoothing is on
    dots: bool = False
    color: int = 0

    @property
    def style(self) -> str:
        """Classes of its colour and dashes."""
        return f"c{self.color % SERIES + 1}" + f" dash{min(self.color // SERIES, 3)}" * (self.color >= SERIES)


@dataclass(frozen=True)
class Mark:
    """A vertical line with a name, where a stage begins."""

    x: dict[str, float]
    name: str


@dataclass(frozen=True)
class Level:
    """A horizontal line with a name."""

    y: float
    name: str


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis."""

    title: str
    unit: str  # of y
    lines: list[Line]
    marks: list[Mark] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    axes: tuple[str, ...] = AXES
    log: bool = True  # offer a logarithmic y axis
    zero: bool = False  # the linear y axis begins at 0
    form: Callable[[float], str] | None = None  # of y
    form_name: str = "number"  # how the script writes y: number, percent
    wide: bool = False
    note: str = ""


class Tracks:
    """The x values that the charts of a page share, each kept once, for the script that reads values out."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._kept: list[Points] = []

    def add(self, x: Points) -> int:
        """Its number."""
        if id(x) not in self._places:
            self._places[id(x)] = len(self._kept)
            self._kept.append(x)  # kept alive: an id stands for one object
        return self._places[id(x)]

    def html(self) -> Safe:
        """The element that holds them."""
        tracks = [{axis: short(values, 7) for axis, values in x.items()} for x in self._kept]
        return Safe(f'<script type="application/json" id="tracks">{escape.data(tracks)}</script>')


def short(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """As a list with so many digits; None for what is no number."""
    found = (float(f"{value:.{digits}g}") for value in values.tolist())
    return [(int(value) if value == int(value) else value) if math.isfinite(value) else None for value in found]


def render(chart: Chart, tracks: Tracks) -> Safe:
    """The figure, or "" where there is nothing to draw."""
    lines = [line for line in chart.lines if np.isfinite(line.y).any()]
    if not lines:
        return Safe("")
    # Without a positive value there is no logarithm; without one over a decade apart there is no need for it.
    logs = (False, True) if chart.log and (Scale.around(_all_y(lines), log=True) is not None) else (False,)
    views = [_view(chart, lines, axis, log) for axis in chart.axes for log in logs]
    shown = [
        {
            "name": line.name,
            "track": tracks.add(line.x),
            "style": line.style,
            "y": short(line.y),
            **({"smooth": short(line.smooth)} if line.smooth is not None else {}),
        }
        for line in lines
    ]
    title, unit = escape.text(chart.title), escape.text(chart.unit)
    label = escape.text(f"{chart.title}, {chart.unit}. {_in_words(chart, lines)}")
    kind = "plot marked" if chart.marks else "plot"
    plot = f'<div class="{kind}" role="group" aria-roledescription="chart" tabindex="0" aria-label="{label}">'
    switch = '<label class="no-print"><input type="checkbox" class="log"> log scale</label>' if len(logs) > 1 else ""
    note = f"<p class='small muted'>{escape.text(chart.note)}</p>" if chart.note else ""
    return Safe(
        f'<figure class="chart card{" wide-chart" * chart.wide}" data-form="{chart.form_name}">'
        f'<div class="chart-head"><h3>{title} <span class="muted">{unit}</span></h3>{switch}</div>'
        f"{_legend(lines)}{plot}{''.join(views)}</div>"
        f"{note}"
        f'<script type="application/json" class="lines">{escape.data(shown)}</script></figure>'
    )


def _in_words(chart: Chart, lines: list[Line]) -> str:
    """What a reader who sees no picture is told."""
    form = chart.form or compact
    told = []
    for line in lines:
        y, low, high = (values[np.isfinite(values)] for values in (line.y, *(line.band or (line.y, line.y))))
        ends = f"from {form(y[0])} to {form(y[-1])}"
        told.append(f"{line.name}: {ends}, lowest {form(low.min())}, highest {form(high.max())}")
    return "; ".join(told) + ". Arrow keys read values out."


def _legend(lines: list[Line]) -> str:
    if len(lines) == 1 and lines[0].smooth is None:
        return ""
    items = []
    for line in lines:
        mark = f'<svg class="swatch {line.style}" viewBox="0 0 24 10" aria-hidden="true"><path d="M1 5h22"/>'
        mark += '<path class="dot" d="M12 5h0"/>' * line.dots + "</svg>"
        items.append(f"<li>{mark} {escape.text(line.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _all_y(lines: list[Line]) -> np.ndarray:
    return np.concatenate([np.concatenate([line.y, *(line.band or ())]) for line in lines])


def _view(chart: Chart, lines: list[Line], axis: str, log: bool) -> str:
    """The chart over one axis, linear or logarithmic in y."""
    x_values = np.concatenate([line.x[axis] for line in lines])
    x_values = x_values[np.isfinite(x_values)]
    low, high = min(0.0, float(x_values.min(initial=0.0))), float(x_values.max(initial=1.0))
    x_scale = Scale(low, high if high > low else low + 1.0)
    levels = np.array([level.y for level in chart.levels])
    y_scale = Scale.around(np.concatenate([_all_y(lines), levels]), log, chart.zero)
    assert y_scale is not None
    body = [_grid(y_scale)]
    body += [_vertical(x_scale, mark.x[axis]) for mark in chart.marks]
    body += [f'<path class="level" d="M0 {_down(y_scale, level.y)}H1000"/>' for level in chart.levels]
    for line in lines:
        body.extend(_drawn(line, axis, x_scale, y_scale))
    svg = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{"".join(body)}</svg>'
    place = f'data-axis="{axis}" data-low="{x_scale.low:.7g}" data-high="{x_scale.high:.7g}"'
    place += f' data-bottom="{y_scale.low:.7g}" data-top="{y_scale.high:.7g}"'
    return (
        f'<div class="view axis-{axis} {"log" if log else "lin"}" {place} aria-hidden="true"><div class="area">{svg}'
        f"{_names(chart, axis, x_scale, y_scale)}</div>{_y_ticks(chart, y_scale)}{_x_ticks(axis, x_scale)}"
        f'<div class="x-name">{AXIS_TEXT[axis]}</div></div>'
    )


def _down(scale: Scale, y: float) -> str:
    return f"{1000 - 1000 * float(scale.place(np.array(y))):.1f}"


def _grid(scale: Scale) -> str:
    rows = "".join(f"M0 {_down(scale, tick)}H1000" for tick in scale.ticks())
    return f'<path class="grid" d="{rows}"/>'


def _vertical(scale: Scale, x: float) -> str:
    return f'<path class="mark" d="M{1000 * float(scale.place(np.array(x))):.1f} 0V1000"/>'


def _drawn(line: Line, axis: str, x_scale: Scale, y_scale: Scale) -> Iterator[str]:
    x, y = 1000 * x_scale.place(line.x[axis]), 1000 - 1000 * y_scale.place(line.y)
    if line.band is not None:
        low, high = (1000 - 1000 * y_scale.place(np.maximum(edge, y_scale.low)) for edge in line.band)
        yield f'<path class="band {line.style}" d="{_outline(x, low, high)}"/>'
    thin = " thin" if line.smooth is not None else ""
    yield f'<path class="line {line.style}{thin}" d="{_path(x, y)}"/>'
    if line.smooth is not None:
        smooth = 1000 - 1000 * y_scale.place(line.smooth)
        yield f'<path class="line smooth {line.style}" d="{_path(x, smooth)}"/>'
    if line.dots or np.isfinite(y).sum() == 1:  # a single point draws no line
        places = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True) if math.isfinite(a + b))
        yield f'<path class="dot {line.style}{" many" * (len(y) > MANY)}" d="{places}"/>'


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A line through all points; broken where a value is missing."""
    parts, pen = [], "M"
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(a + b):
            parts.append(f"{pen}{a:.1f} {b:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _outline(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    known = np.isfinite(x + low + high)
    if known.sum() < 2:
        return ""
    there, back = _path(x[known], high[known]), _path(x[known][::-1], low[known][::-1])
    return f"{there}L{back[1:]}Z"


def _names(chart: Chart, axis: str, x_scale: Scale, y_scale: Scale) -> str:
    """The names at marks and levels."""
    found = []
    for mark in chart.marks:
        place = 100 * float(x_scale.place(np.array(mark.x[axis])))
        side = f"right:{100 - place:.2f}%" if place > 75 else f"left:{place:.2f}%"
        found.append(f'<span class="mark-name" style="{side}">{escape.text(mark.name)}</span>')
    for level in chart.levels:
        place = 100 * float(y_scale.place(np.array(level.y)))
        found.append(f'<span class="level-name" style="bottom:{place:.2f}%">{escape.text(level.name)}</span>')
    return "".join(found)


def _y_ticks(chart: Chart, scale: Scale) -> str:
    ticks = scale.ticks()
    places = 100 * scale.place(np.array(ticks))
    texts = tick_texts(ticks, chart.form)
    spans = [f'<span style="bottom:{p:.2f}%">{escape.text(t)}</span>' for p, t in zip(places, texts, strict=True)]
    return f'<div class="y-ticks" aria-hidden="true">{"".join(spans)}</div>'


def _x_ticks(axis: str, scale: Scale) -> str:
    seconds = axis == "seconds"
    ticks = time_ticks(scale.low, scale.high) if seconds else scale.ticks()
    places = 100 * scale.place(np.array(ticks))
    texts = [span(tick) for tick in ticks] if seconds else tick_texts(ticks)
    spans = [f'<span style="left:{p:.2f}%">{escape.text(t)}</span>' for p, t in zip(places, texts, strict=True)]
    return f'<div class="x-ticks" aria-hidden="true">{"".join(spans)}</div>'
