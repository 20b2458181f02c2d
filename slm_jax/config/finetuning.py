"""Optimizer settings for training on with existing weights, which differ from those for random ones."""

import math
from typing import Any

from slm_jax.config.optimizer_section import OptimizerConfig
from slm_jax.config.sections import LoraConfig, TrainConfig

# Adapters start at 0 and take larger steps than the weights themselves (arXiv:2305.14314, appendix B).
_LR = 5e-5
_LORA_LR = 2e-4
# Preferences need smaller steps than text, and wide models smaller ones than narrow models: these, divided by the
# width. 2e-6 for a width of 2,048, in the range of published recipes (arXiv:2310.16944). With a width of 128, 100 steps
# at 2e-5 left the perplexity of held-out responses as it was (1.20), at 1e-4 it rose (1.74).
_DPO_LR = 0.005
_DPO_LORA_LR = 0.05

# Pre-training moves the weights far, fine-tuning must not: it would lose what they know.
#
# name          Muon's updates are of equal size in all directions of a matrix. Weights that AdamW has trained, as those
#               of most published models, gain nothing from it (arXiv:2502.16982, section 3.5).
# lr            See above; for text the default of transformers. 0.01 is for random weights.
# schedule      Linear decay to 0 after the warmup: wsd over the fraction 1.
# weight_decay  It pulls the weights toward 0, not toward where they start.
# beta2         Averages the gradient's square over 1,000 steps, as batches are small.
_SETTINGS: dict[str, Any] = {
    "name": "adamw",
    "lr": _LR,
    "schedule": "wsd",
    "decay_fraction": 1.0,
    "final_lr_fraction": 0.0,
    "weight_decay": 0.0,
    "beta2": 0.999,
}
_WARMUP_FRACTION = 0.03
_MAX_WARMUP_STEPS = 100


def fine_tuning_settings(steps: int, width: int, lora_rank: int = 0, objective: str = "next-token") -> dict[str, Any]:
    """Return the options of the section `optimizer` for a run that starts with existing weights.

    Args:
        steps: The number of steps, `train.steps`.
        width: Width of the model, `model.dim`.
        lora_rank: Rank of the adapters, `lora.rank`; 0: all parameters are trained.
        objective: `train.objective`.
    """
    warmup_steps = min(math.ceil(_WARMUP_FRACTION * steps), _MAX_WARMUP_STEPS)
    rate = _LORA_LR if lora_rank else _LR
    if objective == "dpo":
        rate = float(f"{(_DPO_LORA_LR if lora_rank else _DPO_LR) / width:.1g}")
    return {**_SETTINGS, "lr": rate, "warmup_steps": warmup_steps}


def describe_fine_tuning(optimizer: OptimizerConfig, train: TrainConfig, lora: LoraConfig, width: int) -> str:
    """Return one line on the optimizer of a run that starts with existing weights.

    Args:
        optimizer: Its options.
        train: Its length and objective.
        lora: Its adapters.
        width: Width of its model.
    """
    settings = fine_tuning_settings(train.steps, width, lora.rank, train.objective)
    used = [f"{name} {getattr(optimizer, name)}" for name in settings]
    other = [f"{name} {value}" for name, value in settings.items() if getattr(optimizer, name) != value]
    text = f"optimizer: {', '.join(used)}"
    if not other:
        return f"{text} (for fine-tuning; --optimizer.* changes them)"
    return f"{text}; the settings for fine-tuning differ: {', '.join(other)}"
