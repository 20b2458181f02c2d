"""Values of --size and --budget."""

import pytest

from slm_jax.config.dial import Budget, parse_budget, parse_size
from slm_jax.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "parameters"),
    [("10M", 10e6), ("2.5m", 2.5e6), ("1B", 1e9), ("350 M", 350e6), ("125_000_000", 125e6), ("1e6", 1e6), (".5G", 5e8)],
)
def test_sizes(text, parameters):
    assert parse_size(text) == parameters


@pytest.mark.parametrize(
    "text", ["3 parameters", "banana", "", "-1M", "0", "10MB", "M", "1..5M", "nan", "inf", "1e", "1e999"]
)
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="should be a number of parameters, such as 10M") as error:
        parse_size(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("10min", Budget(seconds=600)),
        ("2h", Budget(seconds=7200)),
        ("90 s", Budget(seconds=90)),
        ("1.5 hours", Budget(seconds=5400)),
        ("1e18", Budget(flops=1e18)),
        ("3.5e17 FLOPs", Budget(flops=3.5e17)),
        ("2B tokens", Budget(tokens=2e9)),
        ("500Mtokens", Budget(tokens=5e8)),
        ("1000000 tokens", Budget(tokens=1e6)),
        ("2T tokens", Budget(tokens=2e12)),
    ],
)
def test_budgets(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text", ["5 bananas", "5", "", "tokens", "0min", "-5min", "2B", "10 m", "nanh", "1e400", "1e400h"]
)
def test_what_is_no_budget(text):
    with pytest.raises(UserError, match="should be a time on this machine") as error:
        parse_budget(text)
    assert "\n" not in str(error.value)
