"""The functions that draw the next token from logits.

The settings are arrays of the compiled program, one value per sequence, so that changing one compiles nothing. They
are applied in this order: repetition penalty, no-repeat n-grams, suppressed ids, temperature, top-k, top-p, min-p.
They are those of Hugging Face transformers, in its order, with one exception: ids that end a text are exempt from the
repetition penalty and from the n-gram rule. A prompt begins with `<EOS>`, for which transformers would lower the
probability of the end from the first token on, so that texts would not end where the model ends them. A setting that no
sequence uses is skipped at run time.

Shapes: B sequences, V vocabulary, L columns of the history of ids.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.generation.settings import Sampling

# Finite, and so above -inf: if every id that is not suppressed is banned, the ban yields and suppression holds.
_BANNED = -1e30


class SamplingArrays(NamedTuple):
    """The settings of a batch as arrays, one value per sequence."""

    temperature_B: jax.Array  # float32
    top_k_B: jax.Array  # int32
    top_p_B: jax.Array  # float32
    min_p_B: jax.Array  # float32
    penalty_B: jax.Array  # float32
    ngram_B: jax.Array  # int32


def stack_sampling(samplings: Sequence[Sampling]) -> SamplingArrays:
    """Stack the settings of B sequences into arrays [B]; the seeds are left out."""

    def column(name: str, dtype: type) -> Any:
        return np.array([getattr(sampling, name) for sampling in samplings], dtype)

    return SamplingArrays(
        temperature_B=column("temperature", np.float32),
        top_k_B=column("top_k", np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        penalty_B=column("repetition_penalty", np.float32),
        ngram_B=column("no_repeat_ngram", np.int32),
    )


def penalize(logits_BxV: jax.Array, seen_BxV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Apply the repetition penalty (CTRL, arXiv:1909.05858).

    Args:
        logits_BxV: float32 [B, V].
        seen_BxV: bool [B, V], the ids that occur in the sequence.
        penalty_B: float32 [B]; 1 changes nothing.

    Returns:
        float32 [B, V]: logits of seen ids are divided by the penalty if positive, multiplied by it if negative.
    """
    penalty_Bx1 = penalty_B[:, None]
    penalized_BxV = jnp.where(logits_BxV > 0, logits_BxV / penalty_Bx1, logits_BxV * penalty_Bx1)
    return jnp.where(seen_BxV, penalized_BxV, logits_BxV)


def repeated_ngrams(
    history_BxL: jax.Array, start_B: jax.Array, end: jax.Array, n_B: jax.Array, vocab_size: int
) -> jax.Array:
    """Find the ids that would complete an n-gram which the sequence already contains.

    Args:
        history_BxL: int32 [B, L]; a sequence is `history[start:end]`.
        start_B: int32 [B], first column of each sequence.
        end: int32 scalar, the column after the last token.
        n_B: int32 [B], length of the n-grams; 0: no rule for that sequence.
        vocab_size: V.

    Returns:
        bool [B, V].
    """
    column_L = jnp.arange(history_BxL.shape[1])
    n_Bx1 = n_B[:, None]
    # A column matches if the n - 1 ids before it equal the last n - 1 ids of the sequence.
    match_BxL = (column_L >= start_B[:, None] + n_Bx1 - 1) & (column_L < end) & (n_Bx1 > 0)

    def compare(back: jax.Array, match_BxL: jax.Array) -> jax.Array:
        last_Bx1 = jax.lax.dynamic_slice_in_dim(history_BxL, end - back, 1, axis=1)
        return match_BxL & ((jnp.roll(history_BxL, back, axis=1) == last_Bx1) | (back >= n_Bx1))

    match_BxL = jax.lax.fori_loop(1, jnp.max(n_B), compare, match_BxL)
    rows_Bx1 = jnp.arange(len(n_B))[:, None]
    ids_BxL = jnp.where(match_BxL, history_BxL, vocab_size)  # out of range: dropped by the scatter
    return jnp.zeros((len(n_B), vocab_size), bool).at[rows_Bx1, ids_BxL].set(True, mode="drop")


def ban_ngrams(
    logits_BxV: jax.Array,
    history_BxL: jax.Array,
    start_B: jax.Array,
    end: jax.Array,
    n_B: jax.Array,
    exempt_V: jax.Array,
) -> jax.Array:
    """Ban the ids that would repeat an n-gram.

    Args:
        logits_BxV: float32 [B, V].
        history_BxL: int32 [B, L], see `repeated_ngrams`; so are `start_B`, `end` and `n_B`.
        start_B: int32 [B].
        end: int32 scalar.
        n_B: int32 [B].
        exempt_V: bool [V], ids that are never banned.

    Returns:
        float32 [B, V]: the logits, with a large negative number for banned ids.
    """

    def ban() -> jax.Array:
        banned_BxV = repeated_ngrams(history_BxL, start_B, end, n_B, logits_BxV.shape[1])
        return jnp.where(banned_BxV & ~exempt_V, _BANNED, logits_BxV)

    return jax.lax.cond(jnp.any(n_B > 0), ban, lambda: logits_BxV)


def sample(logits_BxV: jax.Array, uniform_Bx2: jax.Array, settings: SamplingArrays) -> jax.Array:
    """Sample the next ids.

    Args:
        logits_BxV: float32 [B, V], after penalties, bans and suppression.
        uniform_Bx2: float32 [B, 2] random numbers in [0, 1).
        settings: The settings of each sequence; temperature, top-k, top-p and min-p are used here.

    Returns:
        int32 [B]: the most probable id where the temperature is 0, a sampled one elsewhere.
    """
    greedy_B = two_level_argmax(logits_BxV)

    def draw() -> jax.Array:
        temperature_Bx1 = jnp.where(settings.temperature_B > 0, settings.temperature_B, 1.0)[:, None]
        shifted_BxV = (logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)) / temperature_Bx1
        sampled_B = sample_index(_truncate(shifted_BxV, settings), uniform_Bx2)
        return jnp.where(settings.temperature_B > 0, sampled_B, greedy_B)

    return jax.lax.cond(jnp.any(settings.temperature_B > 0), draw, lambda: greedy_B)


