"""Steps that would do harm: noticed, and left out, inside the compiled step; the host only reads how it went.

A loss or gradient norm x is a spike if x > m + k s, with m and s² its exponentially weighted mean and variance over the
healthy steps so far (Finch 2009, "Incremental calculation of weighted mean and variance", section 9):

    a = max(2 / (window + 1), 1 / (n + 1)),  d = x - m,  m' = m + a d,  s²' = (1 - a) (s² + a d²)

so that for the first steps, n of them, they are the plain mean and variance. Six deviations over 128 steps are OLMo 2's
choice (arXiv:2501.00656, section 3.1 and its SkipStep optimizer). What is a spike, or not finite, is no part of them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.config.schema import HealthConfig
from slm_jax.training.optimizer import is_schedule
from slm_jax.utils.errors import UserError

_REPORT = ("in_a_row", "is_spike", "loss_limit", "grad_norm_limit")  # of the device, to `judge`; in no row


class Health(NamedTuple):
    """Running statistics, a part of the training state; those of loss and gradient norm, float32 [2]."""

    steps: jax.Array  # int32: healthy ones
    mean: jax.Array
    variance: jax.Array
    skipped: jax.Array  # int32: batches left out so far
    in_a_row: jax.Array  # int32: the last ones of these


def is_watched(config: HealthConfig) -> bool:
    """Whether the compiled step looks after its health. If not, it is the same program as without this module."""
    return config.on_nan == "skip" or config.on_spike != "ignore"


def begin() -> Health:
    """Before the first step."""
    count, two = jnp.zeros((), jnp.int32), jnp.zeros((2,), jnp.float32)
    return Health(count, two, two, count, count)


def examine(
    health: Health, config: HealthConfig, loss: jax.Array, grad_norm: jax.Array
) -> tuple[Health, jax.Array, dict[str, jax.Array]]:
    """(statistics after this step, whether to take the step, what `judge` wants to know) of two scalars."""
    x_2 = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    is_finite = jnp.all(jnp.isfinite(x_2))
    limit_2 = health.mean + config.deviations * jnp.sqrt(health.variance)
    limit_2 = jnp.where(health.steps >= config.warmup_steps, limit_2, jnp.inf)
    is_spike = is_finite & jnp.any(x_2 > limit_2) if config.on_spike != "ignore" else jnp.zeros((), bool)

    a = jnp.maximum(2 / (config.window + 1), 1 / (health.steps + 1))
    difference_2 = x_2 - health.mean
    is_healthy = is_finite & ~is_spike
    mean = jnp.where(is_healthy, health.mean + a * difference_2, health.mean)
    variance = jnp.where(is_healthy, (1 - a) * (health.variance + a * difference_2**2), health.variance)

    skip = jnp.zeros((), bool)
    if config.on_nan == "skip":
        skip |= ~is_finite
    if config.on_spike == "skip":
        skip |= is_spike
    after = Health(
        health.steps + is_healthy, mean, variance, health.skipped + skip, jnp.where(skip, health.in_a_row + 1, 0)
    )
    report = dict(zip(_REPORT, (after.in_a_row, is_spike, *limit_2), strict=True))
    if "skip" in (config.on_nan, config.on_spike):
        report["skipped"] = after.skipped
    return after, ~skip, report


def choose(take: jax.Array, new: Any, old: Any) -> Any:
    """New parameters and optimizer state, or the old ones; the schedule goes on in either case."""
    return jax.tree.map(lambda n, o: n if is_schedule(n) else jnp.where(take, n, o), new, old, is_leaf=is_schedule)


def judge(row: dict[str, Any], config: HealthConfig, advice: str) -> dict[str, Any]:
    """A step's row without the report, or UserError if the run has to stop. What is not finite in a skipped step's row
    becomes None."""
    report = {name: row.pop(name) for name in _REPORT if name in row}
    step = row["step"]
    for name, value in row.items():
        if not math.isfinite(value):
            if config.on_nan == "stop":
                raise UserError(f"{name} of step {step} is {value}: training has diverged. {advice}")
            row[name] = None
    if not report:
        return row
    if report["is_spike"] and config.on_spike == "stop":
        high = [name for name in ("loss", "grad_norm") if row[name] > report[f"{name}_limit"]]
        found = " and ".join(f"{n} of step {step} is {row[n]:.4g}, above {report[f'{n}_limit']:.4g}" for n in high)
        raise UserError(
            f"{found}: {config.deviations:g} deviations over its running mean (health.deviations). {advice}; or leave "
            "such batches out: the same command with --health.on_spike skip"
        )
    if report["in_a_row"] >= config.max_skips:
        raise UserError(
            f"{int(report['in_a_row'])} batches were skipped one after the other, the last of step {step} "
            f"(health.max_skips): training has diverged. {advice}"
        )
    if "skipped" in row:
        row["skipped"] = int(row["skipped"])
    return row


def layer_norms(tree: Any) -> dict[str, jax.Array]:
    """Euclidean norm of each layer of a tree of parameters, or of their gradients: scalars, and [L] for the blocks."""

    def squares(leaves: Any, axis: int) -> Any:
        return sum(jnp.sum(jnp.square(x), axis=tuple(range(axis, x.ndim))) for x in jax.tree.leaves(leaves))

    return {name: jnp.sqrt(squares(part, int(name == "blocks"))) for name, part in tree.items()}


def layers_row(step: int, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row of layers.jsonl of the norms of gradient, parameters and update: {"step", quantity: {layer: value}}."""
    row: dict[str, Any] = {"step": step}
    for quantity, norms in layers.items():
        row[quantity] = {}
        for name, value in norms.items():
            values = jax.device_get(value)
            each = {name: values} if values.ndim == 0 else {f"{name}.{i}": v for i, v in enumerate(values)}
            row[quantity] |= {k: float(v) if math.isfinite(v) else None for k, v in each.items()}
    row["update_ratio"] = {
        layer: update / param if param and update is not None else None
        for (layer, update), param in zip(row.pop("update_norm").items(), row["param_norm"].values(), strict=True)
    }
    return row
