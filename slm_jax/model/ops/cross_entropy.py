"""Next-token cross entropy without the [B, T, V] logits.

The head's product, the softmax and both gradients are computed chunk by chunk in the forward pass, so that only one
chunk of logits exists at a time; the backward pass scales the gradients that were kept. The method is fused linear
cross entropy (Liger Kernel, arXiv:2410.10989), in plain JAX.

If the hidden states are bfloat16 (see precision.py), so are the logits in memory while gradients are computed: log Z,
probabilities and sums are float32, of logits rounded to 8 bits (float16: 11). A rounding error e of a logit changes its
share of Z by the factor exp(e), which averages out over the vocabulary and over positions. Without gradients
(validation) logits are float32.

With logits l, log Z = logsumexp(l) and p = exp(l - log Z), the loss of a position with label y is

    log Z - l_y  +  z_loss (log Z)²

with the gradient

    ∂/∂l_v  =  p_v (1 + 2 z_loss log Z)  -  [v = y]

and, if `ul_alpha` is not 0, the terms of unlikelihood.py.

Logits may be bounded (`cap_logits`); the gradients above are by the bounded ones, times the slope of the bound.

Shapes: B batch, T tokens, D dim, V rows of the head, S chunks, C positions of a chunk.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.distributed.partitioning import sum_over_batch
from slm_jax.distributed.platform import Platform
from slm_jax.model.ops.matmul import einsum, row_products, transposed_dot
from slm_jax.model.ops.softcap import cap_logits, times_slope
from slm_jax.model.ops.unlikelihood import MIN_COMPLEMENT, ContextTokens, unlikelihood
from slm_jax.utils.batch import IGNORE_INDEX

_CPU_CHUNK = 1024  # positions whose logits exist at a time: they stay in the processor's cache
_LOGIT_BYTES = 1 << 29  # logits that exist at a time elsewhere; each further chunk reads and writes the head's gradient
# XLA writes the gradient of the logits into their memory unless their product has a second result, as cuBLAS's scratch
# memory. So both exist at a time on GPUs, and up to four chunks have half the size: still 4,096 positions of 32,768
# entries. Beyond that, 1 GiB is little next to the activations, and large products and few chunks are faster.
_GPU_HALF_CHUNKS = 4
_PADDING_LOGIT = -1e30  # logit of the head's padding rows; not -inf, whose gradient is NaN
_FLOAT16_FACTOR = 2.0**10  # of the gradient of float16 logits, so that probabilities above 6e-11 do not become 0


class LossSums(NamedTuple):
    """Sums over the predicted positions, float32 scalars; divide by `tokens` for means.

    Attributes:
        loss: Cross entropy in nats, plus the weighted z-loss and unlikelihood terms.
        nll: Cross entropy in nats.
        correct: Positions whose label has the highest probability, ties included.
        tokens: Positions with a label.
    """

    loss: jax.Array
    nll: jax.Array
    correct: jax.Array
    tokens: jax.Array

    @classmethod
    def zeros(cls) -> "LossSums":
        """Return the sums over no positions."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))

    @property
    def divisor(self) -> jax.Array:
        """The divisor of the means."""
        return self.tokens

    def metrics(self) -> dict[str, jax.Array]:
        """Return the means by name."""
        count = jnp.maximum(self.tokens, 1.0)
        return {"loss": self.nll / count, "accuracy": self.correct / count}


class LossWeights(NamedTuple):
    """Weights of the terms that are added to the cross entropy of each position.

    Attributes:
        z_loss: Weight of (log Z)², which keeps logits small (PaLM, arXiv:2204.02311).
        ul_alpha: Weight of the unlikelihood of repeating a token of the text so far.
    """

    z_loss: float = 0.0
    ul_alpha: float = 0.0


