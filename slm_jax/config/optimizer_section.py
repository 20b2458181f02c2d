"""Options of the section `optimizer`: the optimizer and the learning-rate schedule."""

from typing import Literal

from slm_jax.config.option import Section, option

# The momentum at the start of its warm-up and at the end of its cooldown.
MIN_MOMENTUM = 0.85


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["muon", "normuon", "adamw"] = option(
        "muon",
        "muon: Muon for hidden matrices, AdamW for all other parameters; normuon: the same with NorMuon; adamw: AdamW "
        "for all.",
        common=True,
    )
    lr: float = option(
        0.01,
        "Peak learning rate; with muon and normuon the same for both parts. adamw alone needs a lower one, about "
        "0.001.",
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
    cautious_decay: bool = option(False, "Decay only the weights that the update moves toward 0 too.")
    clip: float = option(1.0, "Maximum global gradient norm; 0: no clipping.", ge=0)
    beta1: float = option(0.9, "Decay rate of AdamW's first moment.", ge=0, lt=1)
    beta2: float = option(0.95, "Decay rate of the second moment of AdamW and NorMuon.", ge=0, lt=1)
    orthogonalization: Literal["newton-schulz", "polar-express"] = option(
        "newton-schulz",
        "Iteration of Muon; newton-schulz: one polynomial five times; polar-express: five polynomials, more accurate.",
    )
    momentum: float = option(0.95, "Decay rate of Muon's momentum.", ge=0, lt=1)
    momentum_warmup_steps: int = option(0, "Steps over which Muon's momentum rises from 0.85; 0: none.", ge=0)
    momentum_cooldown_steps: int = option(0, "Last steps, over which Muon's momentum falls to 0.85; 0: none.", ge=0)
    average_decay: float = option(
        0.0,
        "Decay rate of a moving average of the parameters, which is validated, sampled and loaded in their place; 0: "
        "none.",
        ge=0,
        lt=1,
    )
