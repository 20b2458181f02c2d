"""The model with all of its optional parts in plain JAX: one function of the parameters, written from the definitions.

Shapes: B batch, T tokens, S tokens as keys, D dim, H query heads, G key/value heads, K channels of a head, V
vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np


def norm(x, eps, scale=1.0):
    return scale * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)


def rotate(x_BxTxHxK, base):
    t, width = x_BxTxHxK.shape[1], x_BxTxHxK.shape[-1]
    angle = np.arange(t)[:, None] * base ** (-2 * np.arange(width // 2) / width)
    z = (x_BxTxHxK[..., : width // 2] + 1j * x_BxTxHxK[..., width // 2 :]) * np.exp(1j * angle)[None, :, None]
    return jnp.concatenate([z.real, z.imag], axis=-1)


def windows(config):
    """Return the window of each layer, 0 for all tokens, of a pattern whose last layer attends to all."""
    pattern = config.window_pattern or "S"
    letters = [pattern[layer % len(pattern)] for layer in range(config.depth)]
    if config.window_pattern:
        letters[-1] = "L"
    return [config.window if letter == "S" else 0 for letter in letters]


def attention(config, params, x_BxTxD, window, segments_BxT, values_BxTxGxK):
    b, t, _ = x_BxTxD.shape
    width = config.head_width
    q, k, v = ((x_BxTxD @ params[name]["weight"]).reshape(b, t, -1, width) for name in ("query", "key", "value"))
    if config.qk_norm:
        q = norm(q, config.norm_eps, params["query_norm"]["scale"])
        k = norm(k, config.norm_eps, params["key_norm"]["scale"])
    v = v + values_BxTxGxK
    q, k = rotate(q, config.rope_base), rotate(k, config.rope_base)
    k, v = (jnp.repeat(x, config.heads // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / width**0.5
    distance = np.arange(t)[:, None] - np.arange(t)[None]
    visible = (distance >= 0) & (distance < (window or t)) & (segments_BxT[:, :, None] == segments_BxT[:, None])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    out_BxTxHxK = jnp.einsum("bhts,bshk->bthk", weights, v)
    if config.attention_gate:
        out_BxTxHxK *= (2 * jax.nn.sigmoid(x_BxTxD[..., :12] @ params["head_gate"]))[..., None]
    return out_BxTxHxK.reshape(b, t, -1) @ params["out"]["weight"]


def mlp(config, params, x):
    if config.mlp == "relu2":
        return jnp.maximum(x @ params["up"]["weight"], 0) ** 2 @ params["down"]["weight"]
    return (jax.nn.silu(x @ params["gate"]["weight"]) * (x @ params["up"]["weight"])) @ params["down"]["weight"]


def logits(config, params, ids_BxT, segments_BxT=None):
    """Return the logits [B, T, V] of a model without biases, NoPE layers, scaled rotations and dropout."""
    segments_BxT = np.zeros(ids_BxT.shape, int) if segments_BxT is None else segments_BxT
    eps = config.norm_eps
    x = embeddings = params["embedding"][ids_BxT]
    for layer, window in enumerate(windows(config)):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        if config.residual_scales:
            x = block["residual_scale"] * x + block["skip_scale"] * norm(embeddings, eps)
        h = norm(x, eps, block["attention_norm"]["scale"])
        values = 0.0
        if layer in config.value_embeddings:
            n = config.value_embeddings.index(layer)
            gate_BxTxG = 2 * jax.nn.sigmoid(h[..., :12] @ params["value_embeddings"]["value_gate"][n])
            rows = params["value_embeddings"]["table"][n][ids_BxT]
            values = gate_BxTxG[..., None] * rows.reshape(*gate_BxTxG.shape, -1)
        x = x + attention(config, block["attention"], h, window, segments_BxT, values)
        x = x + mlp(config, block["mlp"], norm(x, eps, block["mlp_norm"]["scale"]))
    result = norm(x, eps, params["final_norm"]["scale"]) @ params.get("head", params["embedding"]).T
    return config.logit_softcap * jnp.tanh(result / config.logit_softcap) if config.logit_softcap else result
