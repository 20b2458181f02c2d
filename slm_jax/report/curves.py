"""The charts of one run, or of a curriculum with the boundaries of its stages."""

from collections.abc import Iterator

import numpy as np

from slm_jax.report import markup
from slm_jax.report.chart import Chart, Level, Line, Mark, Points, Tracks, render
from slm_jax.report.columns import AXES, Buckets, Columns, smoothed, smoothing_width
from slm_jax.report.facts import Subject
from slm_jax.report.scales import percent_tick
from slm_jax.web import Safe

POINTS = 500  # of a line; a wide screen shows no more of it
AXIS_NAMES = {"step": "steps", "tokens": "tokens", "seconds": "time", "flops": "FLOPs"}


def curves(subject: Subject, tracks: Tracks) -> Safe:
    """All charts with their common controls, or "" where there are no rows."""
    columns = subject.columns
    if not len(columns):
        return Safe("")
    buckets = Buckets.of(len(columns), POINTS)
    x = {axis: buckets.last(values) for axis, values in columns.x.items()}
    marks = [Mark(stage.columns.offsets, stage.stage) for stage in subject.stages] if subject.is_curriculum else []

    def line(field: str, name: str, smooth: bool = False, color: int = 0) -> Line:
        return make_line(columns[field], x, buckets, name, smooth, color)

    charts = [
        loss_chart(subject, line("loss", "training", smooth=True), marks),
        Chart(
            "Bits per byte",
            "of the text predicted",
            [
                make_line(columns.bits_per_byte, x, buckets, "training", True),
                *_validation(columns, "val_bits_per_byte"),
            ],
            marks,
        ),
        Chart(
            "Accuracy",
            "share of tokens guessed right",
            [line("accuracy", "training", smooth=True), *_validation(columns, "val_accuracy")],
            marks,
            log=False,
            zero=True,
            form=percent_tick,
            form_name="percent",
        ),
        Chart("Learning rate", "per step", [line("lr", "learning rate")], marks, zero=True),
        Chart(
            "Gradient norm", "before clipping", [line("grad_norm", "gradient norm", smooth=True)], marks, _clip(subject)
        ),
        Chart("Speed", "tokens per second", [line("tokens_per_second", "speed")], marks, log=False, zero=True),
        Chart(
            "Model FLOPs utilisation",
            "share of the peak",
            [line("mfu", "MFU")],
            marks,
            log=False,
            zero=True,
            form=percent_tick,
            form_name="percent",
            note=_mfu_note(subject),
        ),
    ]
    return with_controls((render(chart, tracks) for chart in charts), AXES, _smoothing_text(columns, buckets))


def with_controls(charts: Iterator[Safe], axes: tuple[str, ...], note: str) -> Safe:
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


def make_line(y: np.ndarray, x: Points, buckets: Buckets, name: str, smooth: bool = False, color: int = 0) -> Line:
    """[N] values as a line of few points: each row where there are few, else the mean of each stretch, with the least
    and the greatest as a band. Smoothing comes first and sees every row."""
    mean, low, high = buckets.reduced(y)
    soft = buckets.last(smoothed(y, smoothing_width(len(y)))) if smooth and len(y) >= 20 else None
    return Line(name, x, mean, None if buckets.whole else (low, high), soft, color=color)


def loss_chart(subject: Subject, training: Line, marks: list[Mark]) -> Chart:
    """Training and validation loss."""
    return Chart(
        "Loss", "nats per token", [training, *_validation(subject.columns, "val_loss")], marks, wide=True, zero=False
    )


def _validation(columns: Columns, field: str) -> Iterator[Line]:
    rows = columns.validated_at()
    if rows.size:
        x = {axis: values[rows] for axis, values in columns.x.items()}
        y = np.array([row[field] for row in columns.validations], np.float64)
        yield Line("validation", x, y, dots=True, color=1)


def _clip(subject: Subject) -> list[Level]:
    """The norm that larger gradients are scaled down to, where they ever came near it."""
    clip = subject.last.config.optimizer.clip
    norms = subject.columns["grad_norm"]
    reached = clip and np.isfinite(norms).any() and np.nanmax(norms) > clip / 2
    return [Level(clip, f"clipped to {clip:g}")] if reached else []


def _mfu_note(subject: Subject) -> str:
    said = [call["mfu_of"] for call in subject.last.calls if isinstance(call.get("mfu_of"), str)]
    return f"The peak is {said[-1]}." if said else ""


def _smoothing_text(columns: Columns, buckets: Buckets) -> str:
    count = len(columns)
    shown = "" if buckets.whole else f" Each point stands for {count / len(buckets.ends):.0f} steps or so: mean, "
    shown += "" if buckets.whole else "and from the least to the greatest as a band."
    smooth = f"Smoothed: the mean of the {smoothing_width(count)} steps around each." if count >= 20 else ""
    return smooth + shown
