"""Optimizer settings for training on with published weights, which differ from those for random ones."""

import math
from typing import Any

from slm_jax.config.sections import LoraConfig, OptimizerConfig, TrainConfig

# Pre-training moves the weights far, fine-tuning must not: it would lose what they know.
#
# name          Muon's updates are of equal size in all directions of a matrix. Weights that AdamW has trained, as those
#               of most published models, gain nothing from it (arXiv:2502.16982, section 3.5).
# lr            The default of transformers; 0.01 is for random weights.
# schedule      Linear decay to 0 after the warmup: wsd over the fraction 1.
# weight_decay  It pulls the weights toward 0, not toward where they start.
# beta2         Averages the gradient's square over 1,000 steps, as batches are small.
_SETTINGS: dict[str, Any] = {
    "name": "adamw",
    "lr": 5e-5,
    "schedule": "wsd",
    "decay_fraction": 1.0,
    "final_lr_fraction": 0.0,
    "weight_decay": 0.0,
    "beta2": 0.999,
}
_LORA_LR = 2e-4  # adapters start at 0 and take larger steps than the weights themselves (arXiv:2305.14314, appendix B)
_WARMUP_FRACTION = 0.03
_MAX_WARMUP_STEPS = 100


def fine_tuning_settings(steps: int, lora_rank: int = 0) -> dict[str, Any]:
    """Return the options of the section `optimizer` for a run that starts with published weights.

    Args:
        steps: The number of steps, `train.steps`.
        lora_rank: Rank of the adapters, `lora.rank`; 0: all parameters are trained.
    """
    warmup_steps = min(math.ceil(_WARMUP_FRACTION * steps), _MAX_WARMUP_STEPS)
    return {**_SETTINGS, **({"lr": _LORA_LR} if lora_rank else {}), "warmup_steps": warmup_steps}


def describe_fine_tuning(optimizer: OptimizerConfig, train: TrainConfig, lora: LoraConfig) -> str:
    """Return one line on the optimizer of a run that starts with published weights.

    Args:
        optimizer: Its options.
        train: Its length.
        lora: Its adapters.
    """
    settings = fine_tuning_settings(train.steps, lora.rank)
    used = [f"{name} {getattr(optimizer, name)}" for name in settings]
    other = [f"{name} {value}" for name, value in settings.items() if getattr(optimizer, name) != value]
    text = f"optimizer: {', '.join(used)}"
    if not other:
        return f"{text} (for fine-tuning; --optimizer.* changes them)"
    return f"{text}; the settings for fine-tuning differ: {', '.join(other)}"
