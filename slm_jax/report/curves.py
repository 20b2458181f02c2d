"""The charts of one run, or of a curriculum with the boundaries of its stages."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from slm_jax.report import markup
from slm_jax.report.axes import percent_tick
from slm_jax.report.charts import Chart, Level, Line, Mark, Points, Tracks, render
from slm_jax.report.columns import AXES, Buckets, Columns, smoothed, smoothing_width, with_gaps
from slm_jax.report.escape import Safe
from slm_jax.report.layers import layer_charts
from slm_jax.report.run_data import Subject

POINTS = 500  # of a line; a wide screen shows no more of it
AXIS_NAMES = {"step": "steps", "tokens": "tokens", "seconds": "time", "flops": "FLOPs"}
SHOWN = AXES[:3]

Values = Callable[[Columns], np.ndarray]
"""A figure of each row, [N]."""


class Stretches:
    """The rows of each stage as few points, with a gap between one stage and the next: nothing is averaged or drawn
    across it."""

    def __init__(self, subject: Subject, points: int):
        """points: of all stages together, about."""
        self.stages = [stage.columns for stage in subject.stages if len(stage.columns)]
        rows = sum(map(len, self.stages))
        self.buckets = [Buckets.of(len(each), max(2, points * len(each) // rows)) for each in self.stages]
        self.whole = all(each.whole for each in self.buckets)
        self.x = {axis: self._joined([columns.x[axis] for columns in self.stages]) for axis in AXES}
        self._validated: Points | None = None

    def _joined(self, values: list[np.ndarray]) -> np.ndarray:
        return with_gaps([buckets.last(each) for buckets, each in zip(self.buckets, values, strict=True)], repeat=True)

    def line(self, values: str | Values, name: str, smooth: bool = False, color: int = 0, band: bool = True) -> Line:
        """Each row where there are few, else the mean of each stretch, with the least and the greatest as a band.
        Smoothing comes first and sees every row."""
        y = [columns[values] if isinstance(values, str) else values(columns) for columns in self.stages]
        reduced = [buckets.reduced(each) for buckets, each in zip(self.buckets, y, strict=True)]
        mean, low, high = (with_gaps([each[i] for each in reduced]) for i in range(3))
        soft = None
        if smooth and sum(map(len, y)) >= 20:
            parts = [smoothed(each, smoothing_width(len(each))) for each in y]
            soft = with_gaps([buckets.last(each) for buckets, each in zip(self.buckets, parts, strict=True)])
        return Line(name, self.x, mean, None if self.whole or not band else (low, high), soft, color=color)

    def validation(self, field: str, name: str = "validation", color: int = 1) -> Iterator[Line]:
        """The line of a validation score, if there is any."""
        stages = [columns for columns in self.stages if columns.validations]
        if not stages:
            return
        if self._validated is None:
            x = {axis: [columns.x[axis][columns.validated_at()] for columns in stages] for axis in AXES}
            self._validated = {axis: with_gaps(parts, repeat=True) for axis, parts in x.items()}
        y = with_gaps([np.array([row[field] for row in columns.validations], np.float64) for columns in stages])
        yield Line(name, self._validated, y, dots=True, color=color)

    def smoothing_text(self) -> str:
        """What the lines are, in words."""
        rows = [len(columns) for columns in self.stages]
        widths = sorted({smoothing_width(count) for count in rows})
        smooth = (
            f"Smoothed: the mean of the {' or '.join(map(str, widths))} steps around each." if sum(rows) >= 20 else ""
        )
        each = sum(rows) / sum(len(buckets.ends) for buckets in self.buckets)
        shown = f" A point stands for about {each:.0f} steps: their mean, and a band from the least to the greatest."
        return smooth + shown * (not self.whole)


def curves(subject: Subject, tracks: Tracks) -> Safe:
    """All charts with their common controls, or "" where there are no rows."""
    if not len(subject.columns):
        return Safe("")
    stretches = Stretches(subject, POINTS)
    line, validation = stretches.line, stretches.validation
    marks = [Mark(stage.columns.offsets, stage.stage) for stage in subject.stages] if subject.is_curriculum else []

    def make(title: str, unit: str, *lines: Line, **more: Any) -> Safe:
        return render(Chart(title, unit, list(lines), marks, axes=SHOWN, **more), tracks)

    bits = line(lambda columns: columns.bits_per_byte, "training", True)
    charts = [
        make("Loss", "nats per token", line("loss", "training", True), *validation("val_loss"), wide=True),
        make("Bits per byte", "of the text predicted", bits, *validation("val_bits_per_byte")),
        make(
            "Accuracy", "tokens guessed right", line("accuracy", "training", True), *validation("val_accuracy"), **SHARE
        ),
        make("Learning rate", "per step", line("lr", "learning rate"), zero=True),
        make("Gradient norm", "before clipping", line("grad_norm", "gradient norm", True), levels=_clip(subject)),
        make("Speed", "tokens per second", line("tokens_per_second", "speed"), log=False, zero=True),
        make("Model FLOPs utilisation", "of the peak", line("mfu", "MFU"), note=_mfu_note(subject), **SHARE),
    ]
    charts += [render(chart, tracks) for chart in layer_charts(subject, marks, SHOWN)]
    return with_controls(charts, SHOWN, stretches.smoothing_text())


SHARE: dict[str, Any] = {"log": False, "zero": True, "form": percent_tick, "form_name": "percent"}


def with_controls(charts: Iterable[Safe], axes: tuple[str, ...], note: str) -> Safe:
    """Charts under the controls that hold for all of them. They are style sheets' work and need no script."""
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{axis}"{" checked" * (i == 0)}> {AXIS_NAMES[axis]}</label>'
        for i, axis in enumerate(axes)
    )
    return Safe(
        f'<div class="curves"><div class="controls no-print"><fieldset><legend>over</legend>{choices}</fieldset>'
        '<label><input type="checkbox" class="smoothing" checked> smoothed</label></div>'
        f'<div class="charts">{"".join(charts)}</div>{markup.paragraph(note, "small muted")}</div>'
    )


def _clip(subject: Subject) -> list[Level]:
    """The norm that larger gradients are scaled down to, where they ever came near it."""
    clip = subject.last.config.optimizer.clip
    norms = subject.columns["grad_norm"]
    reached = clip and np.isfinite(norms).any() and np.nanmax(norms) > clip / 2
    return [Level(clip, f"clipped to {clip:g}")] if reached else []


def _mfu_note(subject: Subject) -> str:
    said = [call["mfu_of"] for call in subject.last.calls if isinstance(call.get("mfu_of"), str)]
    return f"The peak is {said[-1]}." if said else ""
