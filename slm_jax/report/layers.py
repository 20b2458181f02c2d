"""The norms of each layer through training (layers.jsonl), where `log.layers` asked for them."""

import math
from typing import Any

import numpy as np

from slm_jax.report.charts import Chart, Line, Mark
from slm_jax.report.columns import AXES, with_gaps
from slm_jax.report.run_data import Facts, Subject
from slm_jax.run.metrics import Row, iter_rows

ROWS = 500  # of a chart; of more, every so many
LAYERS = 10  # lines of a chart; of a deeper model those are drawn that lie evenly between the first and the last
QUANTITIES = {
    "grad_norm": ("Gradient norm of each layer", "before clipping"),
    "param_norm": ("Weights of each layer", "Euclidean norm"),
    "update_ratio": ("Update of each layer", "norm of a step's change by that of the weights"),
}


def read_layers(facts: Facts) -> list[Row]:
    """The rows of layers.jsonl of steps that have a row of metrics too."""
    if not len(facts.columns):
        return []
    rows = [row for _, row in iter_rows(facts.run.layers, skip_damaged=True) if row["step"] <= facts.step]
    return rows[:: -(-len(rows) // ROWS) or 1]


def layer_charts(subject: Subject, marks: list[Mark], axes: tuple[str, ...]) -> list[Chart]:
    """A chart for each quantity, a line for each layer; none without the file."""
    stages = [(facts, rows) for facts in subject.stages if (rows := read_layers(facts))]
    if not stages:
        return []
    places = [np.searchsorted(facts.columns["step"], [row["step"] for row in rows]) for facts, rows in stages]
    x = {
        axis: with_gaps([facts.columns.x[axis][at] for (facts, _), at in zip(stages, places, strict=True)], repeat=True)
        for axis in AXES
    }
    charts = []
    for quantity, (title, unit) in QUANTITIES.items():
        found = list(stages[-1][1][-1].get(quantity) or {})
        names = [found[round(i)] for i in np.linspace(0, len(found) - 1, min(len(found), LAYERS))]
        lines = []
        for color, name in enumerate(names):
            y = with_gaps([np.array([_value(row, quantity, name) for row in rows]) for _, rows in stages])
            lines.append(Line(name, x, y, color=color))
        if lines:
            left = len(found) - len(names)
            note = f"{left} more layers are in layers.jsonl." if left else ""
            charts.append(Chart(title, unit, lines, marks, axes=axes, note=note))
    return charts


def _value(row: dict[str, Any], quantity: str, name: str) -> float:
    value = (row.get(quantity) or {}).get(name)
    return float(value) if isinstance(value, int | float) else math.nan
