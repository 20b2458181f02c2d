"""Next-token cross entropy without the [B, T, V] logits.

The head's product, the softmax and both gradients are made chunk by chunk in the forward pass, so that only one
chunk of logits exists at a time; the backward pass scales what was kept. The method is that of fused linear cross
entropy (Liger Kernel, arXiv:2410.10989); here it is plain JAX.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.batch import IGNORE
from slm_jax.ops.matmul import einsum, transposed_dot_f32

_CHUNK = 1024  # rows of logits alive at a time


class LossSums(NamedTuple):
    """Sums over the predicted positions, float32 scalars: divide by `tokens` for means."""

    loss: jax.Array  # cross entropy in nats, plus the z-loss where asked for
    nll: jax.Array  # cross entropy in nats
    correct: jax.Array  # positions whose most probable token is the label
    tokens: jax.Array  # positions with a label


def naive_cross_entropy(
    x_BxTxD: jax.Array, head_VxD: jax.Array, labels_BxT: jax.Array, dtype: jnp.dtype, z_loss: float = 0.0
) -> LossSums:
    """What `cross_entropy` computes, from whole logits."""
    return _sums(_logits(x_BxTxD.astype(dtype), head_VxD.astype(dtype)), labels_BxT, z_loss)[0]


def cross_entropy(
    x_BxTxD: jax.Array, head_VxD: jax.Array, labels_BxT: jax.Array, dtype: jnp.dtype, z_loss: float = 0.0
) -> LossSums:
    """Sums of the loss of hidden states [B, T, D] against labels int32 [B, T] under the head [V, D].

    Position t is scored against labels[:, t], which is already the next token; `IGNORE` counts for nothing.
    Only `loss` has a gradient; gradients are float32.
    """
    b, t, d = x_BxTxD.shape
    # Chunks are cut along T: cut along B, a batch that is split over devices would be visited one device at a time.
    chunks = min(t, -(-b * t // _CHUNK))
    size = -(-t // chunks)
    x_BxTxD = jnp.pad(x_BxTxD, ((0, 0), (0, chunks * size - t), (0, 0)))
    labels_BxT = jnp.pad(labels_BxT, ((0, 0), (0, chunks * size - t)), constant_values=IGNORE)
    x_SxBxCxD = x_BxTxD.reshape(b, chunks, size, d).swapaxes(0, 1)
    labels_SxBxC = labels_BxT.reshape(b, chunks, size).swapaxes(0, 1)
    return _chunked(x_SxBxCxD, head_VxD, labels_SxBxC, dtype, z_loss)


def _logits(x_BxCxD: jax.Array, head_VxD: jax.Array) -> jax.Array:
    return einsum("bcd,vd->bcv", x_BxCxD, head_VxD, x_BxCxD.dtype)


def _sums(logits_BxCxV: jax.Array, labels_BxC: jax.Array, z_loss: float) -> tuple[LossSums, jax.Array, jax.Array]:
    """(sums, log Z [B, C], validity [B, C]) of float32 logits."""
    valid_BxC = labels_BxC != IGNORE
    log_z_BxC = jax.nn.logsumexp(logits_BxCxV, axis=-1)
    label_BxC = jnp.where(valid_BxC, labels_BxC, 0)  # any real id: masked out below
    target_BxC = jnp.take_along_axis(logits_BxCxV, label_BxC[..., None], axis=-1)[..., 0]
    nll = jnp.sum(jnp.where(valid_BxC, log_z_BxC - target_BxC, 0.0))
    z = z_loss * jnp.sum(jnp.where(valid_BxC, log_z_BxC**2, 0.0))
    correct = jnp.sum(valid_BxC & (jnp.argmax(logits_BxCxV, axis=-1) == label_BxC), dtype=jnp.float32)
    return LossSums(nll + z, nll, correct, jnp.sum(valid_BxC, dtype=jnp.float32)), log_z_BxC, valid_BxC


def _zero_sums() -> LossSums:
    zero = jnp.zeros((), jnp.float32)
    return LossSums(zero, zero, zero, zero)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked(x_SxBxCxD, head_VxD, labels_SxBxC, dtype, z_loss):
    head_VxD = head_VxD.astype(dtype)

    def one_chunk(total, chunk):
        sums, _, _ = _sums(_logits(chunk[0].astype(dtype), head_VxD), chunk[1], z_loss)
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(one_chunk, _zero_sums(), (x_SxBxCxD, labels_SxBxC))[0]


def _forward(x_SxBxCxD, head_VxD, labels_SxBxC, dtype, z_loss):
    head_VxD = head_VxD.astype(dtype)
    vocab_V = jnp.arange(head_VxD.shape[0])

    def one_chunk(carry, chunk):
        total, dhead_VxD = carry
        x_BxCxD, labels_BxC = chunk[0].astype(dtype), chunk[1]
        logits_BxCxV = _logits(x_BxCxD, head_VxD)
        sums, log_z_BxC, valid_BxC = _sums(logits_BxCxV, labels_BxC, z_loss)
        p_BxCxV = jnp.exp(logits_BxCxV - log_z_BxC[..., None])
        p_BxCxV *= (1.0 + 2.0 * z_loss * log_z_BxC)[..., None]  # d(nll + z) / d(log Z)
        hit_BxCxV = labels_BxC[..., None] == vocab_V
        dlogits_BxCxV = jnp.where(valid_BxC[..., None], p_BxCxV - hit_BxCxV, 0.0).astype(dtype)
        dx_BxCxD = einsum("bcv,vd->bcd", dlogits_BxCxV, head_VxD, dtype)
        rows = x_BxCxD.shape[0] * x_BxCxD.shape[1]
        dhead_VxD += transposed_dot_f32(dlogits_BxCxV.reshape(rows, -1), x_BxCxD.reshape(rows, -1))
        return (jax.tree.map(jnp.add, total, sums), dhead_VxD), dx_BxCxD

    start = (_zero_sums(), jnp.zeros(head_VxD.shape, jnp.float32))
    (total, dhead_VxD), dx_SxBxCxD = jax.lax.scan(one_chunk, start, (x_SxBxCxD, labels_SxBxC))
    return total, (dx_SxBxCxD, dhead_VxD)


def _backward(dtype, z_loss, saved, g):
    dx_SxBxCxD, dhead_VxD = saved
    return dx_SxBxCxD * g.loss, dhead_VxD * g.loss, None


_chunked.defvjp(_forward, _backward)
