"""Test that harmful updates are detected and skipped, and that without the option nothing changes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.config.schema import Config, HealthConfig
from slm_jax.training import health
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.options import layer_norms
from slm_jax.training.schedule import is_schedule_state
from slm_jax.training.steps import make_steps
from slm_jax.utils.batch import IGNORE_INDEX
from slm_jax.utils.errors import UserError
from tests.helpers import largest_difference, random_ids, tiny_config

VOCAB = 61


def batch(seed=0):
    ids = random_ids((8, 16), seed=seed)
    return {"input_ids": ids, "labels": jnp.concatenate([ids[:, 1:], jnp.full((8, 1), IGNORE_INDEX)], axis=1)}


def watch(values, config):
    """Return the final statistics of a series of (loss, gradient norm), and the steps that update() skips."""
    update = jax.jit(lambda h, loss, norm: health.update(h, config, loss, norm))
    state = health.init()
    skipped = []
    for i, (loss, norm) in enumerate(values):
        state, is_taken, _ = update(state, jnp.float32(loss), jnp.float32(norm))
        if not is_taken:
            skipped.append(i)
    return state, skipped


def test_running_statistics_match_their_formula():
    """Plain mean and variance at first, then weights that decay by a constant factor."""
    values = np.random.default_rng(0).normal(3.0, 1.0, (40, 2))
    config = HealthConfig(on_spike="skip", window=1000, warmup_steps=1000)
    state, _ = watch(values, config)
    np.testing.assert_allclose(state.mean, values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(state.variance, values.var(axis=0), rtol=1e-4)
    config = HealthConfig(on_spike="skip", window=9, warmup_steps=1000)
    state, _ = watch(values, config)
    # The first four steps have equal weights (1/2, 1/3, 1/4, 1/5 for each new one), every later one 0.2.
    weights = np.array([0.25 * 0.8**36] * 4 + [0.2 * 0.8 ** (35 - i) for i in range(36)])
    assert weights.sum() == pytest.approx(1)
    mean = weights @ values
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(state.variance, weights @ (values - mean) ** 2, rtol=1e-4)


def test_spikes_are_detected():
    rng = np.random.default_rng(1)
    values = [(3 + 0.1 * rng.normal(), 1 + 0.1 * rng.normal()) for _ in range(60)]
    for i, outlier in {10: (4, 1), 30: (3, 9), 31: (9, 1), 40: (np.nan, 1), 41: (3, np.inf), 50: (0.1, 0)}.items():
        values[i] = outlier
    skip = {"warmup_steps": 20, "window": 50, "deviations": 6}
    assert watch(values, HealthConfig(on_spike="skip", on_nan="skip", **skip))[1] == [
        30,
        31,
        40,
        41,
    ]  # a low value is no spike
    assert watch(values, HealthConfig(on_spike="skip", **skip))[1] == [30, 31]  # on_nan = stop: the run ends instead
    state, skipped = watch(values, HealthConfig(on_nan="skip", **skip))
    assert skipped == [40, 41]
    assert (int(state.skipped), int(state.in_a_row)) == (2, 0)
    assert np.isfinite(state.mean).all()


@pytest.fixture(scope="module")
def watched():
    """Return steps that skip non-finite updates and report the norms of layers."""
    fields = {"health__on_nan": "skip", "log__layers": 2, "optimizer__average_decay": 0.9}
    return make_steps(tiny_config(**fields, **SMALL), VOCAB)


SMALL = {"model__depth": 2, "optimizer__name": "adamw", "optimizer__clip": 0, "optimizer__schedule": "cosine"}


def test_skipped_update_changes_only_the_schedule(watched):
    """Parameters and moments stay bit-identical; the schedule advances."""
    state, _ = watched.train(watched.init(), batch())
    params = jax.tree.map(jnp.copy, state.params)
    params["blocks"]["mlp"]["down"] = jax.tree.map(lambda x: x * jnp.nan, params["blocks"]["mlp"]["down"])
    before = jax.device_get(state._replace(params=params))
    after, metrics = watched.train(jax.tree.map(jnp.copy, state._replace(params=params)), batch(1))
    assert np.isnan(metrics["loss"])
    assert int(metrics["skipped"]) == 1
    assert int(after.step) == 2
    row = layer_norms.record(2, jax.device_get(metrics["layers"]))
    assert row["grad_norm"]["blocks.0"] is None
    json.dumps(row, allow_nan=False)

    def same(x, y):
        return np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)

    assert jax.tree.all(jax.tree.map(same, before.params, after.params))
    assert jax.tree.all(jax.tree.map(same, before.average, after.average))
    assert int(after.average["count"]) == 1
    counts = [[int(x.count) for x in schedules(each.opt_state)] for each in (before, after)]
    assert counts == [[1], [2]]
    moments = [jax.tree.leaves(without_schedules(each.opt_state)) for each in (before, after)]
    assert all(same(x, y) for x, y in zip(*moments, strict=True))


def schedules(tree):
    return [x for x in jax.tree.leaves(tree, is_leaf=is_schedule_state) if is_schedule_state(x)]


def without_schedules(tree):
    return jax.tree.map(lambda x: None if is_schedule_state(x) else x, tree, is_leaf=is_schedule_state)


@pytest.mark.parametrize(("name", "count"), [("adamw", 1), ("muon", 2), ("normuon", 3)])
@pytest.mark.parametrize("is_taken", [True, False])
def test_select_always_advances_the_schedule(name, count, is_taken):
    """The counts of schedules, also of the momentum, are the new ones, everything else is new or old."""
    warmup = {"optimizer__momentum_warmup_steps": 5} if name == "normuon" else {}
    optimizer = make_optimizer(tiny_config(optimizer__name=name, **warmup).optimizer, 20, jnp.dtype("float32"))
    old = optimizer.init({"blocks": {"up": jnp.zeros((2, 3, 4))}, "embedding": jnp.zeros((5, 3))})
    new = jax.tree.map(lambda x: x + 1, old)
    selected = health.select(jnp.asarray(is_taken), new, old)
    assert len(schedules(selected)) == count
    assert all(int(x.count) == 1 for x in schedules(selected))
    leaves = jax.tree.leaves(without_schedules(selected))
    assert len(leaves) >= 4
    assert all(np.all(np.asarray(leaf) == int(is_taken)) for leaf in leaves)


def test_healthy_steps_equal_those_without_the_option(watched):
    plain = make_steps(tiny_config(**SMALL), VOCAB)
    first = plain.init()
    second = watched.init()
    for i in range(3):
        first, expected = plain.train(first, batch(i))
        second, metrics = watched.train(second, batch(i))
    assert largest_difference(first.params, second.params) < 1e-5  # programs round differently, and Muon amplifies it
    diagnostics = {"skipped", "in_a_row", "is_spike", "loss_limit", "grad_norm_limit", "layers"}
    assert set(metrics) - set(expected) == diagnostics


def test_disabled_option_leaves_the_program_unchanged():
    def program(**fields):
        made = make_steps(tiny_config(**SMALL, **fields), VOCAB)
        return made.train.lower(jax.eval_shape(made.init), batch()).as_text()

    text = program()
    assert make_steps(tiny_config(), VOCAB).init.eval_shape().health == ()
    assert program(health__deviations=2.0, health__window=7, log__every=3) == text
    assert program(health__on_spike="stop") != text


def test_check_stops_or_cleans_a_row():
    row = {"step": 7, "loss": 9.0, "grad_norm": 1.0}
    diagnostics = {"in_a_row": 0.0, "is_spike": 1.0, "loss_limit": 4.0, "grad_norm_limit": np.inf}
    with pytest.raises(UserError, match=r"loss of step 7 is 9, above 4: 6 deviations.*--health.on_spike skip"):
        health.check(row | diagnostics, HealthConfig(on_spike="stop"), "Lower it")
    assert health.check(row | diagnostics, HealthConfig(on_spike="skip"), "") == row
    with pytest.raises(UserError, match=r"loss of step 7 is nan: training has diverged. Lower it"):
        health.check(row | {"loss": np.nan}, HealthConfig(), "Lower it")
    bad = row | diagnostics | {"loss": np.nan, "skipped": 3.0, "is_spike": 0.0}
    checked = health.check(dict(bad), HealthConfig(on_nan="skip"), "")
    assert checked == {"step": 7, "loss": None, "grad_norm": 1.0, "skipped": 3}
    json.dumps(checked, allow_nan=False)
    with pytest.raises(UserError, match="10 batches in a row were skipped, the last one at step 7"):
        health.check(bad | {"in_a_row": 10.0}, HealthConfig(on_nan="skip"), "")


def test_layer_norms(watched):
    state = watched.init()
    before = jax.device_get(state.params)
    after, metrics = watched.train(state, batch())
    row = layer_norms.record(1, jax.device_get(metrics["layers"]))
    assert list(row["grad_norm"]) == ["blocks.0", "blocks.1", "embedding", "final_norm"]
    flat = np.concatenate([np.ravel(x[1]) for x in jax.tree.leaves(after.params["blocks"])])
    assert row["param_norm"]["blocks.1"] == pytest.approx(np.linalg.norm(flat), rel=1e-5)
    change = np.asarray(after.params["embedding"]) - before["embedding"]
    ratio = np.linalg.norm(change) / np.linalg.norm(after.params["embedding"])
    assert row["update_ratio"]["embedding"] == pytest.approx(ratio, rel=1e-3)
    total = np.linalg.norm(list(row["grad_norm"].values()))
    assert total == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    json.dumps(row, allow_nan=False)


def test_invalid_options_are_reported():
    with pytest.raises(UserError, match=r"log.profile 'abc': should be FIRST:LAST"):
        Config.load(**{"log.profile": "abc"})
    with pytest.raises(UserError, match=r"log.profile '5:3'"):
        Config.load(**{"log.profile": "5:3"})
    Config.load(**{"log.profile": "3:5", "log.sinks": ["tensorboard"]})
