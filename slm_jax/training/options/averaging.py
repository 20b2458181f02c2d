"""The exponential moving average of the parameters (Polyak and Juditsky 1992), kept in the training state.

After n averaged steps with the decay d, a parameter's average is Σ dⁿ⁻ᵏ p(k) / Σ dⁿ⁻ᵏ over the steps k = 1..n: the
correction of the bias is in the stored value, so that initial weights never enter and it can be used at any time.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.training.train_step import Outcome, TrainState


def init(params: Any) -> dict[str, Any]:
    """Return the average before the first step.

    Args:
        params: Initial parameters, which are the average until a step was taken.
    """
    return {"params": jax.tree.map(jnp.copy, params), "count": jnp.zeros((), jnp.int32)}


def update(average: dict[str, Any], params: Any, decay: float) -> dict[str, Any]:
    """Return the average after a step.

    Args:
        average: The average before it.
        params: The parameters after it.
        decay: Factor of all earlier weights.
    """
    count = average["count"] + 1
    # (1 - d) / (1 - dⁿ), which is 1 at first.
    log_decay = jnp.float32(math.log(decay))
    weight = jnp.expm1(log_decay) / jnp.expm1(count * log_decay)
    means = jax.tree.map(lambda mean, p: mean + weight * (p - mean), average["params"], params)
    return {"params": means, "count": count}


def average_step(decay: float, before: TrainState, outcome: Outcome) -> Outcome:
    """Return the outcome of a step with the average after it, see `update`."""
    average = update(before.average, outcome.state.params, decay)
    return outcome._replace(state=outcome.state._replace(average=average))
