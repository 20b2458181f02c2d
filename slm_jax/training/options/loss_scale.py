"""Dynamic loss scaling: training in float16, whose gradients would underflow or overflow without it.

float16 holds values between 6e-8 and 65,504. The loss is multiplied by a scale before it is differentiated, so that the
gradients of activations lie in that range, and the gradients of parameters, which are float32, are divided by it
(Micikevicius et al. 2018, arXiv:1710.03740, section 3.2). If a gradient is not finite, the update is skipped and the
scale halved; after 2,000 updates in a row without an overflow it is doubled. These constants are those of PyTorch's
GradScaler. Clipping, norms and metrics see unscaled gradients.

The loss that is scaled is the sum over the predicted positions, not their mean, so that the scale does not depend on
the size of the batch. The initial scale and, as a power of two, the lowest one are those of fairseq, which sums, too.
All scales are powers of two, which change no digit of a gradient in range.

The state is a part of the training state: a resumed run continues with the same scale. `update` runs inside the
compiled step, on values that are the same on all devices; `check` reads the outcome on the host one step later.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.utils.errors import TrainingError

INITIAL_SCALE = 2.0**7
"""The scale of the first step."""

MIN_SCALE = 2.0**-13
"""The scale at which a further overflow ends the run."""

MAX_SCALE = 2.0**24
"""The scale that is not exceeded: far above the largest one that float16 gradients allow."""

GROWTH_INTERVAL = 2000
"""Updates in a row without an overflow after which the scale is doubled."""


class LossScale(NamedTuple):
    """The scale of the loss, a part of the training state.

    Attributes:
        scale: Factor of the summed loss, float32.
        good_steps: Updates in a row without an overflow since the scale was last changed, int32.
    """

    scale: jax.Array
    good_steps: jax.Array


def is_needed(dtype: jnp.dtype) -> bool:
    """Return whether training in a compute dtype needs loss scaling; without it the state of a step has none."""
    return dtype == jnp.float16


def init() -> LossScale:
    """Return the state before the first step."""
    return LossScale(scale=jnp.full((), INITIAL_SCALE, jnp.float32), good_steps=jnp.zeros((), jnp.int32))


def is_overflow(loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Return whether a scale was too large for the gradient, bool scalar.

    The forward pass is not scaled. A loss that is not finite is for the health policy to judge: no lower scale helps.

    Args:
        loss: Mean loss of the step's batch.
        grad_norm: Global norm of its gradient; not finite if a single gradient on any device is not.
    """
    return jnp.isfinite(loss) & ~jnp.isfinite(grad_norm)


def update(state: LossScale, overflow: jax.Array, is_finite: jax.Array | bool = True) -> LossScale:
    """Return the scale of the next step.

    Args:
        state: The scale of this step.
        overflow: Whether its gradient overflowed, bool scalar.
        is_finite: Whether its loss is finite, bool scalar; the gradient of another one says nothing about the scale.
    """
    good_steps = jnp.where(overflow, 0, state.good_steps + jnp.where(is_finite, 1, 0))
    grows = good_steps >= GROWTH_INTERVAL
    grown = jnp.where(grows, jnp.minimum(2 * state.scale, MAX_SCALE), state.scale)
    scale = jnp.where(overflow, jnp.maximum(state.scale / 2, MIN_SCALE), grown)
    return LossScale(scale=scale, good_steps=jnp.where(grows, 0, good_steps))


def without_nan(metrics: Any, overflow: jax.Array) -> Any:
    """Return metrics of a gradient, infinite where they are NaN because of an overflow.

    The overflow is expected: `train.debug`, which stops at the first NaN among the results of a step, must not see one.
    """
    return jax.tree.map(lambda x: jnp.where(overflow & jnp.isnan(x), jnp.inf, x), metrics)


def check(row: dict[str, Any], advice: str) -> dict[str, Any]:
    """Check the metrics of a step on the host.

    Args:
        row: Metrics by name; without `loss_scale`, the scale of the step, it is returned as it is.
        advice: What to do about a diverged run.

    Returns:
        The row, its gradient norm None if it overflowed.

    Raises:
        TrainingError: The gradient overflowed at the lowest scale.
    """
    if "loss_scale" not in row or not math.isfinite(row["loss"]) or math.isfinite(row["grad_norm"]):
        return row
    if row["loss_scale"] <= MIN_SCALE:
        raise TrainingError(
            f"the gradient of step {row['step']} overflows float16 even at the lowest loss scale, {MIN_SCALE:.2g}: "
            f"training has diverged, or this model needs a wider range. {advice}; or with --train.dtype float32"
        )
    return row | {"grad_norm": None}
