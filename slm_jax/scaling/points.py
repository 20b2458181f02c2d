"""The finished runs of a study as arrays, and the resampling of their deviations from a fit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Points:
    """One entry for each finished run, P in all.

    Attributes:
        budgets: FLOPs that the run was planned for, float64 [P].
        parameters: Parameters of the model, N, float64 [P].
        tokens: Predicted tokens, D, float64 [P].
        flops: Model FLOPs of the run, float64 [P].
        losses: Loss of held-out text, in the unit of the metric, float64 [P].
        settings: Number of the setting (budget and size), the same for all seeds, int [P].
    """

    budgets: np.ndarray
    parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    losses: np.ndarray
    settings: np.ndarray

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def num_settings(self) -> int:
        """Number of different settings."""
        return len(np.unique(self.settings))

    def of_budget(self, budget: float) -> "Points":
        """Return the points of one budget."""
        return self.of_budgets([budget])

    def of_budgets(self, budgets: Sequence[float]) -> "Points":
        """Return the points of some budgets."""
        chosen = np.isin(self.budgets, budgets)
        return Points(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def resampled_residuals(
    residuals: np.ndarray, settings: np.ndarray, fitted: int, draws: int, source: np.random.Generator
) -> np.ndarray | None:
    """Draw residuals for every run: those of another setting (block bootstrap), centered and scaled up.

    The seeds of a setting share its deviation from the law, so that a whole setting is drawn first, then seeds of it.
    Residuals of a fit are smaller than the errors, by the square root of the free degrees over all.

    Args:
        residuals: Deviations of the runs from a fit, [P].
        settings: Number of the setting of each run, int [P].
        fitted: Number of fitted values.
        draws: Number of draws, R.
        source: Random numbers.

    Returns:
        [R, P]; None where the fit leaves no degree of freedom, so that residuals tell nothing about errors.
    """
    labels, group_of_run, counts = np.unique(settings, return_inverse=True, return_counts=True)
    count = len(labels) if len(labels) > fitted else len(residuals)
    if count <= fitted:
        return None
    scaled = (residuals - residuals.mean()) * np.sqrt(count / (count - fitted))
    by_setting = np.zeros((len(labels), counts.max()))
    for group in range(len(labels)):
        by_setting[group, : counts[group]] = scaled[group_of_run == group]
    drawn = source.integers(len(labels), size=(draws, len(labels)))[:, group_of_run]
    seed = (source.random(drawn.shape) * counts[drawn]).astype(int)
    return by_setting[drawn, seed]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the interval that holds the middle 95 % of the finite values; NaN without two of them."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return np.nan, np.nan
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
