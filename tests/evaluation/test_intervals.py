"""Confidence intervals against published tables, the binomial distribution and the normal distribution."""

from math import comb

import numpy as np
import pytest

from slm_jax.evaluation import intervals
from slm_jax.evaluation.intervals import binomial_interval, bootstrap_interval


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def test_binomial_intervals_match_published_tables():
    # From Clopper & Pearson's chart, and tables of exact 95 % limits.
    assert binomial_interval(5, 10) == pytest.approx((0.5, 0.1871, 0.8129), abs=5e-5)
    assert binomial_interval(1, 20) == pytest.approx((0.05, 0.0013, 0.2487), abs=5e-5)
    assert binomial_interval(0, 10) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 10)))
    assert binomial_interval(10, 10) == pytest.approx((1.0, 0.025 ** (1 / 10), 1.0))


@pytest.mark.parametrize(("hits", "count"), [(1, 7), (13, 40), (199, 200), (60, 120)])
def test_binomial_tails_have_two_and_a_half_percent_each(hits, count):
    def at_least(k, p):
        return sum(comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k, count + 1))

    _, low, high = binomial_interval(hits, count)
    assert at_least(hits, low) == pytest.approx(0.025, rel=1e-9)
    assert 1 - at_least(hits + 1, high) == pytest.approx(0.025, rel=1e-9)


def test_binomial_interval_of_no_items_raises():
    with pytest.raises(ValueError, match="0 hits of 0"):
        binomial_interval(0, 0)


def test_bootstrap_of_a_ratio_is_reproducible_and_matches_a_loop():
    rng = np.random.default_rng(1)
    sums = np.stack([rng.gamma(2, 3, 50), rng.integers(1, 100, 50)], axis=1)
    result = bootstrap_interval(sums, ratio)
    assert result == bootstrap_interval(sums, ratio)
    assert result != bootstrap_interval(sums, ratio, seed=1)
    assert result.value == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum())
    # The same resampling, one resample at a time.
    again = np.random.default_rng(0)
    drawn = again.integers(0, 50, (intervals.RESAMPLES, 50))
    ratios = [sums[rows, 0].sum() / sums[rows, 1].sum() for rows in drawn]
    assert (result.low, result.high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])))


@pytest.mark.parametrize("few", [True, False])
def test_bootstrap_of_a_mean_matches_the_normal_distribution(monkeypatch, few):
    monkeypatch.setattr(intervals, "_POISSON_MIN_ITEMS", 10**9 if few else 1)
    monkeypatch.setattr(intervals, "_MAX_COUNTS", 1000)  # many chunks
    values = np.random.default_rng(3).normal(5, 2, 400)
    result = bootstrap_interval(np.stack([values, np.ones(400)], axis=1), ratio)
    half = 1.96 * values.std() / 20
    assert (result.low, result.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_a_single_item_has_no_interval():
    assert bootstrap_interval(np.array([[3.0, 2.0]]), ratio) == (1.5, None, None)
