"""Learning-rate schedules: linear warm-up, then cosine, warm-up-stable-decay or constant."""

from typing import Any

import optax

from slm_jax.config.schema import OptimizerConfig


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


def is_schedule_state(node: Any) -> bool:
    """Return whether a node of an optimizer's state is the schedule's step count."""
    return isinstance(node, optax.ScaleByScheduleState)
