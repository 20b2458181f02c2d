"""Sizes to add to a study where a budget has no minimum between the sizes that it has."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from slm_jax.report.axes import format_compact
from slm_jax.scaling.isoflop import IsoFlopFit
from slm_jax.scaling.points import Points

_MAX_STEP = math.log(4)  # a parabola is not trusted farther beyond the sizes that it was fitted to


@dataclass(frozen=True)
class MissingSizes:
    """The side of a budget's sizes on which its minimum is.

    Attributes:
        budget: FLOPs.
        edge: The size at that end, in parameters.
        is_smaller: Smaller models are better, otherwise larger ones.
        sizes: Two sizes to add, the second beyond the minimum of the parabola if it has one.
    """

    budget: float
    edge: float
    is_smaller: bool
    sizes: tuple[float, float]


def missing_sizes(points: Points, coefficients: np.ndarray) -> MissingSizes:
    """Return the sizes that a budget without a minimum lacks.

    Args:
        points: The runs of the budget.
        coefficients: Their parabola over log N, highest power first.
    """
    log_n = np.unique(np.log(points.parameters))
    low, high = float(log_n[0]), float(log_n[-1])
    is_smaller = bool(np.polyval(coefficients, low) < np.polyval(coefficients, high))
    edge, sign = (low, -1.0) if is_smaller else (high, 1.0)
    spacing = (high - low) / (len(log_n) - 1)
    distance = 0.0
    if coefficients[0] > 0:
        distance = max(0.0, sign * (-coefficients[1] / (2 * coefficients[0]) - edge))
    step = (min(distance, _MAX_STEP) + spacing) / 2
    first, second = (float(f"{math.exp(edge + sign * count * step):.2g}") for count in (1, 2))
    return MissingSizes(float(points.budgets[0]), math.exp(edge), is_smaller, (first, second))


def notes_of_missing(points: Points, fit: IsoFlopFit, can_train: Callable[[float, float], bool]) -> Iterator[str]:
    """Yield what to add for each budget without a minimum, one sentence each.

    Args:
        points: All runs.
        fit: Their fit.
        can_train: Returns whether there is a run of a budget and a size.
    """
    for budget in fit.outside:
        missing = missing_sizes(points.of_budget(budget), fit.parabolas[budget])
        side, other = ("smallest", "larger") if missing.is_smaller else ("largest", "smaller")
        possible = [format_compact(size) for size in missing.sizes if can_train(budget, size)]
        remedy = f"add --sizes {' '.join(possible)}"
        if not possible:
            wanted = " and ".join(format_compact(size) for size in missing.sizes)
            remedy = f"there are no runs of {wanted} parameters with these options: add {other} --budgets"
        yield (
            f"At {budget:.3g} FLOPs the loss still falls toward the {side} size, {format_compact(missing.edge)}: this "
            f"budget is left out of the power laws; {remedy}."
        )
