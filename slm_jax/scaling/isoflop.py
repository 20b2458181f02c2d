"""The best size for a budget from runs at equal FLOPs, and power laws of the best sizes.

Approach 2 of Hoffmann et al. (arXiv:2203.15556): at each budget a parabola is fitted to the loss over log N; its
minimum is the best size N*. The best number of tokens D* is interpolated between the runs of the budget, whose FLOPs
per token are exact. Power laws N*(C) and D*(C) are lines through the logarithms.
"""

from dataclasses import dataclass

import numpy as np

from slm_jax.scaling.points import Points, resampled_residuals

_FITTED_PER_BUDGET = 3


@dataclass(frozen=True)
class Optimum:
    """The best size at one budget.

    Attributes:
        budget: FLOPs that were asked for.
        flops: FLOPs of its runs, on average.
        parameters: N*.
        tokens: D*.
        loss: The loss at N*.
    """

    budget: float
    flops: float
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class PowerLaw:
    """A power of a budget: `coefficient * budget ** exponent`."""

    coefficient: float
    exponent: float

    def at(self, budget: float) -> float:
        """Return the value at a budget in FLOPs."""
        return self.coefficient * budget**self.exponent

    @classmethod
    def fit(cls, budgets: np.ndarray, values: np.ndarray) -> "PowerLaw":
        """Fit a line through the logarithms of two or more values."""
        exponent, intercept = np.polyfit(np.log(budgets), np.log(values), 1)
        return cls(float(np.exp(intercept)), float(exponent))


@dataclass(frozen=True)
class IsoFlopFit:
    """Best sizes of all budgets and their power laws.

    Attributes:
        optima: One for each budget that has a minimum between its smallest and its largest size.
        outside: Budgets without one.
        parabolas: Coefficients of the loss over log N, highest power first, by budget.
        size: Power law of N*; None with less than two optima.
        tokens: Power law of D*.
        resampled: The optima of resampled losses, by budget; those without a minimum are missing.
        resampled_laws: The two power laws of resampled losses.
        failed: Share of the resampled losses in which not all of the budgets of `optima` have a minimum.
    """

    optima: tuple[Optimum, ...]
    outside: tuple[float, ...]
    parabolas: dict[float, np.ndarray]
    size: PowerLaw | None
    tokens: PowerLaw | None
    resampled: dict[float, list[Optimum]]
    resampled_laws: list[tuple[PowerLaw, PowerLaw]]
    failed: float


def parabola(log_n: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the parabola of least squares, three coefficients with the highest power first."""
    center = log_n.mean()
    a, b, c = np.polyfit(log_n - center, losses, 2)
    return np.array([a, b - 2 * a * center, c - b * center + a * center**2])


def optimum(points: Points, coefficients: np.ndarray) -> Optimum | None:
    """Return the minimum of a budget's parabola; None if it is not between the smallest and the largest size.

    Args:
        points: The runs of one budget.
        coefficients: Its parabola over log N.
    """
    log_n = np.log(points.parameters)
    if coefficients[0] <= 0:
        return None
    best = -coefficients[1] / (2 * coefficients[0])
    if not log_n.min() < best < log_n.max():
        return None
    order = np.argsort(log_n, kind="stable")
    log_d = np.interp(best, log_n[order], np.log(points.tokens)[order])
    loss = float(np.polyval(coefficients, best))
    return Optimum(
        float(points.budgets[0]), float(np.mean(points.flops)), float(np.exp(best)), float(np.exp(log_d)), loss
    )


def fit_isoflop(points: Points, draws: int = 0, seed: int = 0) -> IsoFlopFit:
    """Fit parabolas and power laws.

    Args:
        points: The runs; each budget has three sizes or more.
        draws: Bootstrap samples for intervals.
        seed: Seed of the bootstrap.
    """
    groups = {float(budget): points.of_budget(budget) for budget in np.unique(points.budgets)}
    parabolas = {budget: parabola(np.log(group.parameters), group.losses) for budget, group in groups.items()}
    found = {budget: optimum(group, parabolas[budget]) for budget, group in groups.items()}
    optima = {budget: each for budget, each in found.items() if each is not None}
    size, tokens = _power_laws(list(optima.values())) or (None, None)
    resampled: dict[float, list[Optimum]] = {budget: [] for budget in optima}
    laws = []
    fitted = {budget: np.polyval(parabolas[budget], np.log(group.parameters)) for budget, group in groups.items()}
    residuals = np.concatenate([groups[budget].losses - fitted[budget] for budget in groups])
    settings = np.concatenate([group.settings for group in groups.values()])
    drawn = resampled_residuals(
        residuals, settings, _FITTED_PER_BUDGET * len(groups), draws, np.random.default_rng(seed)
    )
    ends = np.cumsum([len(group) for group in groups.values()])[:-1]
    for draw in [] if drawn is None else drawn:
        parts = dict(zip(groups, np.split(draw, ends), strict=True))
        sample = []
        for budget in optima:
            group = groups[budget]
            each = optimum(group, parabola(np.log(group.parameters), fitted[budget] + parts[budget]))
            if each is not None:
                resampled[budget].append(each)
                sample.append(each)
        if len(sample) == len(optima) and (both := _power_laws(sample)):
            laws.append(both)
    possible = 0 if drawn is None or size is None else draws
    failed = 1 - len(laws) / possible if possible else 0.0
    outside = tuple(budget for budget in groups if budget not in optima)
    return IsoFlopFit(tuple(optima.values()), outside, parabolas, size, tokens, resampled, laws, failed)


def _power_laws(optima: list[Optimum]) -> tuple[PowerLaw, PowerLaw] | None:
    """Return the power laws of the sizes and of the tokens; None with less than two budgets."""
    if len(optima) < 2:
        return None
    budgets = np.array([each.flops for each in optima])
    sizes = np.array([each.parameters for each in optima])
    return PowerLaw.fit(budgets, sizes), PowerLaw.fit(budgets, np.array([each.tokens for each in optima]))