def _truncate(shifted_BxV: jax.Array, settings: SamplingArrays) -> jax.Array:
    """Return unnormalized probabilities of logits whose maximum is 0; zero where top-k, top-p or min-p excludes."""
    order_BxV = _ordered_bits(shifted_BxV)

    def keep_largest(weights_BxV: jax.Array, total_B: jax.Array) -> jax.Array:
        threshold_Bx1 = _keep_threshold(order_BxV, weights_BxV, total_B)[:, None]
        return jnp.where(order_BxV >= threshold_Bx1, weights_BxV, 0.0)

    def top_k(weights_BxV: jax.Array) -> jax.Array:
        count_B = jnp.where(settings.top_k_B > 0, settings.top_k_B.astype(jnp.float32), jnp.inf)
        return keep_largest(jnp.ones_like(weights_BxV), count_B) * weights_BxV

    def top_p(weights_BxV: jax.Array) -> jax.Array:
        total_B = jnp.sum(weights_BxV, axis=-1)
        return keep_largest(weights_BxV, jnp.where(settings.top_p_B < 1, settings.top_p_B * total_B, jnp.inf))

    weights_BxV = jnp.exp(shifted_BxV)
    weights_BxV = jax.lax.cond(jnp.any(settings.top_k_B > 0), top_k, lambda w: w, weights_BxV)
    weights_BxV = jax.lax.cond(jnp.any(settings.top_p_B < 1), top_p, lambda w: w, weights_BxV)
    return jnp.where(weights_BxV >= settings.min_p_B[:, None], weights_BxV, 0.0)  # the largest weight is 1


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Map float32 to int32 monotonically."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _keep_threshold(order_BxV: jax.Array, weights_BxV: jax.Array, total_B: jax.Array) -> jax.Array:
    """Return int32 [B]: the smallest threshold such that the values above it weigh less than `total`.

    The values at or above it are then the smallest set of largest values that weighs at least `total`. A binary
    search over the 32 bits is exact and takes a fraction of the time of a sort. Equal values are kept together.
    """

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # the mean, rounded down, without overflow
        above_B = jnp.sum(jnp.where(order_BxV > middle_B[:, None], weights_BxV, 0.0), axis=-1)
        too_few_B = above_B < total_B
        return jnp.where(too_few_B, low_B, middle_B + 1), jnp.where(too_few_B, middle_B, high_B)

    start = (jnp.min(order_BxV, axis=-1), jnp.max(order_BxV, axis=-1))
    return jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, start)[1]


def sample_index(weights_BxV: jax.Array, uniform_Bx2: jax.Array) -> jax.Array:
    """Sample indices in proportion to weights, by inverting the cumulative distribution.

    It works in two levels, a block and then an index inside it, so that no cumulative sum over the whole vocabulary is
    needed. An index of weight zero is never returned.

    Args:
        weights_BxV: float32 [B, V], not negative; they need not sum to 1.
        uniform_Bx2: float32 [B, 2] in [0, 1), one number per level.

    Returns:
        int32 [B].
    """
    blocks_BxRxN = _blocks(weights_BxV, 0.0)
    block_B = _invert(jnp.sum(blocks_BxRxN, axis=-1), uniform_Bx2[:, 0])
    inside_B = _invert(blocks_BxRxN[jnp.arange(len(block_B)), block_B], uniform_Bx2[:, 1])
    return (block_B * blocks_BxRxN.shape[2] + inside_B).astype(jnp.int32)


def two_level_argmax(logits_BxV: jax.Array) -> jax.Array:
    """Return the argmax as int32 [B], the first of equal values.

    On a CPU, a reduction that tracks an index takes ten times as long as a maximum; here only one block is searched
    for the index.
    """
    blocks_BxRxN = _blocks(logits_BxV, -jnp.inf)
    block_B = jnp.argmax(jnp.max(blocks_BxRxN, axis=-1), axis=-1)
    inside_B = jnp.argmax(blocks_BxRxN[jnp.arange(len(block_B)), block_B], axis=-1)
    return (block_B * blocks_BxRxN.shape[2] + inside_B).astype(jnp.int32)


def _blocks(x_BxV: jax.Array, fill: float) -> jax.Array:
    """Reshape [B, V] to [B, R, N] with N of about the square root of V; the last block is padded with `fill`."""
    width = 1 << max(x_BxV.shape[1].bit_length() // 2, 4)
    return jnp.pad(x_BxV, ((0, 0), (0, -x_BxV.shape[1] % width)), constant_values=fill).reshape(len(x_BxV), -1, width)


def _invert(weights_BxN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Return the first index whose cumulative weight exceeds uniform x total."""
    # Without the mask, rounding could let the cumulative sum rise at a weight of zero.
    running_BxN = jnp.where(weights_BxN > 0, jnp.cumsum(weights_BxN, axis=-1), 0.0)
    total_B = jnp.max(running_BxN, axis=-1)
    target_B = jnp.minimum(uniform_B * total_B, jnp.nextafter(total_B, 0.0))  # below the largest sum
    return jnp.argmax(running_BxN > target_B[:, None], axis=-1)
