"""Test that the memory of a step is known before it runs, and that the batch is split into microbatches that fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.config.schema import Config
from slm_jax.distributed import sharding
from slm_jax.run.directory import Run
from slm_jax.training import memory
from slm_jax.training.memory import compile_to_fit, describe, memory_limit, needed_memory
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from tests.helpers import TINY, random_ids, tiny_config

FIELDS = {"train__batch_size": 24, "train__sequence_length": 128, "optimizer__name": "adamw", "mesh__data": 1}


def batch_of(config):
    ids = random_ids((config.train.batch_size, config.train.sequence_length + 1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def fit(**fields):
    config = tiny_config(**{**FIELDS, **fields})
    return compile_to_fit(config, 61, sharding.make_mesh(config), batch_of(config))


@pytest.fixture(scope="module")
def needed():
    """Return the gigabytes that a step with the full batch takes."""
    return fit().needed / 1e9


def test_needed_memory_equals_that_of_the_program():
    """Closed form: two arguments, one result, and one temporary product."""
    n = 512
    f = jax.jit(lambda a, b: (a @ b) @ b)
    compiled = f.lower(*(jax.ShapeDtypeStruct((n, n), jnp.float32) for _ in range(2))).compile()
    assert 4 * n * n * 4 <= needed_memory(compiled) < 5 * n * n * 4


def test_batch_that_fits_is_not_split():
    fitted = fit()
    assert fitted.config.train.microbatch == 24
    assert 0 < fitted.needed <= fitted.limit


def test_limit_is_the_free_memory_or_memory_gb():
    free = memory_limit(tiny_config(), sharding.make_mesh(tiny_config(mesh__data=1)))
    assert 1e7 < free < 1e13
    config = tiny_config(train__memory_gb=1e-3)
    assert memory_limit(config, sharding.make_mesh(config)) == 1_000_000


def test_auto_chooses_the_largest_microbatch_that_fits(needed):
    fitted = fit(train__memory_gb=0.7 * needed)
    microbatch = fitted.config.train.microbatch
    assert microbatch in (12, 8, 6, 4, 3, 2)
    assert fitted.needed <= 0.7 * needed * 1e9
    larger = min(n for n in (24, 12, 8, 6, 4, 3) if n > microbatch)
    assert fit(train__microbatch=larger).needed > 0.7 * needed * 1e9
    assert f"{24 // microbatch} microbatches of {microbatch} sequences per step" in describe(
        fitted, tiny_config(**FIELDS)
    )


def test_accumulated_step_equals_the_full_batch(needed):
    """The parameters after a step in microbatches equal those after a full step up to rounding."""
    batch = None
    results = []
    for gigabytes in (0, 0.7 * needed):
        fitted = fit(train__memory_gb=gigabytes)
        batch = batch_of(fitted.config)
        state, metrics = fitted.train(fitted.steps.init(), batch)
        results.append((float(metrics["loss"]), jax.device_get(state.params)))
    (loss, params), (accumulated_loss, accumulated_params) = results
    assert accumulated_loss == pytest.approx(loss, rel=1e-6)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(accumulated_params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # AdamW's first step has the size of the learning rate, 0.01


def test_microbatch_that_does_not_fit_is_rejected_with_one_that_does(needed):
    with pytest.raises(UserError, match=r"train.microbatch 24 needs \d+ MB .* --train.microbatch (12|8|6|4|3|2) fits"):
        fit(train__memory_gb=0.7 * needed, train__microbatch=24)
    state = sharding.bytes_per_device(fit().steps.init())
    with pytest.raises(UserError, match=r"needs \d+ MB even with 1 sequence at once, .* --model.remat full"):
        fit(train__memory_gb=1.01e-9 * state)


def test_a_state_that_does_not_fit_is_refused_before_compiling(monkeypatch):
    state = sharding.bytes_per_device(fit().steps.init())
    compiled = []
    monkeypatch.setattr(memory, "needed_memory", compiled.append)
    with pytest.raises(UserError, match=r"optimizer state of this model take .* are free: use a smaller --model.dim"):
        fit(train__memory_gb=0.99e-9 * state)
    with pytest.raises(UserError, match=r"state of this model take \d+\.\d GB, .* or divide them over devices"):
        fit(model__dim=131_072, model__heads=1024)
    assert not compiled


def test_resumed_run_keeps_its_accumulation(needed):
    config = tiny_config(**FIELDS)
    fitted = compile_to_fit(config, 61, sharding.make_mesh(config), batch_of(config), min_grad_accum_steps=4)
    assert fitted.config.train.microbatch == 6


def test_resume_with_more_microbatches_says_that_bits_differ(tmp_path, caplog, monkeypatch):
    """A run resumes with its own microbatches unless they do not fit any more."""
    (tmp_path / "text.txt").write_text("".join(f"Line {i}: {i * 7 % 13} lazy dogs.\n" for i in range(300)))
    fields = {"tokenizer.vocab_size": 300, "data.files": str(tmp_path / "text.txt"), "data.cache": str(tmp_path)}
    fields |= {**TINY, "model.depth": 1, "mesh.data": 1, "eval.sample_tokens": 0, "eval.max_tokens": 100}

    def resume(steps):
        caplog.clear()
        with caplog.at_level("INFO", "slm_jax"):
            train(Config.load(**{**fields, "train.steps": steps}), tmp_path / "run")
        return [message for message in caplog.messages if "bit-identical" in message]

    assert resume(1) == []
    assert resume(2) == []
    plans = iter([1 << 60])  # the first program does not fit, the next one does
    monkeypatch.setattr(memory, "needed_memory", lambda compiled: next(plans, 0))
    (note,) = resume(3)
    assert note.startswith("note: each step now has 8 microbatches, before 1:")
    assert resume(4) == []  # needed is 0 now; the 8 of the last call are kept
    assert Run(tmp_path / "run").read_config().train.microbatch == 1
