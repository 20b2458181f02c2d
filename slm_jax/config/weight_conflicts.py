"""Compatibility of a config with existing weights."""

from collections.abc import Iterator
from typing import Any

from slm_jax.config.model_section import ModelConfig
from slm_jax.config.sections import Sections

# Model options with another value of which the same weights compute something else.
CHANGE_FUNCTION: tuple[str, ...] = tuple(
    name
    for name in Sections.fields()
    if name.startswith("model.")
    and name != "model.max_positions"  # only stated by exports
    and not any(name in Sections.fields_with(trait) for trait in ("shapes_weights", "training_only", "execution"))
)


def weight_conflicts(
    config: Sections, source: Sections, current: str = "current", saved: str = "saved"
) -> Iterator[str]:
    """Yield the reasons why a run cannot start from the weights of another one.

    Options with the trait `shapes_weights` must agree; dropout and execution options may differ, and so may those that
    `changed_function` names.

    Args:
        config: Config of the new run.
        source: Config of the run with the weights.
        current: Words after a value of `config`.
        saved: Words after a value of `source`.
    """
    for name in Sections.fields():
        if name in Sections.fields_with("shapes_weights"):
            new, old = _resolved(config, name), _resolved(source, name)
            if new != old:
                yield f"{name}: {old!r} {saved}, {new!r} {current}"
    if config.init.optimizer == "keep" and config.optimizer.name != source.optimizer.name:
        yield (
            f"optimizer.name: {source.optimizer.name!r} {saved}, {config.optimizer.name!r} {current}; moments can be "
            "kept with the same optimizer only (init.optimizer fresh starts new ones)"
        )
    if config.init.optimizer == "keep" and _has_momentum_schedule(config) != _has_momentum_schedule(source):
        yield (
            "optimizer.momentum_warmup_steps, momentum_cooldown_steps: given in one of the runs only; moments can be "
            "kept if both or neither have a schedule of the momentum (init.optimizer fresh starts new ones)"
        )
    if config.init.optimizer == "keep" and source.lora.rank:
        yield (
            f"lora.rank: {source.lora.rank} {saved}; its optimizer state is that of adapters, which are merged into "
            "the weights: use init.optimizer fresh"
        )


def changed_function(new: ModelConfig, old: ModelConfig) -> str:
    """Return the options by which a model computes something else than another one with the same weights.

    Args:
        new: The model that starts with the weights.
        old: The model that the weights were trained as.

    Returns:
        Each option with both values: `model.rope_base 10000 before, 500000 now`; empty: none.
    """
    if new.layer_windows == old.layer_windows:  # by whatever options
        new = new.model_copy(update={name: getattr(old, name) for name in _WINDOW_OPTIONS})
    changes = []
    for name in CHANGE_FUNCTION:
        field = name.partition(".")[2]
        before, now = getattr(old, field), getattr(new, field)
        if before != now:
            changes.append(f"{name} {_shown(before)} before, {_shown(now)} now")
    return "; ".join(changes)


_WINDOW_OPTIONS = ("window", "full_layers", "window_pattern")


def _shown(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else repr(value)


def _has_momentum_schedule(config: Sections) -> bool:
    return bool(config.optimizer.momentum_warmup_steps or config.optimizer.momentum_cooldown_steps)


def _resolved(config: Sections, name: str) -> Any:
    """Return the value of an option with its default of 0 resolved; None if it has no effect."""
    if name == "model.kv_heads":
        return config.model.kv_heads or config.model.heads
    if name == "model.head_dim":
        return config.model.head_width
    if name == "model.mlp_multiple" and config.model.mlp != "swiglu":
        return None
    return config.flat()[name]
