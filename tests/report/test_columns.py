"""Metrics as columns, reduction to few points, and ticks, each against a naive loop."""

import json
import math

import numpy as np
import pytest

from slm_jax.performance.flops import TokenFlops
from slm_jax.report.axes import (
    Scale,
    format_compact,
    format_duration,
    format_number,
    format_percent,
    tick_labels,
    time_ticks,
)
from slm_jax.report.columns import Buckets, moving_average, read_columns
from slm_jax.utils.errors import UserError


def test_moving_average():
    random = np.random.default_rng(0)
    y = random.standard_normal(57)
    y[[3, 4, 5, 40]] = np.nan
    for width in (1, 3, 5, 11):
        half = width // 2
        around = [y[max(0, i - half) : i + half + 1] for i in range(57)]
        expected = [np.mean(part[np.isfinite(part)]) if np.isfinite(part).any() else np.nan for part in around]
        np.testing.assert_allclose(moving_average(y, width), expected, rtol=1e-12)


@pytest.mark.parametrize(("num_rows", "max_buckets"), [(1, 5), (5, 5), (6, 5), (1000, 7), (1001, 500)])
def test_buckets_contain_every_row_once(num_rows, max_buckets):
    y = np.random.default_rng(num_rows).standard_normal(num_rows)
    if num_rows > 10:
        y[2:5] = np.nan
    buckets = Buckets.partition(num_rows, max_buckets)
    assert len(buckets.ends) == min(num_rows, max_buckets)
    parts = np.split(y, buckets.ends[:-1])
    assert sum(map(len, parts)) == num_rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    mean, low, high = buckets.mean_min_max(y)
    for i, part in enumerate(parts):
        finite = part[np.isfinite(part)]
        if finite.size:
            assert (mean[i], low[i], high[i]) == (pytest.approx(finite.mean()), finite.min(), finite.max())
        else:
            assert np.isnan([mean[i], low[i], high[i]]).all()
    assert buckets.last(np.arange(num_rows)).tolist() == [end - 1 for end in buckets.ends]


def test_a_spike_of_one_step_among_a_hundred_thousand_is_kept():
    y = np.ones(100_000)
    y[54_321] = 50.0
    assert Buckets.partition(len(y), 500).mean_min_max(y)[2].max() == 50.0


ROW = {"step": 1, "loss": 2.0, "tokens": 8, "bytes": 16, "seconds": 0.5, "tokens_per_second": 16, "mfu": 0.1}
SCORES = {"val_loss": 1.5, "val_perplexity": 4.5, "val_accuracy": 0.5, "val_bits_per_byte": 1.0}


def test_read_columns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        ROW | {"val_loss": None},
        ROW | SCORES | {"step": 2, "loss": None, "tokens": 9, "input_tokens": 12, "mean_context": 3},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    columns = read_columns(path, TokenFlops(10.0, 2.0, 5.0))
    assert columns.x["flops"].tolist() == [8 * 20, 8 * 20 + 12 * 16]
    assert columns["step"].tolist() == [1, 2]
    assert columns.x["tokens"].tolist() == [8, 17]
    assert columns.bits_per_byte[0] == pytest.approx(2.0 / math.log(2) / 2)
    assert np.isnan(columns["loss"][1])
    assert columns.validation_indices().tolist() == [1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"seconds": None}, "seconds is not a number"),
        (ROW | {"val_loss": 3}, "val_perplexity is not a number"),
        (ROW | {"lr": "high"}, "high"),
    ],
)
def test_an_invalid_row_raises(tmp_path, row, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl is damaged \(.*{message}.*\): restore it"):
        read_columns(path)


def test_ticks_are_round_and_few():
    random = np.random.default_rng(1)
    for _ in range(500):
        low = float(random.normal() * 10.0 ** random.integers(-4, 7))
        high = low + float(10.0 ** random.uniform(-4, 7))
        ticks = Scale(low, high).ticks()
        assert 2 <= len(ticks) <= 9, (low, high, ticks)
        tolerance = 1e-6 * (high - low)
        assert all(low - tolerance <= tick <= high + tolerance for tick in ticks)
        labels = tick_labels(ticks)
        assert len(set(labels)) == len(labels) or abs(low) > 1e3 * (high - low), (ticks, labels)


def test_logarithmic_ticks():
    assert Scale(0.9, 2000.0, log=True).ticks() == [1, 10, 100, 1000]
    assert Scale(0.9, 60.0, log=True).ticks() == [1, 2, 5, 10, 20, 50]
    for low, high in ((2.1, 2.9), (1e-9, 1e6), (3.0, 40.0)):
        ticks = Scale(low, high, log=True).ticks()
        assert 2 <= len(ticks) <= 10
        assert all(low <= tick <= high for tick in ticks)


def test_positions():
    scale = Scale(1.0, 100.0, log=True)
    np.testing.assert_allclose(scale.position(np.array([1.0, 10.0, 100.0])), [0, 0.5, 1], atol=1e-12)
    assert np.isnan(scale.position(np.array([0.0, -1.0, np.nan]))).all()
    assert Scale.fit(np.array([np.nan])) is None
    assert Scale.fit(np.array([0.0, -1.0]), log=True) is None
    constant = Scale.fit(np.array([3.0, 3.0]))
    assert constant is not None
    assert constant.low < 3 < constant.high


def test_time_ticks_and_durations():
    assert time_ticks(0, 184) == [0, 60, 120, 180]
    assert time_ticks(0, 0.4) == [0, 0.1, 0.2, 0.3, 0.4]
    assert 3 <= len(time_ticks(0, 9e6)) <= 11
    assert [format_duration(seconds) for seconds in (4.256, 59.9, 187, 3731, 200_000)] == [
        "4.26 s", "59.9 s", "3:07", "1:02:11", "2 d 7:33:20"
    ]  # fmt: skip


def test_number_formats():
    assert [format_compact(v) for v in (0, 0.00012, 0.012, 7.5, 999, 7680, 86_200, 2.16e6, 3e9, 2.9e13)] == [
        "0", "1.2e-04", "0.012", "7.5", "999", "7,680", "86.2k", "2.16M", "3G", "29T"
    ]  # fmt: skip
    assert [format_number(v) for v in (3, 23.7323, 1234.5, 2.9e13, 1e-7, math.inf, 12345678.0)] == [
        "3", "23.73", "1,234", "29,000,000,000,000", "1.000e-07", "inf", "12,345,678"
    ]  # fmt: skip
    assert [format_percent(v).replace("\xa0", " ") for v in (0, 0.5, 0.34, 0.000488, 1)] == [
        "0.0 %", "50.0 %", "34.0 %", "0.049 %", "100.0 %"
    ]  # fmt: skip