def naive_cross_entropy(
    x_BxTxD: jax.Array,
    head_VxD: jax.Array,
    labels_BxT: jax.Array,
    dtype: jnp.dtype,
    weights: LossWeights = LossWeights(),
    context: ContextTokens | None = None,
    vocab_size: int = 0,
    softcap: float = 0.0,
) -> LossSums:
    """Return what `cross_entropy` computes, from the full logits."""
    x_BxTxD, head_VxD = x_BxTxD.astype(dtype), head_VxD.astype(dtype)
    logits_BxTxV = _logits(x_BxTxD, head_VxD, vocab_size or len(head_VxD), softcap)
    sums, log_z_BxT, _ = _sums(logits_BxTxV, labels_BxT, weights.z_loss)
    if not weights.ul_alpha:
        return sums
    assert context is not None, "the unlikelihood term needs the context"
    probability_BxTxT = jnp.exp(
        jnp.take_along_axis(logits_BxTxV, context.ids_BxT[:, None], axis=-1) - log_z_BxT[..., None]
    )
    terms_BxTxT = jnp.where(
        context.candidates(labels_BxT), -jnp.log(jnp.maximum(1 - probability_BxTxT, MIN_COMPLEMENT)), 0.0
    )
    return sums._replace(loss=sums.loss + weights.ul_alpha * jnp.sum(terms_BxTxT))


def cross_entropy(
    x_BxTxD: jax.Array,
    head_VxD: jax.Array,
    labels_BxT: jax.Array,
    dtype: jnp.dtype,
    weights: LossWeights = LossWeights(),
    context: ContextTokens | None = None,
    vocab_size: int = 0,
    platform: Platform | None = None,
    softcap: float = 0.0,
) -> LossSums:
    """Return the sums of the next-token loss of hidden states under the output head.

    Position t is scored against labels[:, t], which already is the next token. Only `loss` has a gradient.

    Args:
        x_BxTxD: Final hidden states, float32 or dtype.
        head_VxD: Output head, float32.
        labels_BxT: Next tokens, int32; positions with `IGNORE_INDEX` are not counted.
        dtype: Dtype of the products' operands.
        weights: Weights of the additional terms.
        context: Tokens of the batch, required if `weights.ul_alpha` is not 0.
        vocab_size: Rows of the head that are vocabulary entries, the rest is padding; 0: all.
        platform: The hardware that the gradients are written for; None: JAX's first device.
        softcap: Bound of the logits, see `cap_logits`; 0: none.
    """
    assert context is not None or not weights.ul_alpha, "the unlikelihood term needs the context"
    context = context if weights.ul_alpha else None
    # Each device sums over its own sequences: XLA would sum the head's gradient over all devices once per chunk.
    f = functools.partial(
        _split_and_sum,
        dtype=dtype,
        weights=weights,
        vocab_size=vocab_size or len(head_VxD),
        platform=platform or Platform.default(),
        softcap=softcap,
    )
    return sum_over_batch(f, x_BxTxD, head_VxD, labels_BxT, context, replicated=(1,))


