"""Next-token cross entropy without the [B, T, V] logits.

The head's product, the softmax and both gradients are made chunk by chunk in the forward pass, so that only one
chunk of logits exists at a time; the backward pass scales what was kept. The method is that of fused linear cross
entropy (Liger Kernel, arXiv:2410.10989); here it is plain JAX.

The unlikelihood term (Welleck et al. 2019, arXiv:1908.04319) lowers the probability of what the text already holds:
at each position, -log(1 - p(c)) for every distinct token c of the segment so far but the label. The few logits it
needs are products of the hidden states with the head's rows of the text's own tokens, [B, T, D]: nothing is gathered
from the vocabulary's logits or scattered into their gradient.

Shapes as in transformer.py, and: S chunks, C positions of a chunk, V rows of the head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.distributed.partitioning import sum_over_rows
from slm_jax.model.ops.matmul import einsum, transposed_dot_f32
from slm_jax.utils.batch import IGNORE_INDEX

_CHUNK = 1024  # rows of logits alive at a time
_NEVER = -1e30  # the logit of what is no token; not -inf, whose gradient is NaN
_LEAST = 1e-5  # 1 - p is taken for at least so much: no infinite loss of a certain repetition


class LossSums(NamedTuple):
    """Sums over the predicted positions, float32 scalars: divide by `tokens` for means."""

    loss: jax.Array  # cross entropy in nats, plus the z-loss and the unlikelihood term where asked for
    nll: jax.Array  # cross entropy in nats
    correct: jax.Array  # positions whose label no token exceeds in probability
    tokens: jax.Array  # positions with a label


class LossWeights(NamedTuple):
    """What is added to the cross entropy of each position: weight times term."""

    z_loss: float = 0.0  # (log Z)^2, which keeps logits small
    ul_alpha: float = 0.0  # the unlikelihood of repeating a token of the text so far


class ContextTokens(NamedTuple):
    """The tokens that the unlikelihood term looks back on."""

    ids_BxT: jax.Array  # int32
    segments_BxT: jax.Array  # int32: a position looks back within its segment
    first_BxT: jax.Array  # bool: real, and the first of its id in its segment

    @classmethod
    def of(
        cls, ids_BxT: jax.Array, valid_BxT: jax.Array | None = None, segment_ids_BxT: jax.Array | None = None
    ) -> "ContextTokens":
        """Of a batch as the model takes it: valid is 0 for padding, segments do not see each other."""
        segments_BxT = jnp.zeros_like(ids_BxT) if segment_ids_BxT is None else segment_ids_BxT
        real_BxT = jnp.ones(ids_BxT.shape, bool) if valid_BxT is None else valid_BxT.astype(bool)
        index_T = jnp.arange(ids_BxT.shape[1])
        same_BxTxT = (ids_BxT[:, :, None] == ids_BxT[:, None]) & (segments_BxT[:, :, None] == segments_BxT[:, None])
        earlier_BxTxT = same_BxTxT & real_BxT[:, None] & (index_T[:, None] > index_T)
        return cls(ids_BxT, segments_BxT, real_BxT & ~jnp.any(earlier_BxTxT, axis=-1))

    def candidates(self, labels_BxC: jax.Array, at: jax.Array | int = 0) -> jax.Array:
        """bool [B, C, T]: the tokens that the positions from `at` on, with these labels, are not to repeat."""
        segments_BxC = jax.lax.dynamic_slice_in_dim(self.segments_BxT, at, labels_BxC.shape[1], axis=1)
        index_C, index_T = at + jnp.arange(labels_BxC.shape[1]), jnp.arange(self.ids_BxT.shape[1])
        return (
            self.first_BxT[:, None]
            & (index_T <= index_C[:, None])
            & (self.segments_BxT[:, None] == segments_BxC[:, :, None])
            & (self.ids_BxT[:, None] != labels_BxC[:, :, None])
            & (labels_BxC != IGNORE_INDEX)[:, :, None]
        )


def naive_cross_entropy(
    x_BxTxD: jax.Array,
    head_VxD: jax.Array,
    labels_BxT: jax.Array,
    dtype: jnp.dtype,
    terms: LossWeights = LossWeights(),
    seen: ContextTokens | None = None,
    vocab_size: int = 0,
) -> LossSums:
    """What `cross_entropy` computes, from whole logits."""
    logits_BxTxV = _logits(x_BxTxD.astype(dtype), head_VxD.astype(dtype), vocab_size or len(head_VxD))
    sums, log_z_BxT, _ = _sums(logits_BxTxV, labels_BxT, terms.z_loss)
    if not terms.ul_alpha:
        return sums
    assert seen is not None, "the unlikelihood term needs the tokens"
    probability_BxTxT = jnp.exp(
        jnp.take_along_axis(logits_BxTxV, seen.ids_BxT[:, None], axis=-1) - log_z_BxT[..., None]
    )
    each_BxTxT = jnp.where(seen.candidates(labels_BxT), -jnp.log(jnp.maximum(1 - probability_BxTxT, _LEAST)), 0.0)
    return sums._replace(loss=sums.loss + terms.ul_alpha * jnp.sum(each_BxTxT))


def cross_entropy(
    x_BxTxD: jax.Array,
    head_VxD: jax.Array,
    labels_BxT: jax.Array,
    dtype: jnp.dtype,
    terms: LossWeights = LossWeights(),
    seen: ContextTokens | None = None,
    vocab_size: int = 0,
) -> LossSums:
    """Sums of the loss of hidden states [B, T, D] against labels int32 [B, T] under the head [V, D].

    Position t is scored against labels[:, t], which is already the next token; `IGNORE_INDEX` counts for nothing.
    seen: needed for terms.ul_alpha. vocab_size: rows of the head that stand for tokens (0: all); the rest is padding.
    Only `loss` has a gradient; gradients are float32.
    """
    assert seen is not None or not terms.ul_alpha, "the unlikelihood term needs the tokens"
    seen = seen if terms.ul_alpha else None
    # Each device adds up its own rows: XLA would sum the head's gradient over all devices once a chunk.
    f = functools.partial(_cut_and_summed, dtype=dtype, terms=terms, vocab_size=vocab_size or len(head_VxD))
    return sum_over_rows(f, x_BxTxD, head_VxD, labels_BxT, seen, whole=(1,))


def _cut_and_summed(x_BxTxD, head_VxD, labels_BxT, seen, dtype, terms, vocab_size):
    b, t, d = x_BxTxD.shape
    # Cut along T, so that a chunk holds some of each row and the rows' own tokens serve all its positions.
    chunks = min(t, -(-b * t // _CHUNK))
    size = -(-t // chunks)
    more = ((0, 0), (0, chunks * size - t))
    x_BxTxD = jnp.pad(x_BxTxD, (*more, (0, 0)))
    labels_BxT = jnp.pad(labels_BxT, more, constant_values=IGNORE_INDEX)
    seen = jax.tree.map(lambda array_BxT: jnp.pad(array_BxT, more), seen)
    x_SxBxCxD = x_BxTxD.reshape(b, chunks, size, d).swapaxes(0, 1)
    labels_SxBxC = labels_BxT.reshape(b, chunks, size).swapaxes(0, 1)
    return _chunked(x_SxBxCxD, head_VxD, labels_SxBxC, seen, dtype, terms, vocab_size)


def _logits(x_BxCxD: jax.Array, head_VxD: jax.Array, vocab_size: int) -> jax.Array:
    logits_BxCxV = einsum("bcd,vd->bcv", x_BxCxD, head_VxD, x_BxCxD.dtype)
    if vocab_size == len(head_VxD):
        return logits_BxCxV
    return jnp.where(jnp.arange(len(head_VxD)) < vocab_size, logits_BxCxV, _NEVER)


def _sums(logits_BxCxV: jax.Array, labels_BxC: jax.Array, z_loss: float) -> tuple[LossSums, jax.Array, jax.Array]:
    """(sums, log Z [B, C], validity [B, C]) of float32 logits."""
    valid_BxC = labels_BxC != IGNORE_INDEX
    # Written out for the maximum's sake: argmax alone would take a twelfth of a CPU step.
    top_BxC = jnp.max(logits_BxCxV, axis=-1)
    log_z_BxC = top_BxC + jnp.log(jnp.sum(jnp.exp(logits_BxCxV - top_BxC[..., None]), axis=-1))
    label_BxC = jnp.where(valid_BxC, labels_BxC, 0)  # any real id: masked out below
    target_BxC = jnp.take_along_axis(logits_BxCxV, label_BxC[..., None], axis=-1)[..., 0]
    nll = jnp.sum(jnp.where(valid_BxC, log_z_BxC - target_BxC, 0.0))
    z = z_loss * jnp.sum(jnp.where(valid_BxC, log_z_BxC**2, 0.0))
    correct = jnp.sum(valid_BxC & (target_BxC >= top_BxC), dtype=jnp.float32)
    return LossSums(nll + z, nll, correct, jnp.sum(valid_BxC, dtype=jnp.float32)), log_z_BxC, valid_BxC


def _unlikelihood(x_BxCxD, rows_BxTxD, log_z_BxC, candidates_BxCxT) -> tuple[jax.Array, jax.Array]:
    """(the term's sum, odds p / (1 - p) of each candidate [B, C, T]); the odds are its gradient by the candidates'
    logits but for the part through log Z. They go on growing where the term itself is capped."""
    logits_BxCxT = einsum("bcd,btd->bct", x_BxCxD, rows_BxTxD, x_BxCxD.dtype)
    p_BxCxT = jnp.exp(jnp.minimum(logits_BxCxT - log_z_BxC[..., None], 0.0))
    rest_BxCxT = jnp.maximum(1 - p_BxCxT, _LEAST)
    total = jnp.sum(jnp.where(candidates_BxCxT, -jnp.log(rest_BxCxT), 0.0))
    return total, jnp.where(candidates_BxCxT, p_BxCxT / rest_BxCxT, 0.0)


def _zero_sums() -> LossSums:
    zero = jnp.zeros((), jnp.float32)
    return LossSums(zero, zero, zero, zero)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked(x_SxBxCxD, head_VxD, labels_SxBxC, seen, dtype, terms, vocab_size):
    """The sums alone, when no gradient is asked for."""
    head_VxD = head_VxD.astype(dtype)
    rows_BxTxD: Any = None if seen is None else head_VxD[seen.ids_BxT]

    def one_chunk(total, chunk):
        x_BxCxD, labels_BxC, at = chunk[0].astype(dtype), chunk[1], chunk[2]
        sums, log_z_BxC, _ = _sums(_logits(x_BxCxD, head_VxD, vocab_size), labels_BxC, terms.z_loss)
        if seen is not None:
            term, _ = _unlikelihood(x_BxCxD, rows_BxTxD, log_z_BxC, seen.candidates(labels_BxC, at))
            sums = sums._replace(loss=sums.loss + terms.ul_alpha * term)
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(one_chunk, _zero_sums(), (x_SxBxCxD, labels_SxBxC, _starts(labels_SxBxC)))[0]


def _forward(x_SxBxCxD, head_VxD, labels_SxBxC, seen, dtype, terms, vocab_size):
    head_VxD = head_VxD.astype(dtype)
    vocab_V = jnp.arange(len(head_VxD))
    rows_BxTxD: Any = None if seen is None else head_VxD[seen.ids_BxT]

    def one_chunk(carry, chunk):
        total, dhead_VxD, drows_BxTxD = carry
        x_BxCxD, labels_BxC, at = chunk[0].astype(dtype), chunk[1], chunk[2]
        logits_BxCxV = _logits(x_BxCxD, head_VxD, vocab_size)
        sums, log_z_BxC, valid_BxC = _sums(logits_BxCxV, labels_BxC, terms.z_loss)
        dlog_z_BxC = 1.0 + 2.0 * terms.z_loss * log_z_BxC
        dx_BxCxD: Any = 0.0
        if seen is not None:
            term, odds_BxCxT = _unlikelihood(x_BxCxD, rows_BxTxD, log_z_BxC, seen.candidates(labels_BxC, at))
            sums = sums._replace(loss=sums.loss + terms.ul_alpha * term)
            dlog_z_BxC -= terms.ul_alpha * jnp.sum(odds_BxCxT, axis=-1)
            odds_BxCxT = (terms.ul_alpha * odds_BxCxT).astype(dtype)
            dx_BxCxD = einsum("bct,btd->bcd", odds_BxCxT, rows_BxTxD, dtype)
            odds_BxTxC = jax.lax.optimization_barrier(odds_BxCxT.swapaxes(1, 2))
            drows_BxTxD += einsum("btc,bcd->btd", odds_BxTxC, x_BxCxD, dtype)
        p_BxCxV = jnp.exp(logits_BxCxV - log_z_BxC[..., None]) * dlog_z_BxC[..., None]
        hit_BxCxV = labels_BxC[..., None] == vocab_V
        dlogits_BxCxV = jnp.where(valid_BxC[..., None], p_BxCxV - hit_BxCxV, 0.0).astype(dtype)
        dx_BxCxD += einsum("bcv,vd->bcd", dlogits_BxCxV, head_VxD, dtype)
        rows = x_BxCxD.shape[0] * x_BxCxD.shape[1]
        dhead_VxD += transposed_dot_f32(dlogits_BxCxV.reshape(rows, -1), x_BxCxD.reshape(rows, -1))
        return (jax.tree.map(jnp.add, total, sums), dhead_VxD, drows_BxTxD), dx_BxCxD

    start = (
        _zero_sums(),
        jnp.zeros(head_VxD.shape, jnp.float32),
        None if seen is None else jnp.zeros(rows_BxTxD.shape, jnp.float32),
    )
    chunks = (x_SxBxCxD, labels_SxBxC, _starts(labels_SxBxC))
    (total, dhead_VxD, drows_BxTxD), dx_SxBxCxD = jax.lax.scan(one_chunk, start, chunks)
    if seen is not None:
        dhead_VxD = dhead_VxD.at[seen.ids_BxT].add(drows_BxTxD)
    return total, (dx_SxBxCxD, dhead_VxD)


def _starts(labels_SxBxC: jax.Array) -> jax.Array:
    """Where each chunk begins in T."""
    return jnp.arange(labels_SxBxC.shape[0]) * labels_SxBxC.shape[2]


def _backward(dtype, terms, vocab_size, saved, g):
    dx_SxBxCxD, dhead_VxD = saved
    return dx_SxBxCxD * g.loss, dhead_VxD * g.loss, None, None


_chunked.defvjp(_forward, _backward)
