"""The charts of one run or curriculum, and the controls above the charts of a page."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from slm_jax.report import markup
from slm_jax.report.axes import format_percent_tick
from slm_jax.report.charts import Chart, Level, Line, Marker, SharedX, XValues, render
from slm_jax.report.columns import AXES, Buckets, Columns, join_with_gaps, moving_average, smoothing_width
from slm_jax.report.escaping import SafeHtml
from slm_jax.report.layer_charts import layer_charts
from slm_jax.report.run_data import ReportData
from slm_jax.report.task_charts import task_charts

POINTS = 500  # per line; a wide screen cannot show more
_MIN_ROWS_TO_SMOOTH = 20
AXIS_NAMES = {"step": "steps", "tokens": "tokens", "seconds": "time", "flops": "FLOPs"}
RUN_AXES = AXES[:3]  # FLOPs are proportional to tokens within a run
PERCENT: dict[str, Any] = {
    "log": False,
    "include_zero": True,
    "format_y": format_percent_tick,
    "script_format": "percent",
}
"""Options of a `Chart` whose values are fractions."""

Values = Callable[[Columns], np.ndarray]
"""Computes a value of each row, [N]."""


class RunLines:
    """The metrics of a run as lines of few points, with gaps between stages, across which nothing is averaged."""

    def __init__(self, data: ReportData, points: int, smoothing_steps: int = 0):
        """Divide the points among the stages.

        Args:
            data: The run, with at least one row.
            points: Approximate number of points of all stages together.
            smoothing_steps: Width of the moving averages; 0: by the length of each stage.
        """
        self._smoothing_steps = smoothing_steps
        self.stages = [stage.columns for stage in data.stages if len(stage.columns)]
        num_rows = sum(map(len, self.stages))
        self.buckets = [
            Buckets.partition(len(columns), max(2, points * len(columns) // num_rows)) for columns in self.stages
        ]
        self.all_rows = all(buckets.is_identity for buckets in self.buckets)  # every row is a point
        self.x = {axis: self._last([columns.x[axis] for columns in self.stages], repeat=True) for axis in AXES}
        self._validation_x: XValues | None = None

    def _last(self, values: list[np.ndarray], repeat: bool = False) -> np.ndarray:
        """Return the last value of each bucket, given the values of each stage."""
        reduced = [buckets.last(array) for buckets, array in zip(self.buckets, values, strict=True)]
        return join_with_gaps(reduced, repeat=repeat)

    def metric(self, values: str | Values, name: str, smooth: bool = False, color: int = 0, band: bool = True) -> Line:
        """Return the line of a metric.

        If there are more rows than points, a point is the mean of its rows. Smoothing is applied before this reduction.

        Args:
            values: A field of the columns, or a function that computes the values.
            name: Name in the legend.
            smooth: Add a smoothed line.
            color: Number of the color.
            band: Show the minimum and maximum of the rows of each point as a band.
        """
        y = [columns[values] if isinstance(values, str) else values(columns) for columns in self.stages]
        reduced = [buckets.mean_min_max(array) for buckets, array in zip(self.buckets, y, strict=True)]
        mean, low, high = (join_with_gaps([arrays[i] for arrays in reduced]) for i in range(3))
        smooth_line = None
        if smooth and sum(map(len, y)) >= _MIN_ROWS_TO_SMOOTH:
            smooth_line = self._last(
                [moving_average(array, self._smoothing_steps or smoothing_width(len(array))) for array in y]
            )
        limits = (low, high) if band and not self.all_rows else None
        return Line(name, self.x, mean, limits, smooth_line, color=color)

    def validation(self, field: str, name: str = "validation", color: int = 1) -> Iterator[Line]:
        """Yield the line of a validation score, with a dot per validation; nothing if there was no validation.

        Args:
            field: Field of the validation rows.
            name: Name in the legend.
            color: Number of the color.
        """
        stages = [columns for columns in self.stages if columns.validations]
        if not stages:
            return
        if self._validation_x is None:  # one object for all charts, which SharedX then stores once
            self._validation_x = {
                axis: join_with_gaps([columns.x[axis][columns.validation_indices()] for columns in stages], repeat=True)
                for axis in AXES
            }
        y = join_with_gaps(
            [np.array([row.get(field) for row in columns.validations], np.float64) for columns in stages]
        )
        yield Line(name, self._validation_x, y, dots=True, color=color)

    def smoothing_note(self) -> str:
        """Describe the smoothing and the reduction to points."""
        lengths = [len(columns) for columns in self.stages]
        num_rows = sum(lengths)
        note = ""
        if num_rows >= _MIN_ROWS_TO_SMOOTH:
            widths = sorted({smoothing_width(length) for length in lengths})
            note += f"Smoothed lines are moving averages over {' or '.join(map(str, widths))} steps."
        if not self.all_rows:
            steps = num_rows / sum(len(buckets.ends) for buckets in self.buckets)
            note += f" Each point is the mean of about {steps:.0f} steps; the band shows their minimum and maximum."
        return note


def curves_section(data: ReportData, shared_x: SharedX, reference: Line | None = None) -> SafeHtml:
    """Return all charts of a run with their controls; "" if there are no rows.

    Args:
        data: The run.
        shared_x: Collects the x values.
        reference: Bits per byte of a reference; None: none.
    """
    if not len(data.columns):
        return SafeHtml("")
    lines = RunLines(data, POINTS)
    metric = lines.metric
    validation = lines.validation
    markers = [Marker(stage.columns.offsets, stage.stage) for stage in data.stages] if data.is_curriculum else []

    def chart(title: str, unit: str, *lines: Line, **options: Any) -> SafeHtml:
        return render(Chart(title, unit, list(lines), markers, axes=RUN_AXES, **options), shared_x)

    bits = metric(lambda columns: columns.bits_per_byte, "training", True)
    others = [] if reference is None else [reference]
    accuracy = metric("accuracy", "training", True)
    is_dpo = all(stage.config.train.objective == "dpo" for stage in data.stages)
    charts = [
        chart(
            "Loss",
            "nats per pair" if is_dpo else "nats per token",
            metric("loss", "training", True),
            *validation("val_loss"),
            wide=True,
        ),
        chart("Bits per byte", "of predicted text", bits, *validation("val_bits_per_byte"), *others),
        chart(
            "Accuracy",
            "of preferences" if is_dpo else "of next-token prediction",
            accuracy,
            *validation("val_accuracy"),
            **PERCENT,
        ),
        chart("Learning rate", "schedule", metric("lr", "learning rate"), include_zero=True),
        chart("Gradient norm", "before clipping", metric("grad_norm", "gradient norm", True), levels=_clip_level(data)),
        chart("Speed", "tokens per second", metric("tokens_per_second", "speed"), log=False, include_zero=True),
        chart("Model FLOPs utilization", "share of the peak", metric("mfu", "MFU"), note=_mfu_note(data), **PERCENT),
    ]
    if np.isfinite(data.columns["margin"]).any():
        margin = metric("margin", "training", True)
        rewards = (metric(f"{name}_reward", name, color=i) for i, name in enumerate(("chosen", "rejected")))
        charts.append(chart("Margin", "of preferences", margin, *validation("val_margin"), log=False))
        charts.append(chart("Rewards", "log-ratio to the reference times beta", *rewards, log=False))
    charts += [render(each, shared_x) for each in task_charts(lines.stages, markers, RUN_AXES, PERCENT)]
    charts += [render(each, shared_x) for each in layer_charts(data, markers, RUN_AXES)]
    return with_controls(charts, RUN_AXES, lines.smoothing_note())


def with_controls(charts: Iterable[SafeHtml], axes: tuple[str, ...], note: str) -> SafeHtml:
    """Return charts below their common controls, which work by style sheets alone.

    Args:
        charts: The rendered charts.
        axes: The x axes to choose from.
        note: Text below the charts.
    """
    choices = []
    for i, axis in enumerate(axes):
        checked = " checked" if i == 0 else ""
        choices.append(f'<label><input type="radio" name="axis" value="{axis}"{checked}> {AXIS_NAMES[axis]}</label>')
    return SafeHtml(
        '<div class="curves"><div class="controls no-print">'
        f"<fieldset><legend>x axis</legend>{''.join(choices)}</fieldset>"
        '<label><input type="checkbox" class="smoothing" checked> smoothing</label></div>'
        f'<div class="charts">{"".join(charts)}</div>{markup.paragraph(note, "small muted")}</div>'
    )


def _clip_level(data: ReportData) -> list[Level]:
    """Return the norm to which larger gradients are clipped, if any came close to it."""
    clip = data.last.config.optimizer.clip
    norms = data.columns["grad_norm"]
    if clip and np.isfinite(norms).any() and np.nanmax(norms) > clip / 2:
        return [Level(clip, f"clipped to {clip:g}")]
    return []


def _mfu_note(data: ReportData) -> str:
    baselines = [call["mfu_of"] for call in data.last.calls if isinstance(call.get("mfu_of"), str)]
    return f"Peak: {baselines[-1]}." if baselines else ""
