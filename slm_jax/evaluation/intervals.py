"""Confidence intervals of 95 %: exact for a share of independent items, by the bootstrap for everything else."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
_AT_ONCE = 1 << 22  # resampled counts alive at a time
_POISSON_FROM = 10_000  # items from which on a resample's counts are drawn one by one, which is as good and faster


class Estimate(NamedTuple):
    """A figure and its interval; low and high are None where one item alone tells nothing of the spread."""

    value: float
    low: float | None
    high: float | None


def binomial(hits: int, count: int) -> Estimate:
    """The share of hits with its exact interval (Clopper & Pearson 1934). Raises ValueError if count is 0."""
    from scipy.special import betaincinv

    if not 0 <= hits <= count or count == 0:
        raise ValueError(f"{hits} hits of {count}")
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(hits, count - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, count - hits, 1 - tail)) if hits < count else 1.0
    return Estimate(hits / count, low, high)


def bootstrap(
    sums_NxK: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """A figure of the summed columns of N items, with the percentile interval over resamples of the items.

    sums: what each item adds, such as its nats and its bytes. figure: of sums [..., K] the figures [...], such as a
    ratio of two columns. Items are resampled whole, so that what depends on each other within one stays together
    (Efron & Tibshirani 1993, ch. 13). The same seed gives the same interval.
    """
    sums_NxK = np.asarray(sums_NxK, np.float64)
    n = len(sums_NxK)
    value = float(figure(sums_NxK.sum(0)))
    if n < 2:
        return Estimate(value, None, None)
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    rows = max(1, _AT_ONCE // n)
    for start in range(0, resamples, rows):
        counts_RxN = _resample(rng, min(rows, resamples - start), n)
        found.append(np.asarray(figure(counts_RxN @ sums_NxK)))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(found), [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def _resample(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """float64 [rows, n]: how often each of n items is drawn."""
    if n >= _POISSON_FROM:  # Poisson bootstrap (Chamandy et al. 2012): each item's count on its own
        return rng.poisson(1.0, (rows, n)).astype(np.float64)
    drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
