"""A step's memory is known before it runs, and the batch is cut into parts that fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.distributed import sharding
from slm_jax.training.memory import compile_to_fit, describe, memory_limit, needed_memory
from slm_jax.utils.errors import UserError
from tests.helpers import random_ids, tiny_config

FIELDS = {"train__batch_size": 24, "train__sequence_length": 128, "optimizer__name": "adamw", "mesh__data": 1}


def batch_of(config):
    ids = random_ids((config.train.batch_size, config.train.sequence_length + 1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def fit(**fields):
    config = tiny_config(**{**FIELDS, **fields})
    return compile_to_fit(config, 61, sharding.make_mesh(config), batch_of(config))


@pytest.fixture(scope="module")
def needed():
    """Gigabytes of a whole batch."""
    return fit().needed / 1e9


def test_needed_memory_is_that_of_the_program():
    """A closed form: two arguments, one result, and the product that neither can hold."""
    n = 512
    f = jax.jit(lambda a, b: (a @ b) @ b)
    compiled = f.lower(*(jax.ShapeDtypeStruct((n, n), jnp.float32) for _ in range(2))).compile()
    assert 4 * n * n * 4 <= needed_memory(compiled) < 5 * n * n * 4


def test_a_batch_that_fits_is_computed_whole():
    fitted = fit()
    assert fitted.config.train.microbatch == 24
    assert 0 < fitted.needed <= fitted.limit


def test_the_limit_is_what_is_free_or_less_if_so_said():
    free = memory_limit(tiny_config(), sharding.make_mesh(tiny_config(mesh__data=1)))
    assert 1e7 < free < 1e13
    config = tiny_config(train__memory_gb=1e-3)
    assert memory_limit(config, sharding.make_mesh(config)) == 1_000_000


def test_auto_takes_the_largest_part_that_fits(needed):
    fitted = fit(train__memory_gb=0.7 * needed)
    rows = fitted.config.train.microbatch
    assert rows in (12, 8, 6, 4, 3, 2)
    assert fitted.needed <= 0.7 * needed * 1e9
    larger = min(n for n in (24, 12, 8, 6, 4, 3) if n > rows)
    assert fit(train__microbatch=larger).needed > 0.7 * needed * 1e9
    assert f"{24 // rows} microbatches of {rows} sequences per step" in describe(fitted, tiny_config(**FIELDS))


def test_the_parts_together_are_the_batch(needed):
    """The step that was cut gives the parameters of the whole one, but for rounding."""
    batch, results = None, []
    for gigabytes in (0, 0.7 * needed):
        fitted = fit(train__memory_gb=gigabytes)
        batch = batch_of(fitted.config)
        state, metrics = fitted.train(fitted.steps.init(), batch)
        results.append((float(metrics["loss"]), jax.device_get(state.params)))
    (loss, params), (cut_loss, cut_params) = results
    assert cut_loss == pytest.approx(loss, rel=1e-6)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(cut_params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # AdamW's first step has the size of the rate: 0.01


def test_what_does_not_fit_is_refused_with_what_does(needed):
    with pytest.raises(UserError, match=r"train.microbatch 24 needs \d+ MB .* --train.microbatch (12|8|6|4|3|2) fits"):
        fit(train__memory_gb=0.7 * needed, train__microbatch=24)
    with pytest.raises(UserError, match=r"needs \d+ MB even with 1 sequence at once, .* --model.remat full"):
        fit(train__memory_gb=1e-5)


def test_a_run_that_was_cut_stays_cut(needed):
    config = tiny_config(**FIELDS)
    fitted = compile_to_fit(config, 61, sharding.make_mesh(config), batch_of(config), min_grad_accum_steps=4)
    assert fitted.config.train.microbatch == 6
