"""Skipped updates: what `health` and the loss scale decide, applied inside the compiled step."""

import jax.numpy as jnp

from slm_jax.config.schema import HealthConfig
from slm_jax.training import health
from slm_jax.training.options import loss_scale
from slm_jax.training.train_step import Outcome, TrainState


def skip_unhealthy(config: HealthConfig, before: TrainState, outcome: Outcome) -> Outcome:
    """Return the outcome of a step, with the parameters and moments from before it if the step is skipped.

    The next loss scale, and the metrics of health and of the scale, are added.

    Args:
        config: Health policies.
        before: State before the step.
        outcome: The step, without statistics and loss scale.
    """
    new, metrics = outcome.state, outcome.metrics
    overflow = None
    if before.loss_scale:
        overflow = loss_scale.is_overflow(metrics["loss"], metrics["grad_norm"])
        grad_norm = loss_scale.without_nan(metrics["grad_norm"], overflow)
        metrics = metrics | {"grad_norm": grad_norm, "loss_scale": before.loss_scale.scale}
        new = new._replace(loss_scale=loss_scale.update(before.loss_scale, overflow, jnp.isfinite(metrics["loss"])))
    statistics, is_taken, diagnostics = health.update(
        before.health, config, metrics["loss"], metrics["grad_norm"], overflow
    )
    params, opt_state, average = health.select(
        is_taken, (new.params, new.opt_state, new.average), (before.params, before.opt_state, before.average)
    )
    new = new._replace(params=params, opt_state=opt_state, average=average, health=statistics)
    return outcome._replace(state=new, metrics=metrics | diagnostics)
