"""A reference implementation of the model in float64 NumPy, one text at a time."""

import jax
import numpy as np
from flax import nnx

from slm_jax.model.transformer import Transformer


class NaiveModel:
    """Full logits of a Transformer without padding, batches, windows or compilation."""

    def __init__(self, model: Transformer):
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.config = model.config
        self.vocab_size = model.vocab_size

    def logits(self, ids) -> np.ndarray:
        """Return the logits of each position, [T, V]."""
        p = self.params
        c = self.config
        width = c.dim // c.heads
        groups = c.kv_heads or c.heads
        t = len(ids)
        angle = np.arange(t)[:, None, None] * c.rope_base ** (-np.arange(0, width, 2) / width)

        def norm(x, scale):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * scale

        x = p["embedding"][np.asarray(ids)]
        for layer in range(c.depth):
            block = jax.tree.map(lambda w, layer=layer: w[layer], p["blocks"])
            attention = block["attention"]
            h = norm(x, block["attention_norm"]["scale"])
            q, k, v = (h @ attention[name]["weight"] for name in ("query", "key", "value"))
            q = q.reshape(t, c.heads, width)
            k = k.reshape(t, groups, width)
            v = v.reshape(t, groups, width)
            if c.qk_norm:
                q = norm(q, attention["query_norm"]["scale"])
                k = norm(k, attention["key_norm"]["scale"])
            q = rotated(q, angle)
            k = rotated(k, angle)
            out = np.zeros((t, c.heads, width))
            for i in range(t):
                first = max(0, i + 1 - c.window) if c.window else 0
                for head in range(c.heads):
                    group = head // (c.heads // groups)
                    scores = k[first : i + 1, group] @ q[i, head] / width**0.5
                    weights = np.exp(scores - scores.max())
                    out[i, head] = weights / weights.sum() @ v[first : i + 1, group]
            x = x + out.reshape(t, -1) @ attention["out"]["weight"]
            h = norm(x, block["mlp_norm"]["scale"])
            gate = h @ block["mlp"]["gate"]["weight"]
            up = h @ block["mlp"]["up"]["weight"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["weight"]
        head = p["embedding"] if c.tie_weights else p["head"]
        return norm(x, p["final_norm"]["scale"]) @ head[: self.vocab_size].T

    def logprobs(self, ids) -> np.ndarray:
        """Return the log-probabilities of the next token, [T - 1, V]; row t follows ids[:t + 1]."""
        logits = self.logits(ids[:-1])
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def total(self, ids, first: int = 1) -> float:
        """Return the log-probability of ids[first:] given the tokens before."""
        rows = self.logprobs(ids)
        return sum(rows[t - 1, ids[t]] for t in range(first, len(ids)))

    def greedy(self, ids, first: int = 1) -> bool:
        """Return whether each of ids[first:] is the most probable token at its position."""
        rows = self.logprobs(ids)
        return all(rows[t - 1].argmax() == ids[t] for t in range(first, len(ids)))


def rotated(x, angle):
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)
