"""Notes before the first step; a new run compiles nothing for them."""

from slm_jax.training import setup
from slm_jax.training.schedule import make_schedule
from tests.helpers import tiny_config


def test_a_rate_that_rises_again_is_named():
    config = tiny_config()
    steps = config.train.steps
    rates = [float(make_schedule(config.optimizer, steps)(step)) for step in range(steps // 2)]
    rows = [{"step": step, "lr": rate} for step, rate in enumerate(rates, 1)]
    assert list(setup._notices(config, len(rows), rows)) == []
    rows[-1]["lr"] = rates[-1] / 100  # as if a shorter run had ended here
    (text,) = setup._notices(config, len(rows), rows)
    assert text.startswith(f"with {steps} steps the learning rate rises again, from {rows[-1]['lr']:.2e} to ")


def test_a_new_run_looks_no_rate_up(monkeypatch):
    monkeypatch.setattr(setup, "make_schedule", None)  # a call, which compiles, would fail
    assert list(setup._notices(tiny_config(), 0, [])) == []
