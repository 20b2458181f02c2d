"""The unlikelihood term of the loss (Welleck et al. 2019, arXiv:1908.04319), off unless `train.ul_alpha` is given.

It lowers the probability of tokens that the text already contains: each position adds -log(1 - p_c) for every distinct
token c of its segment so far except the label. The few logits that it needs are products of the hidden states with the
head's rows of the text's own tokens, [B, T, D]; nothing is gathered from the vocabulary's logits or scattered into
their gradient. As in the authors' code (facebookresearch/unlikelihood_training), 1 - p is clamped at 1e-5, below which
the term is constant and its gradient 0.

With logits l and probabilities p, a position adds to the loss of cross_entropy.py

    -  ul_alpha Σ_c log(1 - p_c)

and, since ∂p_c/∂l_v = p_c ([v = c] - p_v), to its gradient, with the odds o_c = p_c / (1 - p_c),

    -  p_v ul_alpha Σ_c o_c  +  ul_alpha Σ_c o_c [v = c]

The first term is dense over the vocabulary. The second one is the part of the candidates themselves; it is computed
with their rows of the head, except for a dominant candidate d (p_d > 0.6, at most one per position). Its odds grow
without bound, and the two terms with them cancel at v = d to ul_alpha p_d, which is at most ul_alpha: rounded to
bfloat16 one by one, their difference would be noise. Both are dense, therefore, and combined before they are rounded:

    p_v ul_alpha (1 if v = d else -o_d)

1 - p_d has to be exact as well: it is S / (1 + S), S = Σ exp(l_v - l_d) over v ≠ d, not a difference of near numbers.

Shapes: B batch, T tokens, D dim, V rows of the head, C positions of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.model.ops.matmul import einsum
from slm_jax.model.ops.softcap import cap_logits, times_slope
from slm_jax.utils.batch import IGNORE_INDEX

MIN_COMPLEMENT = 1e-5
"""Lower bound of 1 - p, so that a certain repetition has a finite loss."""

_DOMINANT = 0.6  # above 1/2 by more than rounding errors, so that no two tokens of a position exceed it


class ContextTokens(NamedTuple):
    """The tokens of a batch that the unlikelihood term looks back on.

    Attributes:
        ids_BxT: Token ids, int32.
        segments_BxT: Segment of each token, int32; a position looks back within its segment.
        is_first_BxT: Whether a token is not padding and the first one of its id in its segment, bool.
    """

    ids_BxT: jax.Array
    segments_BxT: jax.Array
    is_first_BxT: jax.Array

    @classmethod
    def from_batch(
        cls, ids_BxT: jax.Array, valid_BxT: jax.Array | None = None, segment_ids_BxT: jax.Array | None = None
    ) -> "ContextTokens":
        """Return the tokens of a batch.

        Args:
            ids_BxT: Token ids, int32.
            valid_BxT: 0 for padding.
            segment_ids_BxT: Segment of each token.
        """
        segments_BxT = jnp.zeros_like(ids_BxT) if segment_ids_BxT is None else segment_ids_BxT
        real_BxT = jnp.ones(ids_BxT.shape, bool) if valid_BxT is None else valid_BxT.astype(bool)
        index_T = jnp.arange(ids_BxT.shape[1])
        same_BxTxT = (ids_BxT[:, :, None] == ids_BxT[:, None]) & (segments_BxT[:, :, None] == segments_BxT[:, None])
        earlier_BxTxT = same_BxTxT & real_BxT[:, None] & (index_T[:, None] > index_T)
        return cls(ids_BxT, segments_BxT, real_BxT & ~jnp.any(earlier_BxTxT, axis=-1))

    def candidates(self, labels_BxC: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        """Return which tokens of the text are negative candidates at each position of a chunk.

        Args:
            labels_BxC: Labels of the chunk.
            start: Index of the chunk's first position in T.

        Returns:
            bool [B, C, T].
        """
        segments_BxC = jax.lax.dynamic_slice_in_dim(self.segments_BxT, start, labels_BxC.shape[1], axis=1)
        index_C = start + jnp.arange(labels_BxC.shape[1])
        index_T = jnp.arange(self.ids_BxT.shape[1])
        return (
            self.is_first_BxT[:, None]
            & (index_T <= index_C[:, None])
            & (self.segments_BxT[:, None] == segments_BxC[:, :, None])
            & (self.ids_BxT[:, None] != labels_BxC[:, :, None])
            & (labels_BxC != IGNORE_INDEX)[:, :, None]
        )


class UnlikelihoodTerms(NamedTuple):
    """The unlikelihood terms of a chunk and what their gradients take.

    Attributes:
        total: Sum of the terms, float32 scalar.
        odds_BxCxT: Odds o_c of the candidates that are not dominant, 0 elsewhere.
        gradient_BxCxT: Their gradient by the candidates' logits before `cap_logits`.
        dominant_BxC: Token id of the dominant candidate of each position, -1 if there is none or its term is clamped.
        dominant_odds_BxC: Odds of that candidate, 0 if there is none.
    """

    total: jax.Array
    odds_BxCxT: jax.Array
    gradient_BxCxT: jax.Array
    dominant_BxC: jax.Array
    dominant_odds_BxC: jax.Array

    def scale(self, dlog_z_BxC: jax.Array, vocab_V: jax.Array, weight: float) -> jax.Array:
        """Return the factors of p in the gradient of the loss by the logits, [B, C, V].

        Args:
            dlog_z_BxC: Gradient of the other terms by log Z.
            vocab_V: 0 to V - 1.
            weight: ul_alpha.
        """
        dlog_z_BxC -= weight * jnp.sum(self.odds_BxCxT, axis=-1)
        is_dominant_BxCxV = self.dominant_BxC[..., None] == vocab_V
        dominant_BxCxV = jnp.where(is_dominant_BxCxV, 1.0, -self.dominant_odds_BxC[..., None])
        return dlog_z_BxC[..., None] + weight * dominant_BxCxV

    def gradients(self, x_BxCxD: jax.Array, rows_BxTxD: jax.Array, weight: float) -> tuple[jax.Array, jax.Array]:
        """Return the candidates' part of the gradients by x and by the rows, float32 [B, C, D] and [B, T, D].

        Args:
            x_BxCxD: Hidden states in the dtype of the products.
            rows_BxTxD: The head's rows of the text's tokens, in that dtype.
            weight: ul_alpha.
        """
        dtype = x_BxCxD.dtype
        odds_BxCxT = (weight * self.gradient_BxCxT).astype(dtype)
        dx_BxCxD = einsum("bct,btd->bcd", odds_BxCxT, rows_BxTxD, dtype)
        # Transposed explicitly for the bfloat16 units of CPUs, see matmul.py.
        odds_BxTxC = jax.lax.optimization_barrier(odds_BxCxT.swapaxes(1, 2))
        return dx_BxCxD, einsum("btc,bcd->btd", odds_BxTxC, x_BxCxD, dtype)


def unlikelihood(
    x_BxCxD, rows_BxTxD, logits_BxCxV, log_z_BxC, context, labels_BxC, start, softcap
) -> UnlikelihoodTerms:
    """Return the unlikelihood terms of a chunk; see the top of the file."""
    candidates_BxCxT = context.candidates(labels_BxC, start)
    logits_BxCxT = cap_logits(einsum("bcd,btd->bct", x_BxCxD, rows_BxTxD, x_BxCxD.dtype), softcap)
    p_BxCxT = jnp.exp(jnp.minimum(logits_BxCxT - log_z_BxC[..., None], 0.0))
    max_BxC = jnp.max(logits_BxCxV, axis=-1)
    # A dominant token is the only one with the largest logit: S is the sum over all others.
    below_BxCxV = jnp.where(logits_BxCxV < max_BxC[..., None], jnp.exp(logits_BxCxV - max_BxC[..., None]), 0.0)
    s_BxC = jnp.sum(below_BxCxV, axis=-1)
    dominant_p_BxC = 1 / (1 + s_BxC)
    dominant_complement_BxC = s_BxC * dominant_p_BxC
    is_dominant_BxCxT = p_BxCxT > _DOMINANT
    complement_BxCxT = jnp.where(is_dominant_BxCxT, dominant_complement_BxC[..., None], 1 - p_BxCxT)
    log_BxCxT = jnp.log(jnp.maximum(complement_BxCxT, MIN_COMPLEMENT))
    total = jnp.sum(jnp.where(candidates_BxCxT, -log_BxCxT, 0.0))
    odds_BxCxT = jnp.where(candidates_BxCxT & ~is_dominant_BxCxT, p_BxCxT / complement_BxCxT, 0.0)
    is_open_BxC = dominant_complement_BxC > MIN_COMPLEMENT
    has_gradient_BxCxT = candidates_BxCxT & is_dominant_BxCxT & is_open_BxC[..., None]
    # Ids are at most once among the candidates of a position, so the sum picks the id of the dominant one.
    dominant_BxC = jnp.sum(jnp.where(has_gradient_BxCxT, context.ids_BxT[:, None] + 1, 0), axis=-1) - 1
    dominant_odds_BxC = jnp.where(dominant_BxC >= 0, dominant_p_BxC / dominant_complement_BxC, 0.0)
    gradient_BxCxT = times_slope(odds_BxCxT, logits_BxCxT, softcap)
    return UnlikelihoodTerms(total, odds_BxCxT, gradient_BxCxT, dominant_BxC, dominant_odds_BxC)
