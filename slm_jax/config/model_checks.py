"""Validation of the model's options against each other: heads, layers that differ, rotary frequencies."""

import math
from collections.abc import Iterator

from slm_jax.config.model_section import ModelConfig
from slm_jax.config.problem import Problem, any_of, multiples


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield all problems that involve several options of the model."""
    yield from _head_problems(model)
    yield from _layer_problems(model)


def _head_problems(model: ModelConfig) -> Iterator[Problem]:
    names = ("model.dim", "model.heads")
    dims = any_of(multiples(model.dim, 2 * model.heads))
    if model.head_dim:
        if model.head_dim % 2:
            even = any_of(multiples(model.head_dim, 2))
            yield ("model.head_dim",), f"model.head_dim {model.head_dim} must be even, for rotary positions: use {even}"
    elif model.dim % model.heads:
        fitting = [n for n in range(1, model.dim + 1) if model.dim % n == 0 and (model.dim // n) % 2 == 0]
        fitting.sort(key=lambda n: abs(n - model.heads))
        heads = f"{any_of(fitting[:2])} heads, or " if fitting else ""
        yield (
            names,
            f"model.dim {model.dim} is not divisible by model.heads {model.heads} into heads of even width: "
            f"use {heads}dim {dims}",
        )
    elif (model.dim // model.heads) % 2:
        yield (
            names,
            f"model.dim / model.heads = {model.dim // model.heads} is odd, but rotary positions pair the channels of a "
            f"head: use dim {dims}",
        )
    if model.kv_heads and model.heads % model.kv_heads:
        divisors = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        yield (
            ("model.heads", "model.kv_heads"),
            f"model.heads {model.heads} is not divisible by model.kv_heads {model.kv_heads}: use one of {divisors}",
        )


def _layer_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield problems of layers that differ, and of scaled rotary frequencies."""
    for name in ("model.full_layers", "model.nope_layers", "model.value_embeddings"):
        layers = getattr(model, name.removeprefix("model."))
        if any(not 0 <= layer < model.depth for layer in layers) or len(set(layers)) < len(layers):
            text = f"{name} {list(layers)}: name layers from 0 to {model.depth - 1} (model.depth), each once"
            yield (name, "model.depth"), text
    for name, value in (("full_layers", model.full_layers), ("window_pattern", model.window_pattern)):
        if value and not model.window:
            text = f"model.{name} has no effect without model.window: leave it out, or give a window"
            yield (f"model.{name}", "model.window"), text
    if model.full_layers and model.window_pattern:
        text = "model.full_layers and window_pattern both say which layers have the window: leave one of them out"
        yield ("model.full_layers", "model.window_pattern"), text
    names = ("model.rope_scaling", "model.rope_original_length", "model.rope_factor")
    if model.rope_scaling in ("llama3", "yarn") and not model.rope_original_length:
        yield names, f"model.rope_scaling {model.rope_scaling} needs {names[1]}, the sequence length before it"
    for name, kinds in _ROPE_OPTIONS.items():
        if model.rope_scaling not in kinds and getattr(model, name) != type(model).model_fields[name].default:
            allowed = " or ".join((", ".join(kinds[:-1]), kinds[-1]) if kinds[:-1] else kinds)
            text = f"model.{name} {getattr(model, name):g} has no effect without model.rope_scaling: {allowed}"
            yield ("model.rope_scaling", f"model.{name}"), text
    if model.rope_scaling == "yarn" and model.rope_original_length:
        yield from _yarn_problems(model)
    if model.rope_low_turns >= model.rope_high_turns:
        text = f"model.rope_low_turns {model.rope_low_turns:g} must be below rope_high_turns {model.rope_high_turns:g}"
        yield ("model.rope_low_turns", "model.rope_high_turns"), text


# The kinds of model.rope_scaling for which an option has an effect.
_ROPE_OPTIONS = {
    "rope_factor": ("linear", "llama3", "yarn"),
    "rope_original_length": ("llama3", "yarn"),
    "rope_low_turns": ("llama3", "yarn"),
    "rope_high_turns": ("llama3", "yarn"),
    "rope_attention_factor": ("yarn",),
}


def _yarn_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield problems of lengths for which YaRN's ramp over the channels would run backwards (model/rotary.py)."""

    def channel(turns: float) -> float:
        ratio = model.rope_original_length / (turns * 2 * math.pi)
        return model.head_width * math.log(ratio) / (2 * math.log(model.rope_base))

    names = ("model.rope_scaling", "model.rope_original_length", "model.rope_low_turns", "model.rope_high_turns")
    length = f"model.rope_original_length {model.rope_original_length}"
    if channel(model.rope_low_turns) <= -1:
        least = math.ceil(2 * math.pi * model.rope_low_turns)
        yield (
            names,
            f"{length} is too short for yarn, no channel makes rope_low_turns {model.rope_low_turns:g} turns in it: "
            f"give {least} or more, or rope_scaling linear",
        )
    if channel(model.rope_high_turns) >= model.head_width:
        yield (
            names,
            f"{length} is too long for yarn, every channel makes more than rope_high_turns {model.rope_high_turns:g} "
            "turns in it: raise rope_high_turns, or leave rope_scaling out",
        )
