"""Options that are given but have no effect, because of other options.

What is certainly a mistake is refused (`checks`). The combinations here are logged when a run starts and by
`python -m slm_jax.check`: a preset, a recipe, the weights of a warm start or an earlier version may have set one of the
two options, and such a config must stay readable.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from slm_jax.config.recipes import RECIPES
from slm_jax.config.sections import Sections

_DEFAULTS = Sections().flat()


class UnusedOption(NamedTuple):
    """An option without effect.

    Attributes:
        name: Its dotted name.
        text: One line: the option, its value and the reason.
    """

    name: str
    text: str


def unused_options(config: Sections) -> Iterator[UnusedOption]:
    """Yield the options that differ from their defaults and have no effect, as far as the config alone shows it.

    Those that depend on the files of a source are in `data.sources.unused_options`.
    """
    yield from _unused_model(config)
    yield from _unused_optimizer(config)
    yield from _unused_train(config)
    yield from _unused_tokenizer(config)
    yield from _unused_elsewhere(config)


def given_of(config: Sections, names: tuple[str, ...], reason: str) -> Iterator[UnusedOption]:
    """Yield those of some options that differ from their defaults.

    Args:
        config: The config.
        names: Dotted names of options without effect.
        reason: Words after "has no effect".
    """
    values = config.flat()
    for name in names:
        if values[name] != _DEFAULTS[name]:
            yield UnusedOption(name, f"{name} {_shown(values[name])} has no effect {reason}")


def _unused_model(config: Sections) -> Iterator[UnusedOption]:
    model = config.model
    length = config.train.sequence_length
    if model.window and not any(model.layer_windows):
        layers = f"model.window_pattern {model.window_pattern}" if model.window_pattern else "model.full_layers"
        reason = f"with {layers} and model.depth {model.depth}: every layer attends to all earlier tokens"
        yield from given_of(config, ("model.window", "model.window_pattern", "model.full_layers"), reason)
    elif model.window >= length:
        yield from given_of(config, ("model.window",), f"in training with train.sequence_length {length}")
    if model.mlp != "swiglu":
        yield from given_of(config, ("model.mlp_multiple",), f"with model.mlp {model.mlp}")
    rope = tuple(name for name in _DEFAULTS if name.startswith("model.rope_"))
    if len(model.nope_layers) == model.depth:
        yield from given_of(config, rope, "with model.nope_layers that name every layer")
    elif model.rope_scaling != "none" and model.rope_factor == 1 and model.rope_attention_factor in (0, 1):
        yield from given_of(config, tuple(n for n in rope if n != "model.rope_base"), "with model.rope_factor 1")
    if 0 < model.max_positions <= length:
        yield from given_of(config, ("model.max_positions",), f"with train.sequence_length {length}")
    if origin := _initial_weights(config):
        values = config.flat()
        names = ("model.init_std", "model.output_init")
        recipe = RECIPES[model.recipe]
        own = tuple(name for name in names if values[name] != recipe.get(name.partition(".")[2]))
        yield from given_of(config, own, f"with {origin}: the initial weights are given")


def _unused_optimizer(config: Sections) -> Iterator[UnusedOption]:
    optimizer = config.optimizer
    if optimizer.schedule != "wsd":
        reason = f"with optimizer.schedule {optimizer.schedule}"
        yield from given_of(config, ("optimizer.decay_fraction",), reason)
        if optimizer.schedule == "constant":
            yield from given_of(config, ("optimizer.final_lr_fraction",), reason)
    if config.lora.rank and optimizer.name != "adamw":
        names = ("optimizer.beta1",) if optimizer.name == "normuon" else ("optimizer.beta1", "optimizer.beta2")
        reason = (
            f"with lora.rank and optimizer.name {optimizer.name}: adapters are matrices, which AdamW does not update"
        )
        yield from given_of(config, names, reason)


def _unused_train(config: Sections) -> Iterator[UnusedOption]:
    train = config.train
    earliest = (train.stop_early + 1) * config.eval.every
    if train.stop_early and not train.minutes and earliest >= train.steps:
        reason = (
            f"with train.steps {train.steps} and eval.every {config.eval.every}: it ends a run after step {earliest}"
        )
        yield from given_of(config, ("train.stop_early",), f"{reason} at the earliest")
    if train.dtype == "float32":
        yield from given_of(config, ("train.residual_dtype",), "with train.dtype float32")


def _unused_tokenizer(config: Sections) -> Iterator[UnusedOption]:
    learned = ("tokenizer.lowercase", "tokenizer.byte_limit", "tokenizer.boundaries")
    origin = _initial_weights(config)
    if config.tokenizer.path and not origin:  # training compares the options with the tokenizer of initial weights
        names = ("tokenizer.vocab_size", "tokenizer.portable", *learned)
        yield from given_of(config, names, "with tokenizer.path: an existing tokenizer is as it is")
    elif config.tokenizer.portable:
        yield from given_of(config, learned, "with tokenizer.portable True")


def _unused_elsewhere(config: Sections) -> Iterator[UnusedOption]:
    if not config.eval.tasks:
        yield from given_of(config, ("eval.tasks_every", "eval.task_items"), "without eval.tasks")
    if not config.eval.sample_tokens:
        yield from given_of(config, ("eval.prompts",), "with eval.sample_tokens 0")
    health = config.health
    if health.on_spike == "ignore":
        names = ("health.deviations", "health.window", "health.warmup_steps")
        yield from given_of(config, names, "with health.on_spike ignore")
        if health.on_nan == "stop":
            yield from given_of(config, ("health.max_skips",), "with health.on_spike ignore and health.on_nan stop")


def _initial_weights(config: Sections) -> str:
    """Return the option that names existing weights; empty: the initial weights are random."""
    return next((f"init.{name}" for name in ("from_run", "from_hf") if getattr(config.init, name)), "")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
