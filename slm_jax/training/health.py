"""Detect non-finite or spiking losses and gradients, and skip such updates inside the compiled step.

A loss or gradient norm x is a spike if x > m + k s, with m and s² its exponentially weighted mean and variance over the
healthy steps so far (Finch 2009, "Incremental calculation of weighted mean and variance", section 9):

    a = max(2 / (window + 1), 1 / (n + 1)),  d = x - m,  m' = m + a d,  s²' = (1 - a) (s² + a d²)

so that over the first steps, n of them, they are the plain mean and variance. Six deviations over 128 steps are OLMo
2's choice (arXiv:2501.00656, section 3.1 and its SkipStep optimizer). Values that are spikes or not finite do not enter
the statistics. Overflows of scaled float16 gradients (`options.loss_scale`) are skipped whatever the policy. They are
counted, but not as consecutive skips: the scale has a limit of its own.

The device decides whether a step is taken (`update`, `select`), the host reads the outcome one step later and stops the
run if the config says so (`check`).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.config.schema import HealthConfig
from slm_jax.distributed.partitioning import REPLICATED, Partitions
from slm_jax.training.schedule import is_schedule_state
from slm_jax.utils.errors import TrainingError

PARTITIONS: Partitions = {("health", "mean"): REPLICATED, ("health", "variance"): REPLICATED}
"""Partitions of the statistics in a training state."""

_DIAGNOSTICS = ("in_a_row", "is_spike", "loss_limit", "grad_norm_limit")  # metrics that only `check` reads


class Health(NamedTuple):
    """Running statistics, a part of the training state.

    Attributes:
        steps: Healthy steps so far, int32.
        mean: Means of loss and gradient norm, float32 [2].
        variance: Their variances, float32 [2].
        skipped: Updates skipped so far, int32.
        in_a_row: Updates skipped since the last one that was taken, int32.
    """

    steps: jax.Array
    mean: jax.Array
    variance: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


def is_enabled(config: HealthConfig) -> bool:
    """Return whether the config has the compiled step check its health; loss scaling requires that too.

    If neither does, the program of the step is the same as without this module.
    """
    return config.on_nan == "skip" or config.on_spike != "ignore"


def init() -> Health:
    """Return the statistics before the first step."""
    count = jnp.zeros((), jnp.int32)
    two = jnp.zeros((2,), jnp.float32)
    return Health(steps=count, mean=two, variance=two, skipped=count, in_a_row=count)


def update(
    health: Health, config: HealthConfig, loss: jax.Array, grad_norm: jax.Array, overflow: jax.Array | None = None
) -> tuple[Health, jax.Array, dict[str, jax.Array]]:
    """Update the statistics with one step and decide whether the step is taken.

    Args:
        health: Statistics before the step.
        config: Policies and thresholds.
        loss: Mean loss of the step's batch, scalar.
        grad_norm: Norm of its gradient, scalar.
        overflow: Whether the gradient overflowed because of the loss scale, bool scalar; None without loss scaling.

    Returns:
        (statistics, is_taken, diagnostics): is_taken is a bool scalar; diagnostics are metrics for `check`.
    """
    x_2 = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    is_finite = jnp.all(jnp.isfinite(x_2))
    limit_2 = health.mean + config.deviations * jnp.sqrt(health.variance)
    limit_2 = jnp.where(health.steps >= config.warmup_steps, limit_2, jnp.inf)
    is_spike = jnp.zeros((), bool)
    if config.on_spike != "ignore":
        is_spike = is_finite & jnp.any(x_2 > limit_2)

    # The formulas at the top of the file; unhealthy steps leave the statistics as they are.
    a = jnp.maximum(2 / (config.window + 1), 1 / (health.steps + 1))
    difference_2 = x_2 - health.mean
    is_healthy = is_finite & ~is_spike
    mean = jnp.where(is_healthy, health.mean + a * difference_2, health.mean)
    variance = jnp.where(is_healthy, (1 - a) * (health.variance + a * difference_2**2), health.variance)

    is_skipped = jnp.zeros((), bool)
    if config.on_nan == "skip":
        is_skipped |= ~is_finite
    if config.on_spike == "skip":
        is_skipped |= is_spike
    in_a_row = jnp.where(is_skipped, health.in_a_row + 1, 0)
    if overflow is not None:
        is_skipped |= overflow
        in_a_row = jnp.where(overflow, health.in_a_row, in_a_row)
    updated = Health(
        steps=health.steps + is_healthy,
        mean=mean,
        variance=variance,
        skipped=health.skipped + is_skipped,
        in_a_row=in_a_row,
    )
    diagnostics = dict(zip(_DIAGNOSTICS, (updated.in_a_row, is_spike, *limit_2), strict=True))
    if overflow is not None or "skip" in (config.on_nan, config.on_spike):
        diagnostics["skipped"] = updated.skipped
    return updated, ~is_skipped, diagnostics


def select(is_taken: jax.Array, new: Any, old: Any) -> Any:
    """Return the new parameters and optimizer state if the step is taken, else the old ones.

    The schedule's step count is the new one in both cases: the learning rate follows the number of the step.
    """

    def select_leaf(new_leaf: Any, old_leaf: Any) -> Any:
        return new_leaf if is_schedule_state(new_leaf) else jnp.where(is_taken, new_leaf, old_leaf)

    return jax.tree.map(select_leaf, new, old, is_leaf=is_schedule_state)


def check(row: dict[str, Any], config: HealthConfig, advice: str) -> dict[str, Any]:
    """Check the metrics of a step on the host.

    Args:
        row: Metrics by name, "step" among them; the diagnostics are removed from it. None is accepted: an overflow.
        config: Policies and thresholds.
        advice: What to do about a diverged run, the end of the error message.

    Returns:
        The row without diagnostics. Values that are not finite, of a skipped step, are None.

    Raises:
        TrainingError: If the config's policy is to stop the run, or if too many updates in a row were skipped.
    """
    diagnostics = {name: row.pop(name) for name in _DIAGNOSTICS if name in row}
    step = row["step"]
    for name, value in row.items():
        if value is not None and not math.isfinite(value):
            if config.on_nan == "stop":
                if "loss_scale" in row:  # no lower scale helps the forward pass
                    advice += "; or with --train.dtype float32, if this model needs a wider range than float16"
                raise TrainingError(f"{name} of step {step} is {value}: training has diverged. {advice}")
            row[name] = None
    if not diagnostics:
        return row
    if diagnostics["is_spike"] and config.on_spike == "stop":
        high = [name for name in ("loss", "grad_norm") if row[name] > diagnostics[f"{name}_limit"]]
        spikes = " and ".join(
            f"{name} of step {step} is {row[name]:.4g}, above {diagnostics[f'{name}_limit']:.4g}" for name in high
        )
        raise TrainingError(
            f"{spikes}: {config.deviations:g} deviations over its running mean (health.deviations). {advice}; or skip "
            "such batches: the same command with --health.on_spike skip"
        )
    if diagnostics["in_a_row"] >= config.max_skips:
        raise TrainingError(
            f"{int(diagnostics['in_a_row'])} batches in a row were skipped, the last one at step {step} "
            f"(health.max_skips): training has diverged. {advice}"
        )
    if "skipped" in row:
        row["skipped"] = int(row["skipped"])
    return row
