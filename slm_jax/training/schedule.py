"""Schedules of the learning rate (linear warm-up, then cosine, warm-up-stable-decay or constant) and the momentum."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from slm_jax.config.optimizer_section import MIN_MOMENTUM, OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, from 0.

    To add a schedule, add its name to `OptimizerConfig.schedule` and a branch here.

    Args:
        config: Peak, warm-up, schedule and floor. "wsd" is constant, then decays linearly over `decay_fraction` of the
            steps after the warm-up (warm-up-stable-decay, MiniCPM, arXiv:2404.06395).
        steps: Optimizer steps of the run.
    """
    peak = config.lr
    warmup = config.warmup_steps
    floor = config.lr * config.final_lr_fraction
    rest = max(1, steps - warmup)
    if config.schedule == "cosine":
        after_warmup = optax.cosine_decay_schedule(peak, rest, alpha=config.final_lr_fraction)
    elif config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * rest))
        after_warmup = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, floor, decay)], [rest - decay]
        )
    else:
        after_warmup = optax.constant_schedule(peak)
    # The warm-up starts at peak / (warmup + 1), not at 0, which would waste the first step.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup) if warmup else after_warmup
    return optax.join_schedules([rise, after_warmup], [warmup])


def make_momentum(config: OptimizerConfig, steps: int) -> float | optax.Schedule:
    """Return Muon's momentum, constant or as a function of the step, from 0.

    It rises linearly from 0.85 over the first `momentum_warmup_steps` and falls back to it over the last
    `momentum_cooldown_steps`, as in the records of modded-nanogpt.

    Args:
        config: Momentum and the lengths of its warm-up and cooldown.
        steps: Optimizer steps of the run.
    """
    if not (config.momentum_warmup_steps or config.momentum_cooldown_steps):
        return config.momentum

    def momentum(count: jax.Array) -> jax.Array:
        rise = count / config.momentum_warmup_steps if config.momentum_warmup_steps else 1.0
        fall = (steps - count) / config.momentum_cooldown_steps if config.momentum_cooldown_steps else 1.0
        share = jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)
        return MIN_MOMENTUM + (config.momentum - MIN_MOMENTUM) * share

    return momentum


def is_schedule_state(node: Any) -> bool:
    """Return whether a node of an optimizer's state is the schedule's step count."""
    return isinstance(node, optax.ScaleByScheduleState)
