"""The loss as a function of parameters and tokens, L(N, D) = E + A / N^alpha + B / D^beta.

Approach 3 of Hoffmann et al. (arXiv:2203.15556): the Huber loss of the differences of log L, with the sum written as a
log-sum-exp of log E, log A and log B. As in the replication by Besiroglu et al. (arXiv:2404.10102), the Huber losses
are summed, the minimization runs to its end (with the mean, the published one stopped early), values are not rounded,
and intervals come from a bootstrap.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize, nnls

from slm_jax.scaling.points import Points, resampled_residuals

HUBER_DELTA = 1e-3
NUM_FITTED = 5
_EXPONENTS = (0.15, 0.3, 0.6, 1.0)  # starting values of alpha and beta
_MAX_EXPONENT = 3.0
_SMALLEST = 1e-6  # share of the loss that a term of a starting value has at least
_RESTARTS = 2  # of the quasi-Newton method, whose memory misleads it at a kink
_STARTS = 4  # most promising starting values that are refined


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        irreducible: E, the loss of an infinite model and text.
        a: A, with N in parameters.
        b: B, with D in tokens.
        alpha: Exponent of N.
        beta: Exponent of D.
    """

    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Return the loss of models of N parameters trained on D tokens, floats or arrays."""
        return self.irreducible + self.a * parameters**-self.alpha + self.b * tokens**-self.beta

    @property
    def size_exponent(self) -> float:
        """Exponent of the best N over FLOPs, where FLOPs are proportional to N times D."""
        return self.beta / (self.alpha + self.beta)


@dataclass(frozen=True)
class LawFit:
    """A law with the spread of its estimate.

    Attributes:
        law: The fitted law.
        resampled: Laws fitted to resampled losses; empty where the runs are too few for intervals.
        residuals: Resampled deviations of the logarithm of one run's loss, one for each law, [R].
    """

    law: Law
    resampled: tuple[Law, ...]
    residuals: np.ndarray

    def undetermined(self) -> Iterator[tuple[str, float]]:
        """Yield the exponents that have ended at a bound of the fit: the runs do not determine them."""
        for name in ("alpha", "beta"):
            exponent = getattr(self.law, name)
            if not 0.01 < exponent < 0.99 * _MAX_EXPONENT:
                yield name, exponent

    def predicted(self, parameters: float, tokens: float) -> np.ndarray:
        """Return losses of one new run that are compatible with the points, float64 [R]."""
        means = np.array([law.loss(parameters, tokens) for law in self.resampled], np.float64)
        return means * np.exp(self.residuals)


class _Problem:
    """The least-squares problem of one set of points; N and D are relative to their geometric means."""

    def __init__(self, parameters: np.ndarray, tokens: np.ndarray):
        self.log_n, self.log_d = np.log(parameters), np.log(tokens)
        self.mean_n, self.mean_d = self.log_n.mean(), self.log_d.mean()
        self.x = self.log_n - self.mean_n
        self.y = self.log_d - self.mean_d

    def terms(self, values: np.ndarray) -> np.ndarray:
        """Return the logarithms of the three terms, [3, P], for (log E, log A', log B', alpha, beta)."""
        e, a, b, alpha, beta = values
        return np.stack([np.full_like(self.x, e), a - alpha * self.x, b - beta * self.y])

    def minimize(self, log_losses: np.ndarray, starts: list[np.ndarray]) -> np.ndarray:
        """Return the values with the lowest sum of Huber losses."""

        def residuals(values: np.ndarray) -> np.ndarray:
            return np.logaddexp.reduce(self.terms(values)) - log_losses

        def jacobian(values: np.ndarray) -> np.ndarray:
            terms = self.terms(values)
            e, a, b = np.exp(terms - np.logaddexp.reduce(terms))
            return np.stack([e, a, b, -a * self.x, -b * self.y], axis=1)

        def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
            errors = residuals(values)
            clipped = np.clip(errors, -HUBER_DELTA, HUBER_DELTA)
            total = np.sum(clipped * (errors - clipped / 2)) / HUBER_DELTA
            return float(total), jacobian(values).T @ clipped / HUBER_DELTA

        # Least squares come close from anywhere. Nearly all residuals are larger than delta, where the Huber loss has
        # no curvature, so that a quasi-Newton method finishes.
        low = np.array([np.log(_SMALLEST) + log_losses.min(), -np.inf, -np.inf, 0.0, 0.0])
        high = np.array([*[np.inf] * 3, _MAX_EXPONENT, _MAX_EXPONENT])
        starts = [np.clip(start, low, high) for start in starts]
        squares = [
            least_squares(residuals, start, jacobian, (low, high), x_scale="jac", max_nfev=30).x for start in starts
        ]
        best = min([*squares, *starts], key=lambda values: objective(values)[0])
        for _ in range(_RESTARTS):
            found = minimize(
                objective,
                best,
                jac=True,
                method="L-BFGS-B",
                bounds=list(zip(low, high, strict=True)),
                options={"maxiter": 300, "ftol": 1e-10, "gtol": 1e-7},
            )
            best = min(found.x, best, key=lambda values: objective(values)[0])
        return best

    def starts(self, losses: np.ndarray) -> list[np.ndarray]:
        """Return starting values: for some exponents, the non-negative terms of least squares."""
        found = []
        for alpha, beta in itertools.product(_EXPONENTS, _EXPONENTS):
            columns = np.stack([np.ones_like(self.x), np.exp(-alpha * self.x), np.exp(-beta * self.y)], axis=1)
            terms, error = nnls(columns / losses[:, None], np.ones_like(losses))
            terms = np.maximum(terms, 2 * _SMALLEST * losses.mean())
            found.append((error, np.array([*np.log(terms), alpha, beta])))
        found.sort(key=lambda pair: pair[0])
        return [values for _, values in found[:_STARTS]]

    def law(self, values: np.ndarray) -> Law:
        """Return the law of fitted values."""
        e, a, b, alpha, beta = map(float, values)
        a, b = a + alpha * float(self.mean_n), b + beta * float(self.mean_d)
        return Law(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, beta)


def fit_law(points: Points, draws: int = 0, seed: int = 0) -> LawFit:
    """Fit the law to runs.

    Args:
        points: The runs, with more settings than the law has values.
        draws: Bootstrap samples for intervals.
        seed: Seed of the bootstrap.
    """
    problem = _Problem(points.parameters, points.tokens)
    log_losses = np.log(points.losses)
    best = problem.minimize(log_losses, problem.starts(points.losses))
    fitted = np.logaddexp.reduce(problem.terms(best))
    source = np.random.default_rng(seed)
    drawn = resampled_residuals(log_losses - fitted, points.settings, NUM_FITTED, draws + 1, source)
    if drawn is None or not draws:
        return LawFit(problem.law(best), (), np.empty(0))
    laws = [problem.law(problem.minimize(fitted + residuals, [best])) for residuals in drawn[:-1]]
    return LawFit(problem.law(best), tuple(laws), source.choice(drawn.ravel(), len(laws)))
