"""Compatibility of a config with existing weights."""

from collections.abc import Iterator
from typing import Any

from slm_jax.config.sections import Sections


def weight_conflicts(
    config: Sections, source: Sections, current: str = "current", saved: str = "saved"
) -> Iterator[str]:
    """Yield the reasons why a run cannot start from the weights of another one.

    Options with the trait `shapes_weights` must agree; dropout, window, rotary base and execution options may differ.

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


def _has_momentum_schedule(config: Sections) -> bool:
    return bool(config.optimizer.momentum_warmup_steps or config.optimizer.momentum_cooldown_steps)


def _resolved(config: Sections, name: str) -> Any:
    """Return the value of an option with its default of 0 resolved."""
    if name == "model.kv_heads":
        return config.model.kv_heads or config.model.heads
    return config.flat()[name]
