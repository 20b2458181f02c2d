"""Charts of the norms of each layer during training, from layers.jsonl (option `log.layers`)."""

import math

import numpy as np

from slm_jax.report.charts import Chart, Line, Marker
from slm_jax.report.columns import AXES, join_with_gaps
from slm_jax.report.run_data import ReportData, RunData
from slm_jax.run.metrics import Row, iter_rows

_MAX_ROWS = 500  # per stage; of more, evenly spaced ones are drawn
_MAX_LAYERS = 10  # lines per chart; of a deeper model, evenly spaced layers are drawn
_QUANTITIES = {
    "grad_norm": ("Gradient norm by layer", "before clipping"),
    "param_norm": ("Weight norm by layer", "Euclidean"),
    "update_ratio": ("Relative update by layer", "norm of a step's update / norm of the weights"),
}


def read_layer_rows(run_data: RunData) -> list[Row]:
    """Read the rows of layers.jsonl up to the last step with metrics; damaged lines are ignored."""
    if not len(run_data.columns):
        return []
    rows = [row for _, row in iter_rows(run_data.run.layers, quiet=True) if row["step"] <= run_data.step]
    return rows[:: -(-len(rows) // _MAX_ROWS) or 1]


def layer_charts(data: ReportData, markers: list[Marker], axes: tuple[str, ...]) -> list[Chart]:
    """Return a chart per quantity with a line per layer; none if there is no layers.jsonl.

    Args:
        data: The run or curriculum.
        markers: Starts of the stages.
        axes: The x axes to offer.
    """
    stages = [(stage, rows) for stage in data.stages if (rows := read_layer_rows(stage))]
    if not stages:
        return []
    # For each row, the index of its step among the metrics, which have its position on each axis.
    indices = [np.searchsorted(stage.columns["step"], [row["step"] for row in rows]) for stage, rows in stages]
    x = {
        axis: join_with_gaps(
            [stage.columns.x[axis][index] for (stage, _), index in zip(stages, indices, strict=True)], repeat=True
        )
        for axis in AXES
    }
    newest = stages[-1][1][-1]
    charts = []
    for quantity, (title, unit) in _QUANTITIES.items():
        layers = list(newest.get(quantity) or {})
        drawn = [layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(len(layers), _MAX_LAYERS))]
        lines = []
        for color, layer in enumerate(drawn):
            y = join_with_gaps([np.array([_value(row, quantity, layer) for row in rows]) for _, rows in stages])
            lines.append(Line(layer, x, y, color=color))
        if lines:
            omitted = len(layers) - len(drawn)
            note = f"{omitted} more layers are in layers.jsonl." if omitted else ""
            charts.append(Chart(title, unit, lines, markers, axes=axes, note=note))
    return charts


def _value(row: Row, quantity: str, layer: str) -> float:
    value = (row.get(quantity) or {}).get(layer)
    return float(value) if isinstance(value, int | float) else math.nan
