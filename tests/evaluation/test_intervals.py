"""Intervals against tables, against the binomial distribution added up, and against what they promise."""

from math import comb

import numpy as np
import pytest

from slm_jax.evaluation import intervals
from slm_jax.evaluation.intervals import binomial, bootstrap


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def test_binomial_intervals_are_those_of_the_table():
    # Clopper & Pearson's own chart; the figures as in every table of exact 95 % limits.
    assert binomial(5, 10) == pytest.approx((0.5, 0.1871, 0.8129), abs=5e-5)
    assert binomial(1, 20) == pytest.approx((0.05, 0.0013, 0.2487), abs=5e-5)
    assert binomial(0, 10) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 10)))
    assert binomial(10, 10) == pytest.approx((1.0, 0.025 ** (1 / 10), 1.0))


@pytest.mark.parametrize(("hits", "count"), [(1, 7), (13, 40), (199, 200), (60, 120)])
def test_binomial_limits_leave_two_and_a_half_percent_on_each_side(hits, count):
    def at_least(k, p):
        return sum(comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k, count + 1))

    _, low, high = binomial(hits, count)
    assert at_least(hits, low) == pytest.approx(0.025, rel=1e-9)
    assert 1 - at_least(hits + 1, high) == pytest.approx(0.025, rel=1e-9)


def test_binomial_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 hits of 0"):
        binomial(0, 0)


def test_bootstrap_is_reproducible_and_of_the_ratio_of_sums():
    rng = np.random.default_rng(1)
    sums = np.stack([rng.gamma(2, 3, 50), rng.integers(1, 100, 50)], axis=1)
    found = bootstrap(sums, mean)
    assert found == bootstrap(sums, mean)
    assert found != bootstrap(sums, mean, seed=1)
    assert found.value == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum())
    # The same resampling, item by item.
    again = np.random.default_rng(0)
    drawn = again.integers(0, 50, (intervals.RESAMPLES, 50))
    ratios = [sums[rows, 0].sum() / sums[rows, 1].sum() for rows in drawn]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])))


@pytest.mark.parametrize("few", [True, False])
def test_bootstrap_of_means_agrees_with_the_normal_distribution(monkeypatch, few):
    monkeypatch.setattr(intervals, "_POISSON_FROM", 10**9 if few else 1)
    monkeypatch.setattr(intervals, "_AT_ONCE", 1000)  # in many parts
    values = np.random.default_rng(3).normal(5, 2, 400)
    found = bootstrap(np.stack([values, np.ones(400)], axis=1), mean)
    half = 1.96 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_one_item_has_no_interval():
    assert bootstrap(np.array([[3.0, 2.0]]), mean) == (1.5, None, None)
