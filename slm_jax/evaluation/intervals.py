"""95 % confidence intervals: exact for a proportion of independent items, by the bootstrap for everything else."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
_MAX_COUNTS = 1 << 22  # resampled counts in memory at a time
_POISSON_MIN_ITEMS = 10_000  # from here on the counts of a resample are drawn independently: as accurate, and faster


class Estimate(NamedTuple):
    """A value and its confidence interval; `low` and `high` are None if there is only one item to resample."""

    value: float
    low: float | None
    high: float | None


def binomial_interval(hits: int, count: int) -> Estimate:
    """Return the proportion of hits with its exact interval (Clopper & Pearson 1934).

    Raises:
        ValueError: `count` is 0, or `hits` is not between 0 and `count`.
    """
    from scipy.special import betaincinv

    if not 0 <= hits <= count or count == 0:
        raise ValueError(f"{hits} hits of {count}")
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(hits, count - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, count - hits, 1 - tail)) if hits < count else 1.0
    return Estimate(hits / count, low, high)


def bootstrap_interval(
    sums_NxK: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Return a statistic of column sums over N items, with its percentile bootstrap interval.

    Items are resampled as units, so that dependent observations within an item stay together (Efron & Tibshirani 1993,
    chapter 13).

    Args:
        sums_NxK: Contribution of each item to K sums, for example its nats and its bytes.
        statistic: Maps column sums [..., K] to values [...], for example the ratio of two columns.
        seed: Seed of the resampling; the same seed gives the same interval.
        resamples: Number of bootstrap resamples.
    """
    sums_NxK = np.asarray(sums_NxK, np.float64)
    n = len(sums_NxK)
    value = float(statistic(sums_NxK.sum(0)))
    if n < 2:
        return Estimate(value, None, None)
    rng = np.random.default_rng(seed)
    values: list[np.ndarray] = []
    step = max(1, _MAX_COUNTS // n)
    for start in range(0, resamples, step):
        counts_RxN = _resample_counts(rng, min(step, resamples - start), n)
        values.append(np.asarray(statistic(counts_RxN @ sums_NxK)))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(values), [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def centered_mean_interval(
    counts: Sequence[tuple[int, int, float]], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Return the mean of centered accuracies, (accuracy - b) / (1 - b), with its percentile bootstrap interval.

    The items of each group are resampled, the groups are not: with items that are right or wrong, the number of right
    ones in a resample is binomial.

    Args:
        counts: For each group the number of right items, the number of items, and the accuracy b of guessing.
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.
    """
    hits, sizes, baselines = (np.array(column, np.float64) for column in zip(*counts, strict=True))

    def mean(accuracies: np.ndarray) -> np.ndarray:
        return ((accuracies - baselines) / (1 - baselines)).mean(-1)

    rng = np.random.default_rng(seed)
    drawn = rng.binomial(sizes.astype(np.int64), hits / sizes, (resamples, sizes.size))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(mean(drawn / sizes), [tail, 100 - tail])
    return Estimate(float(mean(hits / sizes)), float(low), float(high))


def _resample_counts(rng: np.random.Generator, resamples: int, n: int) -> np.ndarray:
    """Return how often each of n items is drawn in each resample, float64 [resamples, n]."""
    if n >= _POISSON_MIN_ITEMS:  # Poisson bootstrap (Chamandy et al. 2012): the counts of the items are independent
        return rng.poisson(1.0, (resamples, n)).astype(np.float64)
    # One bincount for all resamples: the draws of resample r are offset by r * n.
    drawn = rng.integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)
