"""Expectations of `--size auto` before training, and their comparison with the run."""

import gzip
import math
from pathlib import Path

import pytest

from slm_jax.cli import train
from slm_jax.cli.forecast import make_forecast
from slm_jax.config.rule import Request, make_recipe
from slm_jax.config.small_text import expected_bits
from slm_jax.run.trend import Trend
from slm_jax.training.result import Result

SPEED = 1e10


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("A line of text.\n" * 20_000)
    return train.parse_args(["my.txt", "--size", "auto"])[0]


def test_time_and_score_before_training(config):
    text_bytes = round(0.95 * 320_000)
    forecast = make_forecast(config, lambda _: SPEED)
    recipe = make_recipe(Request(auto=True, text_bytes=text_bytes))
    validations = 8 * 0.05 / 0.95 / 3  # of the text, a forward pass each; the text is read eight times
    assert forecast.seconds * SPEED == pytest.approx(recipe.flops * (1 + validations / 8), rel=0.01)
    assert forecast.bits == expected_bits(text_bytes)
    time, score = forecast.lines()
    assert time.startswith("expected time: ")
    assert f"{forecast.bits.low:.2f} to {forecast.bits.high:.2f} bits per byte" in score
    assert "304.0 kB" in score
    (only,) = make_forecast(config).lines()  # a resumed run
    assert only == score


def test_text_of_unknown_size_has_no_forecast(config, tmp_path):
    """Such as a compressed file, from which an earlier run was made."""
    (tmp_path / "my.txt.gz").write_bytes(gzip.compress(b"A line of text.\n" * 100))
    data = config.data.model_copy(update={"files": ("my.txt.gz",)})
    assert make_forecast(config.model_copy(update={"data": data}), lambda _: SPEED) is None


@pytest.mark.parametrize(("offset", "place"), [(-1, "below"), (0, "within"), (1, "above")])
def test_comparison_with_the_run(config, offset, place):
    forecast = make_forecast(config, lambda _: SPEED)
    reached = (forecast.bits.low + forecast.bits.high) / 2 + offset
    trend = Trend().add(10, 2.0, reached).add(20, 2.5, reached + 0.5)
    score, time = forecast.comparison(Result(Path("x"), 20, {"seconds": 61.0}, trend=trend))
    assert f"{reached:.2f} is {place}" in score
    assert "they took 1:01" in time
    assert list(forecast.comparison(Result(Path("x"), 20, {}))) == []
    assert math.isnan(make_forecast(config).seconds)
