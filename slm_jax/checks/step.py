"""Checks of the training step on the present devices: the batch divides, the step fits, and it lowers the loss."""

import math
from typing import Any

import jax
import numpy as np

from slm_jax.checks.finding import Finding, finding
from slm_jax.config.schema import Config
from slm_jax.distributed import sharding
from slm_jax.training import memory
from slm_jax.training.train_step import TrainState
from slm_jax.utils.batch import Arrays
from slm_jax.utils.errors import UserError


def devices(config: Config) -> tuple[Finding, jax.sharding.Mesh | None]:
    """Check that batch and model divide over the devices; return the mesh if they do."""
    expected = "batch and matrices divide over the mesh"
    try:
        mesh = sharding.make_mesh(config)
    except UserError as error:
        return finding("devices", False, str(error), expected), None
    found = f"{config.train.batch_size} sequences on {sharding.describe(mesh)}"
    return finding("devices", True, found, expected), mesh


def memory_fit(
    config: Config, vocab_size: int, mesh: jax.sharding.Mesh, batch: dict[str, jax.Array]
) -> tuple[Finding, memory.FittedStep | None]:
    """Check that the compiled step fits into free memory; return it if it does."""
    try:
        fitted = memory.compile_to_fit(config, vocab_size, mesh, batch)
    except UserError as error:
        return finding("memory", False, str(error), "a step that fits"), None
    count = fitted.config.train.grad_accum_steps
    found = f"{fitted.needed / 1e9:.3g} GB of a device for a step" + (f" in {count} microbatches" if count > 1 else "")
    expected = f"at most {fitted.limit / 1e9:.3g} GB"
    return finding("memory", fitted.needed <= fitted.limit, found, expected), fitted


def filled(widest: Arrays, batch: Arrays) -> Arrays:
    """Return a batch, which may be narrower, in the shape that the step is compiled for."""
    arrays = {name: array.copy() for name, array in widest.items()}
    for name, array in batch.items():
        arrays[name][:, : array.shape[1]] = array
    return arrays


def one_step(fitted: memory.FittedStep, state: TrainState, mesh: jax.sharding.Mesh, batch: Arrays) -> Finding:
    """Check that one step on a batch lowers its loss. The state is donated."""
    count = max(1, fitted.config.train.grad_accum_steps)
    rows = len(batch["input_ids"]) // count
    microbatches = [{k: v[i * rows : (i + 1) * rows] for k, v in batch.items()} for i in range(count)]

    def loss(params: Any) -> float:
        """Return the loss without dropout, one microbatch at a time."""
        sums = [fitted.steps.evaluate(params, sharding.shard_batch(mesh, microbatch)) for microbatch in microbatches]
        return sum(float(s.nll) for s in sums) / max(sum(float(s.tokens) for s in sums), 1)

    before = loss(state.weights)
    state, metrics = fitted.train(state, sharding.shard_batch(mesh, batch))
    after = loss(state.weights)
    norm = float(metrics["grad_norm"])
    ok = math.isfinite(after) and after < before and np.isfinite(norm)
    found = f"{before:.4f} to {after:.4f} at rate {float(metrics['lr']):.2e}, gradient norm {norm:.3g}"
    return finding("one step", ok, found, "a lower loss on the same batch")
