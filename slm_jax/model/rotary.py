"""Rotary position embeddings, with the scalings to longer texts that published models use.

Frequencies are computed in float64 and rounded once: a float32 power is off by an ulp for some channels, which at
position 1,000 is an error of 1e-4 in the angle.

Shapes: B batch, T tokens, H heads, K channels of a head.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.config.schema import ModelConfig
from slm_jax.distributed.platform import Platform

RotaryTables = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]
"""(cos, sin), float32 [B, T, 1, K / 2] each."""

_SIGNS = np.array([[-1.0], [1.0]], np.float32)  # of the sines of the two halves


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Return the angle of each pair of channels per position (arXiv:2104.09864), scaled by `rope_scaling`.

    Returns:
        float32 [K / 2], in radians per token.
    """
    width = config.head_width
    frequency = config.rope_base ** (-np.arange(0, width, 2) / width)
    if config.rope_scaling == "linear":
        frequency = frequency / config.rope_factor
    elif config.rope_scaling == "llama3":
        frequency = _llama3(frequency, config)
    elif config.rope_scaling == "yarn":
        frequency = _yarn(frequency, config)
    return frequency.astype(np.float32)


def rotary_scale(config: ModelConfig) -> float:
    """Return the factor of rotated queries and keys, 1 except for YaRN (arXiv:2309.00071, section 3.4)."""
    if config.rope_scaling != "yarn":
        return 1.0
    return config.rope_attention_factor or yarn_scale(config.rope_factor)


def yarn_scale(factor: float, slope: float = 1.0) -> float:
    """Return YaRN's factor of queries and keys, 0.1 · slope · ln(factor) + 1 (arXiv:2309.00071, equation 22)."""
    return 0.1 * slope * math.log(factor) + 1.0


def rotary_tables(positions_BxT: jax.Array | np.ndarray, config: ModelConfig) -> RotaryTables:
    """Return cos and sin of the rotary angles (arXiv:2104.09864), times the scale of YaRN.

    NumPy positions give NumPy tables: constants of the compiled program, which would otherwise recompute them wherever
    they are used.

    Args:
        positions_BxT: Position of each token.
        config: The model's options.

    Returns:
        float32 [B, T, 1, K / 2] each.
    """
    xp = np if isinstance(positions_BxT, np.ndarray) else jnp
    angle = positions_BxT.astype(np.float32)[:, :, None, None] * rotary_frequencies(config)
    cos, sin = xp.cos(angle), xp.sin(angle)
    scale = np.float32(rotary_scale(config))
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


def rotate(x_BxTxHxK: jax.Array, cos: Any, sin: Any, platform: Platform | None = None) -> jax.Array:
    """Return x with each pair of channels (i, i + K/2) rotated by the angle of its position, in the dtype of x."""
    x_f32 = x_BxTxHxK.astype(jnp.float32)
    if platform is None or platform.name != "gpu":
        a, b = jnp.split(x_f32, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxK.dtype)
    # GPUs: a concatenation is computed apart from what is before it, a reversal together, also in the gradient.
    halves = x_f32.reshape(*x_f32.shape[:-1], 2, -1)
    exchanged = jax.lax.rev(halves, (halves.ndim - 2,)) * _SIGNS
    rotated = halves * cos[..., None, :] + exchanged * sin[..., None, :]
    return rotated.reshape(x_f32.shape).astype(x_BxTxHxK.dtype)


def _llama3(frequency: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Divide low frequencies by the factor, keep high ones, and interpolate between (Llama 3.1, arXiv:2407.21783)."""
    turns = config.rope_original_length * frequency / (2 * math.pi)
    low, high = config.rope_low_turns, config.rope_high_turns
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequency + (1.0 - kept) * frequency / config.rope_factor


def _yarn(frequency: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Divide frequencies of few turns by the factor, with a ramp over the channels (arXiv:2309.00071, section 3.2).

    The ends of the ramp are whole channels of the head, as in the authors' code and in transformers.
    """
    width = config.head_width

    def channel(turns: float) -> float:
        """Return the index of the pair of channels that makes this many turns per original length."""
        ratio = config.rope_original_length / (turns * 2 * math.pi)
        return width * math.log(ratio) / (2 * math.log(config.rope_base))

    first = max(math.floor(channel(config.rope_high_turns)), 0)
    last = min(math.ceil(channel(config.rope_low_turns)), width - 1)
    divided = np.clip((np.arange(width // 2) - first) / ((last - first) or 0.001), 0.0, 1.0)
    return divided * frequency / config.rope_factor + (1.0 - divided) * frequency
