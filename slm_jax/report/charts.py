"""Line charts as HTML with inline SVG, which work without scripts.

A chart is drawn once for each x axis and y scale, and style sheets choose the view that is shown. The SVG stretches
with the page; labels are HTML around it and keep their size. report.js only displays the values under the pointer.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from slm_jax.report.axes import Scale, format_compact, format_duration, tick_labels, time_ticks
from slm_jax.report.columns import AXES
from slm_jax.report.escaping import SafeHtml, escape_text, script_json

AXIS_LABELS = {"step": "steps", "tokens": "predicted tokens", "seconds": "training time", "flops": "model FLOPs"}
_SMALL_DOTS = 40  # number of points from which on they are drawn smaller
_COLORS = 5  # of the style sheet; further lines reuse them, dashed

XValues = dict[str, np.ndarray]
"""Float [B] by axis name."""


@dataclass(frozen=True)
class Line:
    """A line, or points on a line, with B values over each x axis.

    Attributes:
        name: Name in the legend.
        x: Positions, [B] by axis.
        y: Values, [B]; the line is interrupted at NaN.
        band: Lower and upper limits around the line, [B] each.
        smooth: Smoothed values, [B]. They are shown prominently, and `y` as a thin line, while smoothing is on.
        dots: Mark each point.
        color: Number of the color; beyond the last color, dash patterns distinguish the lines.
    """

    name: str
    x: XValues
    y: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None
    smooth: np.ndarray | None = None
    dots: bool = False
    color: int = 0

    @property
    def style(self) -> str:
        """CSS classes of the color and the dash pattern."""
        color = f"c{self.color % _COLORS + 1}"
        dashes = min(self.color // _COLORS, 3)
        return f"{color} dash{dashes}" if dashes else color


@dataclass(frozen=True)
class Marker:
    """A labeled vertical line, at the start of a stage."""

    x: dict[str, float]
    name: str


@dataclass(frozen=True)
class Level:
    """A labeled horizontal line."""

    y: float
    name: str


@dataclass(frozen=True)
class Chart:
    """Lines with common axes.

    Attributes:
        title: The title.
        unit: Unit of y, shown after the title.
        lines: The lines; those without a finite value are omitted.
        markers: Vertical lines.
        levels: Horizontal lines.
        axes: The x axes to offer.
        log: Offer a logarithmic y axis.
        include_zero: Start the linear y axis at 0.
        format_y: Formats y values in labels; None: a default for numbers.
        script_format: Name of the format in report.js, "number" or "percent".
        wide: Use the full width of the page.
        note: Text below the chart.
    """

    title: str
    unit: str
    lines: list[Line]
    markers: list[Marker] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    axes: tuple[str, ...] = AXES
    log: bool = True
    include_zero: bool = False
    format_y: Callable[[float], str] | None = None
    script_format: str = "number"
    wide: bool = False
    note: str = ""


class SharedX:
    """The x values of all charts of a page, each stored once, for the script that displays values."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._values: list[XValues] = []

    def add(self, x: XValues) -> int:
        """Return the index of x values, which are added if this object is new."""
        if id(x) not in self._index:
            self._index[id(x)] = len(self._values)
            self._values.append(x)  # also keeps the object alive, so that its id stays unique
        return self._index[id(x)]

    def html(self) -> SafeHtml:
        """Return the script element with the values."""
        values = [{axis: rounded(array, 7) for axis, array in x.items()} for x in self._values]
        return SafeHtml(f'<script type="application/json" id="x-values">{script_json(values)}</script>')


