"""How the next token is drawn: each setting is an array of the compiled program, so changing one compiles nothing.

In order: repetition penalty, no-repeat n-grams, suppressed ids, temperature, top-k, top-p, min-p. The names and the
order are those of Hugging Face transformers. What costs time is skipped, inside the program, when no row asks for it.

Shapes: B rows (texts), V vocabulary, L columns of the history of ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.utils.errors import UserError

_BANNED = -1e30  # finite, above -inf: where all that is not suppressed is banned, the ban gives way


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """0: always the most probable token; higher is more varied."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0: from all."""
    top_p: float = 0.95
    """Draw from the most probable tokens that together have this probability; 1: from all."""
    min_p: float = 0.0
    """Draw from the tokens at least this times as probable as the most probable one; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1: ids of prompt and text so far become less probable (CTRL, arXiv:1909.05858); 1: no penalty."""
    no_repeat_ngram: int = 0
    """No run of this many tokens comes twice in prompt and text; 0: no such rule."""
    seed: int = 0
    """The same seed gives the same text."""

    def problems(self) -> list[str]:
        """What is out of range, one phrase each."""
        wanted = (
            ("temperature", 0 <= self.temperature < float("inf"), "must be 0 (greedy) or more, and finite"),
            ("top_k", 0 <= self.top_k < 2**31, "must be 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1 (all)"),
            ("min_p", 0 <= self.min_p <= 1, "must be from 0 (all) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "must be above 0; 1 is no penalty"),
            ("no_repeat_ngram", 0 <= self.no_repeat_ngram < 2**31, "must be 0 (no rule) or more"),
            ("seed", 0 <= self.seed < 2**32, f"must be from 0 to {2**32 - 1}"),
        )
        return [f"{name} {getattr(self, name)} {text}" for name, good, text in wanted if not good]

    def check(self) -> None:
        """Raises UserError for values out of range."""
        if problems := self.problems():
            raise UserError("; ".join(problems))

    def with_seed_plus(self, n: int) -> "Sampling":
        """The same with another seed (beyond the largest, from 0 on again)."""
        return replace(self, seed=(self.seed + n) % 2**32)


class Controls(NamedTuple):
    """The settings as arrays, one value per row."""

    temperature_B: jax.Array  # float32
    top_k_B: jax.Array  # int32
    top_p_B: jax.Array  # float32
    min_p_B: jax.Array  # float32
    penalty_B: jax.Array  # float32
    ngram_B: jax.Array  # int32


def controls(samplings: Sequence[Sampling]) -> Controls:
    """The settings of each row."""

    def column(name: str, dtype: type) -> Any:
        return np.array([getattr(sampling, name) for sampling in samplings], dtype)

    return Controls(
        column("temperature", np.float32),
        column("top_k", np.int32),
        column("top_p", np.float32),
        column("min_p", np.float32),
        column("repetition_penalty", np.float32),
        column("no_repeat_ngram", np.int32),
    )


def penalize(logits_BxV: jax.Array, seen_BxV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Logits of seen ids divided by the penalty, or multiplied where negative (CTRL, arXiv:1909.05858)."""
    penalty_Bx1 = penalty_B[:, None]
    lowered = jnp.where(logits_BxV > 0, logits_BxV / penalty_Bx1, logits_BxV * penalty_Bx1)
    return jnp.where(seen_BxV, lowered, logits_BxV)


def completes_ngram(
    history_BxL: jax.Array, start_B: jax.Array, end: jax.Array, n_B: jax.Array, vocab_size: int
) -> jax.Array:
    """bool [B, V]: ids that, put after a row's ids history[start:end], would repeat a run of n of them (0: none)."""
    column_L = jnp.arange(history_BxL.shape[1])
    n_Bx1 = n_B[:, None]
    # A column is found when the n - 1 ids before it are the row's last n - 1.
    found_BxL = (column_L >= start_B[:, None] + n_Bx1 - 1) & (column_L < end) & (n_Bx1 > 0)

    def compare(back: jax.Array, found_BxL: jax.Array) -> jax.Array:
        last_Bx1 = jax.lax.dynamic_slice_in_dim(history_BxL, end - back, 1, axis=1)
        return found_BxL & ((jnp.roll(history_BxL, back, axis=1) == last_Bx1) | (back >= n_Bx1))

    found_BxL = jax.lax.fori_loop(1, jnp.max(n_B), compare, found_BxL)
    rows_Bx1 = jnp.arange(len(n_B))[:, None]
    ids_BxL = jnp.where(found_BxL, history_BxL, vocab_size)  # beyond the end: dropped
    return jnp.zeros((len(n_B), vocab_size), bool).at[rows_Bx1, ids_BxL].set(True, mode="drop")


def ban_ngrams(
    logits_BxV: jax.Array,
    history_BxL: jax.Array,
    start_B: jax.Array,
    end: jax.Array,
    n_B: jax.Array,
    exempt_V: jax.Array,
) -> jax.Array:
    """Logits with the ids banned that would repeat an n-gram; exempt ids never are."""

    def ban() -> jax.Array:
        banned = completes_ngram(history_BxL, start_B, end, n_B, logits_BxV.shape[1])
        return jnp.where(banned & ~exempt_V, _BANNED, logits_BxV)

    return jax.lax.cond(jnp.any(n_B > 0), ban, lambda: logits_BxV)


def sample(logits_BxV: jax.Array, uniform_Bx2: jax.Array, controls: Controls) -> jax.Array:
    """Next ids int32 [B]: the most probable one where the temperature is 0, else drawn by uniform numbers of [0, 1)."""
    greedy_B = most_probable(logits_BxV)

    def draw() -> jax.Array:
        temperature_Bx1 = jnp.where(controls.temperature_B > 0, controls.temperature_B, 1.0)[:, None]
        shifted_BxV = (logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)) / temperature_Bx1
        drawn_B = draw_index(_truncate(shifted_BxV, controls), uniform_Bx2)
        return jnp.where(controls.temperature_B > 0, drawn_B, greedy_B)

    return jax.lax.cond(jnp.any(controls.temperature_B > 0), draw, lambda: greedy_B)


def _truncate(shifted_BxV: jax.Array, controls: Controls) -> jax.Array:
    """Probabilities, not normalised, of logits whose largest is 0; zero for what top-k, top-p and min-p leave out."""
    order_BxV = _ordered_bits(shifted_BxV)

    def largest(weights_BxV: jax.Array, enough_B: jax.Array) -> jax.Array:
        least_Bx1 = _least_kept(order_BxV, weights_BxV, enough_B)[:, None]
        return jnp.where(order_BxV >= least_Bx1, weights_BxV, 0.0)

    def top_k(weights_BxV: jax.Array) -> jax.Array:
        enough_B = jnp.where(controls.top_k_B > 0, controls.top_k_B.astype(jnp.float32), jnp.inf)
        return largest(jnp.ones_like(weights_BxV), enough_B) * weights_BxV

    def top_p(weights_BxV: jax.Array) -> jax.Array:
        total_B = jnp.sum(weights_BxV, axis=-1)
        return largest(weights_BxV, jnp.where(controls.top_p_B < 1, controls.top_p_B * total_B, jnp.inf))

    weights_BxV = jnp.exp(shifted_BxV)
    weights_BxV = jax.lax.cond(jnp.any(controls.top_k_B > 0), top_k, lambda w: w, weights_BxV)
    weights_BxV = jax.lax.cond(jnp.any(controls.top_p_B < 1), top_p, lambda w: w, weights_BxV)
    return jnp.where(weights_BxV >= controls.min_p_B[:, None], weights_BxV, 0.0)  # the largest weight is 1


def _ordered_bits(x: jax.Array) -> jax.Array:
    """int32 in the order of the float32 x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _least_kept(order_BxV: jax.Array, weights_BxV: jax.Array, enough_B: jax.Array) -> jax.Array:
    """int32 [B]: the least value such that those above it weigh less than enough; with it, the largest weigh enough.

    A binary search over the 32 bits: exact, and a fraction of the time of a sort. Equal values are kept together.
    """

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # the mean, rounded down, without overflow
        above_B = jnp.sum(jnp.where(order_BxV > middle_B[:, None], weights_BxV, 0.0), axis=-1)
        few_B = above_B < enough_B
        return jnp.where(few_B, low_B, middle_B + 1), jnp.where(few_B, middle_B, high_B)

    start = (jnp.min(order_BxV, axis=-1), jnp.max(order_BxV, axis=-1))
    return jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, start)[1]


def draw_index(weights_BxV: jax.Array, uniform_Bx2: jax.Array) -> jax.Array:
    """Indices int32 [B], each with the probability of its weight: the distribution function inverted at the uniforms.

    In two levels, a block and then one inside it, so that no running sum over the vocabulary is made. An index of
    weight zero is never drawn.
    """
    blocks_BxRxN = _blocks(weights_BxV, 0.0)
    block_B = _invert(jnp.sum(blocks_BxRxN, axis=-1), uniform_Bx2[:, 0])
    inside_B = _invert(blocks_BxRxN[jnp.arange(len(block_B)), block_B], uniform_Bx2[:, 1])
    return (block_B * blocks_BxRxN.shape[2] + inside_B).astype(jnp.int32)


def most_probable(logits_BxV: jax.Array) -> jax.Array:
    """argmax int32 [B] in two levels: on CPU a reduction that keeps an index takes ten times as long as a maximum."""
    blocks_BxRxN = _blocks(logits_BxV, -jnp.inf)
    block_B = jnp.argmax(jnp.max(blocks_BxRxN, axis=-1), axis=-1)
    inside_B = jnp.argmax(blocks_BxRxN[jnp.arange(len(block_B)), block_B], axis=-1)
    return (block_B * blocks_BxRxN.shape[2] + inside_B).astype(jnp.int32)


def _blocks(x_BxV: jax.Array, fill: float) -> jax.Array:
    """[B, R, N] of [B, V] and filling, N about the square root of V."""
    width = 1 << max(x_BxV.shape[1].bit_length() // 2, 4)
    return jnp.pad(x_BxV, ((0, 0), (0, -x_BxV.shape[1] % width)), constant_values=fill).reshape(len(x_BxV), -1, width)


def _invert(weights_BxN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index with a weight whose running sum passes uniform x sum."""
    # Without the mask, rounding could let the running sum rise where the weight is zero.
    running_BxN = jnp.where(weights_BxN > 0, jnp.cumsum(weights_BxN, axis=-1), 0.0)
    total_B = jnp.max(running_BxN, axis=-1)
    target_B = jnp.minimum(uniform_B * total_B, jnp.nextafter(total_B, 0.0))  # some sum is above it
    return jnp.argmax(running_BxN > target_B[:, None], axis=-1)
