"""The charts of the tasks that were scored during training, one for each task, with the score of guessing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from slm_jax.report.axes import format_percent
from slm_jax.report.charts import Chart, Level, Line, Marker
from slm_jax.report.columns import AXES, Columns, join_with_gaps
from slm_jax.run.metrics import Row, task_scores


def task_charts(
    stages: Sequence[Columns], markers: list[Marker], axes: tuple[str, ...], percent: dict[str, Any]
) -> list[Chart]:
    """Return the chart of each task: score, 95 % interval as a band, and chance as a level.

    Args:
        stages: The metrics of the stages, each with at least one row.
        markers: The starts of the stages.
        axes: The x axes.
        percent: Options of charts whose values are fractions.
    """
    scored = [columns for columns in stages if columns.tasks]
    names = dict.fromkeys(name for columns in scored for row in columns.tasks for name in task_scores(row))
    if not names:
        return []
    x = {
        axis: join_with_gaps([columns.x[axis][columns.indices(columns.tasks)] for columns in scored], repeat=True)
        for axis in AXES
    }

    def values(key: str) -> np.ndarray:
        return join_with_gaps([np.array([row.get(key) for row in each.tasks], np.float64) for each in scored])

    charts = []
    for name in names:
        key = f"task_{name}"
        band = (values(f"{key}/low"), values(f"{key}/high"))
        line = Line(name, x, values(key), band, dots=True, color=1)
        chance = _newest([row for columns in scored for row in columns.tasks], f"{key}/chance")
        levels = [] if chance is None else [Level(chance, f"chance {format_percent(chance)}")]
        title = f"Task {name}"
        charts.append(Chart(title, "score", [line], markers, levels, axes=axes, **percent))
    return charts


def _newest(rows: Sequence[Row], key: str) -> float | None:
    """Return the newest value of a field; None without any."""
    return next((row[key] for row in reversed(rows) if isinstance(row.get(key), int | float)), None)
