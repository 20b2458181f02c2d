"""Options of the section `optimizer`: the optimizer and the learning-rate schedule."""

from typing import Literal

from slm_jax.config.option import Section, option


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["muon", "adamw"] = option(
        "muon", "muon: Muon for hidden matrices, AdamW for all other parameters; adamw: AdamW for all.", common=True
    )
    lr: float = option(
        0.01,
        "Peak learning rate; with muon the same for both of its parts. adamw alone needs a lower one, about 0.001.",
        common=True,
        gt=0,
    )
    embedding_lr_scale: float = option(
        1.0, "Learning rate of the embedding, with tied weights the head as well, as a multiple of lr.", ge=0
    )
    head_lr_scale: float = option(1.0, "Learning rate of an untied head as a multiple of lr.", ge=0)
    vector_lr_scale: float = option(
        1.0, "Learning rate of vectors (norm scales, biases, other scales) as a multiple of lr.", ge=0
    )
    warmup_steps: int = option(20, "Steps of linear warmup, part of train.steps.", ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = option(
        "wsd", "After warmup; cosine: cosine decay to the final rate; wsd: constant, then linear decay to it."
    )
    decay_fraction: float = option(
        0.5, "Fraction of the steps after warmup that wsd decays for, at the end.", gt=0, le=1
    )
    final_lr_fraction: float = option(0.0, "Final learning rate as a fraction of the peak.", ge=0, le=1)
    weight_decay: float = option(0.1, "Decoupled weight decay of matrices; norm scales are not decayed.", ge=0)
    clip: float = option(1.0, "Largest global gradient norm; 0: no clipping.", ge=0)
    beta1: float = option(0.9, "Decay rate of AdamW's first moment.", ge=0, lt=1)
    beta2: float = option(0.95, "Decay rate of AdamW's second moment.", ge=0, lt=1)