def _split_and_sum(x_BxTxD, head_VxD, labels_BxT, context, dtype, weights, vocab_size, platform, softcap):
    """Pad T to a multiple of the chunks, split into chunks and sum over them."""
    b, t, d = x_BxTxD.shape
    # Split along T, not B: a chunk contains positions of every sequence, and the head's rows of the text's own tokens
    # serve all chunks.
    logit_bytes = 4 if context is not None else x_BxTxD.dtype.itemsize
    chunks = _chunk_count(b * t, t, len(head_VxD) * logit_bytes, platform)
    size = -(-t // chunks)
    padding = ((0, 0), (0, chunks * size - t))
    x_BxTxD = jnp.pad(x_BxTxD, (*padding, (0, 0)))
    labels_BxT = jnp.pad(labels_BxT, padding, constant_values=IGNORE_INDEX)
    context = jax.tree.map(lambda array_BxT: jnp.pad(array_BxT, padding), context)
    x_SxBxCxD = x_BxTxD.reshape(b, chunks, size, d).swapaxes(0, 1)
    labels_SxBxC = labels_BxT.reshape(b, chunks, size).swapaxes(0, 1)
    if context is None and platform.name != "cpu":
        # One axis of positions: the gradient of the logits can then take their memory.
        x_SxBxCxD, labels_SxBxC = x_SxBxCxD.reshape(chunks, -1, d), labels_SxBxC.reshape(chunks, -1)
    return _chunked(x_SxBxCxD, head_VxD, labels_SxBxC, context, dtype, weights, vocab_size, platform, softcap)


def _chunk_count(positions: int, limit: int, bytes_of_position: int, platform: Platform) -> int:
    """Return the number of chunks, at most `limit`, of positions whose logits take `bytes_of_position` each."""
    chunk = _CPU_CHUNK if platform.name == "cpu" else max(1, _LOGIT_BYTES // bytes_of_position)
    half_chunks = min(_GPU_HALF_CHUNKS, math.ceil(2 * positions / chunk)) if platform.name == "gpu" else 1
    return min(limit, max(half_chunks, math.ceil(positions / chunk)))


def _logits(
    x_BxCxD: jax.Array,
    head_VxD: jax.Array,
    vocab_size: int,
    softcap: float,
    dtype: jnp.dtype = jnp.dtype("float32"),
) -> jax.Array:
    """Return logits [B, C, V] in dtype; the head's padding rows have probability 0."""
    logits_BxCxV = cap_logits(row_products(x_BxCxD, head_VxD, x_BxCxD.dtype, dtype), softcap)
    if vocab_size == len(head_VxD):
        return logits_BxCxV
    return jnp.where(jnp.arange(len(head_VxD)) < vocab_size, logits_BxCxV, _PADDING_LOGIT)


def _sums(logits_BxCxV: jax.Array, labels_BxC: jax.Array, z_loss: float) -> tuple[LossSums, jax.Array, jax.Array]:
    """Return (sums without the unlikelihood term, log Z [B, C], positions with a label bool [B, C])."""
    valid_BxC = labels_BxC != IGNORE_INDEX
    is_rounded = logits_BxCxV.dtype != jnp.float32
    logits_BxCxV = logits_BxCxV.astype(jnp.float32)
    # logsumexp is written out, so that its maximum also gives `correct`: an argmax takes a twelfth of a CPU step.
    max_BxC = jnp.max(logits_BxCxV, axis=-1)
    log_z_BxC = max_BxC + jnp.log(jnp.sum(jnp.exp(logits_BxCxV - max_BxC[..., None]), axis=-1))
    label_BxC = jnp.where(valid_BxC, labels_BxC, 0)  # any id: masked out below
    if is_rounded:
        # A sum over the vocabulary in the pass that reads the logits anyway; gathered, they would be stored in float32.
        is_label_BxCxV = label_BxC[..., None] == jnp.arange(logits_BxCxV.shape[-1])
        target_BxC = jnp.sum(jnp.where(is_label_BxCxV, logits_BxCxV, 0.0), axis=-1)
    else:
        target_BxC = jnp.take_along_axis(logits_BxCxV, label_BxC[..., None], axis=-1)[..., 0]
    nll = jnp.sum(jnp.where(valid_BxC, log_z_BxC - target_BxC, 0.0))
    z = z_loss * jnp.sum(jnp.where(valid_BxC, log_z_BxC**2, 0.0))
    correct_BxC = (valid_BxC & (target_BxC >= max_BxC)).astype(jnp.float32)
    if is_rounded:  # many logits are equal then: a label is correct with the probability of a choice among them
        correct_BxC /= jnp.sum(logits_BxCxV == max_BxC[..., None], axis=-1, dtype=jnp.float32)
    correct = jnp.sum(correct_BxC)
    return LossSums(nll + z, nll, correct, jnp.sum(valid_BxC, dtype=jnp.float32)), log_z_BxC, valid_BxC


def _smaller_chunks(x_SxPxD: jax.Array, labels_SxP: jax.Array, bytes_of_position: int) -> tuple[jax.Array, jax.Array]:
    """Divide chunks whose logits take more than `_LOGIT_BYTES`: those without gradients are float32 in any case."""
    chunks, positions, d = x_SxPxD.shape
    parts = min(positions, -(-positions * bytes_of_position // _LOGIT_BYTES))
    size = -(-positions // parts)
    padding = ((0, 0), (0, parts * size - positions))
    x_SxPxD = jnp.pad(x_SxPxD, (*padding, (0, 0)))
    labels_SxP = jnp.pad(labels_SxP, padding, constant_values=IGNORE_INDEX)
    return x_SxPxD.reshape(chunks * parts, size, d), labels_SxP.reshape(chunks * parts, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def _chunked(x_SxBxCxD, head_VxD, labels_SxBxC, context, dtype, weights, vocab_size, platform, softcap):
    """Return the sums without gradients; differentiation uses `_forward` instead."""
    if platform.name != "cpu" and context is None:
        x_SxBxCxD, labels_SxBxC = _smaller_chunks(x_SxBxCxD, labels_SxBxC, 4 * len(head_VxD))
    head_VxD = head_VxD.astype(dtype)
    rows_BxTxD: Any = None if context is None else head_VxD[context.ids_BxT]

    def add_chunk(total, chunk):
        x_BxCxD, labels_BxC, start = chunk
        x_BxCxD = x_BxCxD.astype(dtype)
        logits_BxCxV = _logits(x_BxCxD, head_VxD, vocab_size, softcap)
        sums, log_z_BxC, _ = _sums(logits_BxCxV, labels_BxC, weights.z_loss)
        if context is not None:
            texts = (context, labels_BxC, start, softcap)
            terms = unlikelihood(x_BxCxD, rows_BxTxD, logits_BxCxV, log_z_BxC, *texts)
            sums = sums._replace(loss=sums.loss + weights.ul_alpha * terms.total)
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(add_chunk, LossSums.zeros(), (x_SxBxCxD, labels_SxBxC, _starts(labels_SxBxC)))[0]


def _forward(x_SxBxCxD, head_VxD, labels_SxBxC, context, dtype, weights, vocab_size, platform, softcap):
    """Return the sums, and the gradients of `loss` by the hidden states and the head."""
    head_VxD = head_VxD.astype(dtype)
    vocab_V = jnp.arange(len(head_VxD))
    rows_BxTxD: Any = None if context is None else head_VxD[context.ids_BxT]
    # On CPU a transposed operand is copied, and x is much smaller than the gradient of the logits: the gradient of the
    # head is summed as [D, V].
    transposed = platform.name == "cpu"
    # Not with the unlikelihood term, whose odds are too large for the factor.
    factor = _FLOAT16_FACTOR if dtype == jnp.float16 and context is None else 1.0
    # The loss scale is not known yet: rounded to float16 without it, gradients of well predicted tokens would be 0.
    dx_dtype = jnp.dtype(jnp.float32) if dtype == jnp.float16 else x_SxBxCxD.dtype

    def add_chunk(carry, chunk):
        total, dhead, drows_BxTxD = carry
        x_BxCxD, labels_BxC, start = chunk
        in_dtype = x_BxCxD.dtype
        x_BxCxD = x_BxCxD.astype(dtype)
        # The unlikelihood term needs 1 - p of probable tokens exactly.
        logits_dtype = in_dtype if context is None else jnp.dtype(jnp.float32)
        logits_BxCxV = _logits(x_BxCxD, head_VxD, vocab_size, softcap, logits_dtype)
        sums, log_z_BxC, valid_BxC = _sums(logits_BxCxV, labels_BxC, weights.z_loss)
        dlog_z_BxC = 1.0 + 2.0 * weights.z_loss * log_z_BxC  # gradient of the loss by log Z
        scale_BxCxV = dlog_z_BxC[..., None]
        dx_BxCxD: Any = 0.0
        if context is not None:
            texts = (context, labels_BxC, start, softcap)
            terms = unlikelihood(x_BxCxD, rows_BxTxD, logits_BxCxV, log_z_BxC, *texts)
            sums = sums._replace(loss=sums.loss + weights.ul_alpha * terms.total)
            scale_BxCxV = terms.scale(dlog_z_BxC, vocab_V, weights.ul_alpha)
            dx_BxCxD, drows_of_chunk_BxTxD = terms.gradients(x_BxCxD, rows_BxTxD, weights.ul_alpha)
            drows_BxTxD += drows_of_chunk_BxTxD
        p_BxCxV = jnp.exp(logits_BxCxV.astype(jnp.float32) - log_z_BxC[..., None]) * scale_BxCxV
        is_label_BxCxV = labels_BxC[..., None] == vocab_V
        dlogits_BxCxV = times_slope(p_BxCxV - is_label_BxCxV, logits_BxCxV, softcap)
        dlogits_BxCxV = (factor * jnp.where(valid_BxC[..., None], dlogits_BxCxV, 0.0)).astype(dtype)
        dx_BxCxD += einsum("...v,vd->...d", dlogits_BxCxV, head_VxD, dtype) / factor
        dlogits_NxV = dlogits_BxCxV.reshape(-1, len(head_VxD))
        x_NxD = x_BxCxD.reshape(-1, head_VxD.shape[1])
        product = functools.partial(transposed_dot, platform=platform)
        dhead += product(x_NxD, dlogits_NxV) if transposed else product(dlogits_NxV, x_NxD)
        return (jax.tree.map(jnp.add, total, sums), dhead, drows_BxTxD), dx_BxCxD.astype(dx_dtype)

    start = (
        LossSums.zeros(),
        jnp.zeros(head_VxD.shape[::-1] if transposed else head_VxD.shape, jnp.float32),
        None if context is None else jnp.zeros(rows_BxTxD.shape, jnp.float32),
    )
    chunks = (x_SxBxCxD, labels_SxBxC, _starts(labels_SxBxC))
    (total, dhead, drows_BxTxD), dx_SxBxCxD = jax.lax.scan(add_chunk, start, chunks)
    # Behind a barrier: XLA would fold the transpose into a product that its bfloat16 units then cannot compute.
    dhead_VxD = jax.lax.optimization_barrier(dhead).T if transposed else dhead
    dhead_VxD /= factor
    if context is not None:
        dhead_VxD = dhead_VxD.at[context.ids_BxT].add(drows_BxTxD)
    if platform.name != "cpu":
        # Both before the backward pass of the layers: dhead, which only the optimizer waits for, needs the logits.
        dx_SxBxCxD, dhead_VxD = jax.lax.optimization_barrier((dx_SxBxCxD, dhead_VxD))
    return total, (dx_SxBxCxD, dhead_VxD, jnp.zeros((), x_SxBxCxD.dtype))


def _starts(labels_SxBxC: jax.Array) -> jax.Array:
    """Return the index in T of each chunk's first position, [S]."""
    return jnp.arange(labels_SxBxC.shape[0]) * labels_SxBxC.shape[-1]


def _backward(dtype, weights, vocab_size, platform, softcap, residuals, g):
    """Scale the gradients that the forward pass computed; g holds the gradient of each field of LossSums."""
    dx_SxBxCxD, dhead_VxD, like_x = residuals
    scaled_dx_SxBxCxD = (dx_SxBxCxD * g.loss.astype(dx_SxBxCxD.dtype)).astype(like_x.dtype)
    return scaled_dx_SxBxCxD, dhead_VxD * g.loss, None, None


_chunked.defvjp(_forward, _backward)
