"""Results of a task: metrics with confidence intervals, and a note on the method."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from slm_jax.evaluation.intervals import Estimate


@dataclass(frozen=True)
class Metric:
    """One metric of a task, over the whole data set or a part of it.

    Attributes:
        group: "all", or a part of the data set with the widest category first ("syntax / binding").
        name: The metric, for example "accuracy".
        estimate: The value with its confidence interval.
        count: Number of items (pairs, questions, documents …) that the value is computed from.
        reference: Published scores on the same data set and their sources; may be empty.
    """

    group: str
    name: str
    estimate: Estimate
    count: int
    reference: str = ""


class TaskResult(NamedTuple):
    """The metrics of a task.

    Attributes:
        metrics: One entry per group and metric.
        note: How the metrics were computed, in one sentence.
        origin: The origin of the data, if it is known only when the task is measured.
    """

    metrics: list[Metric]
    note: str
    origin: str = ""


def chance_of(reference: str) -> float | None:
    """Return the score of guessing that the references of a metric begin with (`chance 25 %`), from 0 to 1."""
    match = re.search(r"chance ([\d.]+) ?%", reference)
    return float(match[1]) / 100 if match else None