def rounded(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """Return a list for JSON with `digits` significant digits; None for NaN and infinity."""
    result: list[float | None] = []
    for value in values.tolist():
        short = float(f"{value:.{digits}g}")
        if not math.isfinite(short):
            result.append(None)
        else:
            result.append(int(short) if short == int(short) else short)
    return result


def render(chart: Chart, shared_x: SharedX) -> SafeHtml:
    """Render a chart.

    Args:
        chart: The chart.
        shared_x: Collects the x values.

    Returns:
        A figure element; "" if there is nothing to draw.
    """
    lines = [line for line in chart.lines if np.isfinite(line.y).any()]
    if not lines:
        return SafeHtml("")
    has_log = chart.log and Scale.fit(_all_y(lines), log=True) is not None  # there is a positive value
    views = [_view(chart, lines, axis, log) for axis in chart.axes for log in ((False, True) if has_log else (False,))]
    title = escape_text(chart.title)
    label = escape_text(f"{chart.title}, {chart.unit}. {_description(chart, lines)}")
    plot_class = "plot marked" if chart.markers else "plot"
    plot = f'<div class="{plot_class}" role="group" aria-roledescription="chart" tabindex="0" aria-label="{label}">'
    switch = '<label class="no-print"><input type="checkbox" class="log"> log scale</label>' if has_log else ""
    note = f"<p class='small muted'>{escape_text(chart.note)}</p>" if chart.note else ""
    figure_class = "chart card wide-chart" if chart.wide else "chart card"
    return SafeHtml(
        f'<figure class="{figure_class}" data-format="{chart.script_format}">'
        f'<div class="chart-head"><h3>{title} <span class="muted">{escape_text(chart.unit)}</span></h3>{switch}</div>'
        f"{_legend(lines)}{plot}{''.join(views)}</div>{note}"
        f'<script type="application/json" class="lines">{_script_lines(lines, shared_x)}</script></figure>'
    )


def _script_lines(lines: list[Line], shared_x: SharedX) -> SafeHtml:
    """Return the data of the lines for report.js."""
    data = []
    for line in lines:
        entry = {"name": line.name, "x": shared_x.add(line.x), "style": line.style, "y": rounded(line.y)}
        if line.smooth is not None:
            entry["smooth"] = rounded(line.smooth)
        data.append(entry)
    return script_json(data)


def _description(chart: Chart, lines: list[Line]) -> str:
    """Describe the lines for screen readers."""
    format_y = chart.format_y or format_compact
    parts = []
    for line in lines:
        y, low, high = (values[np.isfinite(values)] for values in (line.y, *(line.band or (line.y, line.y))))
        ends = f"from {format_y(y[0])} to {format_y(y[-1])}"
        parts.append(f"{line.name}: {ends}, lowest {format_y(low.min())}, highest {format_y(high.max())}")
    return "; ".join(parts) + ". Use the arrow keys to read values."


def _legend(lines: list[Line]) -> str:
    if len(lines) == 1 and lines[0].smooth is None:
        return ""
    items = []
    for line in lines:
        dot = '<path class="dot" d="M12 5h0"/>' if line.dots else ""
        swatch = (
            f'<svg class="swatch {line.style}" viewBox="0 0 24 10" aria-hidden="true"><path d="M1 5h22"/>{dot}</svg>'
        )
        items.append(f"<li>{swatch} {escape_text(line.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _all_y(lines: list[Line]) -> np.ndarray:
    return np.concatenate([np.concatenate([line.y, *(line.band or ())]) for line in lines])


def _view(chart: Chart, lines: list[Line], axis: str, log: bool) -> str:
    """Draw the chart over one x axis, with a linear or a logarithmic y axis."""
    x_values = np.concatenate([line.x[axis] for line in lines])
    x_values = x_values[np.isfinite(x_values)]
    low = min(0.0, float(x_values.min(initial=0.0)))
    high = float(x_values.max(initial=1.0))
    x_scale = Scale(low, high if high > low else low + 1.0)
    levels = np.array([level.y for level in chart.levels])
    y_scale = Scale.fit(np.concatenate([_all_y(lines), levels]), log, chart.include_zero)
    assert y_scale is not None
    paths = [_grid(y_scale)]
    paths += [_vertical(x_scale, marker.x[axis]) for marker in chart.markers]
    paths += [f'<path class="level" d="M0 {_svg_y(y_scale, level.y)}H1000"/>' for level in chart.levels]
    for line in lines:
        paths.extend(_line_paths(line, axis, x_scale, y_scale))
    svg = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{"".join(paths)}</svg>'
    limits = f'data-axis="{axis}" data-low="{x_scale.low:.7g}" data-high="{x_scale.high:.7g}"'
    limits += f' data-bottom="{y_scale.low:.7g}" data-top="{y_scale.high:.7g}"'
    return (
        f'<div class="view axis-{axis} {"log" if log else "lin"}" {limits} aria-hidden="true"><div class="area">{svg}'
        f"{_names(chart, axis, x_scale, y_scale)}</div>{_y_ticks(chart, y_scale)}{_x_ticks(axis, x_scale)}"
        f'<div class="x-name">{AXIS_LABELS[axis]}</div></div>'
    )


def _svg_y(scale: Scale, y: float) -> str:
    """Return the SVG coordinate of a value; it grows downwards."""
    return f"{1000 - 1000 * float(scale.position(np.array(y))):.1f}"


def _grid(scale: Scale) -> str:
    rules = "".join(f"M0 {_svg_y(scale, tick)}H1000" for tick in scale.ticks())
    return f'<path class="grid" d="{rules}"/>'


def _vertical(scale: Scale, x: float) -> str:
    return f'<path class="mark" d="M{1000 * float(scale.position(np.array(x))):.1f} 0V1000"/>'


def _line_paths(line: Line, axis: str, x_scale: Scale, y_scale: Scale) -> Iterator[str]:
    x = 1000 * x_scale.position(line.x[axis])
    y = 1000 - 1000 * y_scale.position(line.y)
    if line.band is not None:
        low, high = (1000 - 1000 * y_scale.position(np.maximum(edge, y_scale.low)) for edge in line.band)
        yield f'<path class="band {line.style}" d="{_outline(x, low, high)}"/>'
    thin = " thin" if line.smooth is not None else ""
    yield f'<path class="line {line.style}{thin}" d="{_path(x, y)}"/>'
    if line.smooth is not None:
        smooth = 1000 - 1000 * y_scale.position(line.smooth)
        yield f'<path class="line smooth {line.style}" d="{_path(x, smooth)}"/>'
    if line.dots or np.isfinite(y).sum() == 1:  # a single point would be invisible as a line
        points = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True) if math.isfinite(a + b))
        many = " many" if len(y) > _SMALL_DOTS else ""
        yield f'<path class="dot {line.style}{many}" d="{points}"/>'


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Return a path through all points, interrupted where a value is missing."""
    parts = []
    command = "M"
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(a + b):
            parts.append(f"{command}{a:.1f} {b:.1f}")
            command = "L"
        else:
            command = "M"
    return "".join(parts)


def _outline(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """Return a closed path along the upper limits and back along the lower ones."""
    finite = np.isfinite(x + low + high)
    if finite.sum() < 2:
        return ""
    forward = _path(x[finite], high[finite])
    backward = _path(x[finite][::-1], low[finite][::-1])
    return f"{forward}L{backward[1:]}Z"


def _names(chart: Chart, axis: str, x_scale: Scale, y_scale: Scale) -> str:
    """Return the labels of markers and levels."""
    labels = []
    for marker in chart.markers:
        left = 100 * float(x_scale.position(np.array(marker.x[axis])))
        style = f"right:{100 - left:.2f}%" if left > 75 else f"left:{left:.2f}%"
        labels.append(f'<span class="mark-name" style="{style}">{escape_text(marker.name)}</span>')
    for level in chart.levels:
        bottom = 100 * float(y_scale.position(np.array(level.y)))
        labels.append(f'<span class="level-name" style="bottom:{bottom:.2f}%">{escape_text(level.name)}</span>')
    return "".join(labels)


def _y_ticks(chart: Chart, scale: Scale) -> str:
    ticks = scale.ticks()
    return _tick_row("y-ticks", "bottom", scale, ticks, tick_labels(ticks, chart.format_y))


def _x_ticks(axis: str, scale: Scale) -> str:
    if axis == "seconds":
        ticks = time_ticks(scale.low, scale.high)
        return _tick_row("x-ticks", "left", scale, ticks, [format_duration(tick) for tick in ticks])
    ticks = scale.ticks()
    return _tick_row("x-ticks", "left", scale, ticks, tick_labels(ticks))


def _tick_row(css_class: str, side: str, scale: Scale, ticks: list[float], labels: list[str]) -> str:
    """Return tick labels at their distances from a side of the plot."""
    percents = 100 * scale.position(np.array(ticks))
    spans = [
        f'<span style="{side}:{percent:.2f}%">{escape_text(label)}</span>'
        for percent, label in zip(percents, labels, strict=True)
    ]
    return f'<div class="{css_class}" aria-hidden="true">{"".join(spans)}</div>'
