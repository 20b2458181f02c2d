"""Steps that would do harm are noticed and left out; without the option nothing changes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax.config.schema import Config, HealthConfig
from slm_jax.training import health
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.train_step import make_steps
from slm_jax.utils.batch import IGNORE_INDEX
from slm_jax.utils.errors import UserError
from tests.helpers import largest_difference, random_ids, tiny_config

VOCAB = 61


def batch(seed=0):
    ids = random_ids((8, 16), seed=seed)
    return {"input_ids": ids, "labels": jnp.concatenate([ids[:, 1:], jnp.full((8, 1), IGNORE_INDEX)], axis=1)}


def watch(values, config):
    """The steps that examine() would not take of a series of (loss, gradient norm), and the statistics at the end."""
    examine = jax.jit(lambda h, loss, norm: health.update(h, config, loss, norm))
    state, left_out = health.init(), []
    for i, (loss, norm) in enumerate(values):
        state, take, _ = examine(state, jnp.float32(loss), jnp.float32(norm))
        if not take:
            left_out.append(i)
    return state, left_out


def test_running_statistics_are_those_of_the_formula():
    """Plain mean and variance at first; then weights that fall by a constant factor."""
    values = np.random.default_rng(0).normal(3.0, 1.0, (40, 2))
    config = HealthConfig(on_spike="skip", window=1000, warmup_steps=1000)
    state, _ = watch(values, config)
    np.testing.assert_allclose(state.mean, values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(state.variance, values.var(axis=0), rtol=1e-4)
    config = HealthConfig(on_spike="skip", window=9, warmup_steps=1000)
    state, _ = watch(values, config)
    # The first four steps weigh the same (1/2, 1/3, 1/4, 1/5 of each new one), every later one 0.2.
    weights = np.array([0.25 * 0.8**36] * 4 + [0.2 * 0.8 ** (35 - i) for i in range(36)])
    assert weights.sum() == pytest.approx(1)
    mean = weights @ values
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(state.variance, weights @ (values - mean) ** 2, rtol=1e-4)


def test_what_is_a_spike():
    rng = np.random.default_rng(1)
    values = [(3 + 0.1 * rng.normal(), 1 + 0.1 * rng.normal()) for _ in range(60)]
    for i, harm in {10: (4, 1), 30: (3, 9), 31: (9, 1), 40: (np.nan, 1), 41: (3, np.inf), 50: (0.1, 0)}.items():
        values[i] = harm
    skip = {"warmup_steps": 20, "window": 50, "deviations": 6}
    assert watch(values, HealthConfig(on_spike="skip", on_nan="skip", **skip))[1] == [30, 31, 40, 41]  # low is no harm
    assert watch(values, HealthConfig(on_spike="skip", **skip))[1] == [30, 31]  # on_nan = stop: not finite, it ends
    state, left_out = watch(values, HealthConfig(on_nan="skip", **skip))
    assert left_out == [40, 41]
    assert (int(state.skipped), int(state.in_a_row)) == (2, 0)
    assert np.isfinite(state.mean).all()


@pytest.fixture(scope="module")
def watched():
    """Steps that skip, with norms of layers."""
    return make_steps(tiny_config(health__on_nan="skip", log__layers=2, **SMALL), VOCAB)


SMALL = {"model__depth": 2, "optimizer__name": "adamw", "optimizer__clip": 0, "optimizer__schedule": "cosine"}


def test_a_skipped_batch_changes_nothing_but_the_schedule(watched):
    """Parameters and moments stay bit for bit; the next step is that of its own place in the schedule."""
    state, _ = watched.train(watched.init(), batch())
    params = jax.tree.map(jnp.copy, state.params)
    params["blocks"]["mlp"]["down"] = jax.tree.map(lambda x: x * jnp.nan, params["blocks"]["mlp"]["down"])
    before = jax.device_get(state._replace(params=params))
    after, metrics = watched.train(jax.tree.map(jnp.copy, state._replace(params=params)), batch(1))
    assert np.isnan(metrics["loss"])
    assert int(metrics["skipped"]) == 1
    assert int(after.step) == 2
    row = health.layer_norms_record(2, jax.device_get(metrics["layers"]))
    assert row["grad_norm"]["blocks.0"] is None
    json.dumps(row, allow_nan=False)

    def same(x, y):
        return np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)

    assert jax.tree.all(jax.tree.map(same, before.params, after.params))
    counts = [[int(x.count) for x in schedules(each.opt_state)] for each in (before, after)]
    assert counts == [[1], [2]]
    moments = [jax.tree.leaves(without_schedules(each.opt_state)) for each in (before, after)]
    assert all(same(x, y) for x, y in zip(*moments, strict=True))


def is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)


def schedules(tree):
    return [x for x in jax.tree.leaves(tree, is_leaf=is_schedule) if is_schedule(x)]


def without_schedules(tree):
    return jax.tree.map(lambda x: None if is_schedule(x) else x, tree, is_leaf=is_schedule)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("take", [True, False])
def test_what_is_chosen_of_each_optimizer(name, take):
    """Every count of a schedule is the new one, everything else new or old."""
    optimizer = make_optimizer(tiny_config(optimizer__name=name).optimizer, 20, jnp.dtype("float32"))
    old = optimizer.init({"blocks": {"up": jnp.zeros((2, 3, 4))}, "embedding": jnp.zeros((5, 3))})
    new = jax.tree.map(lambda x: x + 1, old)
    chosen = health.select(jnp.asarray(take), new, old)
    assert len(schedules(chosen)) == (1 if name == "adamw" else 2)
    assert all(int(x.count) == 1 for x in schedules(chosen))
    leaves = jax.tree.leaves(without_schedules(chosen))
    assert len(leaves) >= 4
    assert all(np.all(np.asarray(leaf) == int(take)) for leaf in leaves)


def test_watched_steps_that_are_healthy_are_the_same_steps(watched):
    plain = make_steps(tiny_config(**SMALL), VOCAB)
    first, second = plain.init(), watched.init()
    for i in range(3):
        first, expected = plain.train(first, batch(i))
        second, metrics = watched.train(second, batch(i))
    assert largest_difference(first.params, second.params) < 1e-6  # another program: other roundings
    more = {"skipped", "in_a_row", "is_spike", "loss_limit", "grad_norm_limit", "layers"}
    assert set(metrics) - set(expected) == more


def test_without_the_option_the_program_is_that_of_a_step_without_it():
    def program(**fields):
        made = make_steps(tiny_config(**SMALL, **fields), VOCAB)
        return made.train.lower(jax.eval_shape(made.init), batch()).as_text()

    text = program()
    assert make_steps(tiny_config(), VOCAB).init.eval_shape().health == ()
    assert program(health__deviations=2.0, health__window=7, log__every=3) == text
    assert program(health__on_spike="stop") != text


def test_the_verdict_on_a_row():
    row = {"step": 7, "loss": 9.0, "grad_norm": 1.0}
    report = {"in_a_row": 0.0, "is_spike": 1.0, "loss_limit": 4.0, "grad_norm_limit": np.inf}
    with pytest.raises(UserError, match=r"loss of step 7 is 9, above 4: 6 deviations.*--health.on_spike skip"):
        health.check(row | report, HealthConfig(on_spike="stop"), "Lower it")
    assert health.check(row | report, HealthConfig(on_spike="skip"), "") == row
    with pytest.raises(UserError, match=r"loss of step 7 is nan: training has diverged. Lower it"):
        health.check(row | {"loss": np.nan}, HealthConfig(), "Lower it")
    bad = row | report | {"loss": np.nan, "skipped": 3.0, "is_spike": 0.0}
    judged = health.check(dict(bad), HealthConfig(on_nan="skip"), "")
    assert judged == {"step": 7, "loss": None, "grad_norm": 1.0, "skipped": 3}
    json.dumps(judged, allow_nan=False)
    with pytest.raises(UserError, match="10 batches in a row were skipped, the last one at step 7"):
        health.check(bad | {"in_a_row": 10.0}, HealthConfig(on_nan="skip"), "")


def test_norms_of_layers(watched):
    state = watched.init()
    before = jax.device_get(state.params)
    after, metrics = watched.train(state, batch())
    row = health.layer_norms_record(1, jax.device_get(metrics["layers"]))
    assert list(row["grad_norm"]) == ["blocks.0", "blocks.1", "embedding", "final_norm"]
    flat = np.concatenate([np.ravel(x[1]) for x in jax.tree.leaves(after.params["blocks"])])
    assert row["param_norm"]["blocks.1"] == pytest.approx(np.linalg.norm(flat), rel=1e-5)
    change = np.asarray(after.params["embedding"]) - before["embedding"]
    ratio = np.linalg.norm(change) / np.linalg.norm(after.params["embedding"])
    assert row["update_ratio"]["embedding"] == pytest.approx(ratio, rel=1e-3)
    total = np.linalg.norm(list(row["grad_norm"].values()))
    assert total == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    json.dumps(row, allow_nan=False)


def test_the_fields_are_checked():
    with pytest.raises(UserError, match=r"log.profile 'abc': should be FIRST:LAST"):
        Config.load(**{"log.profile": "abc"})
    with pytest.raises(UserError, match=r"log.profile '5:3'"):
        Config.load(**{"log.profile": "5:3"})
    Config.load(**{"log.profile": "3:5", "log.sinks": ["tensorboard"]})
