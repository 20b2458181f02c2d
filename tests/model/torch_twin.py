"""The model, its loss and its optimizer in plain PyTorch: the reference of tests and the baseline of benchmarks.

Written from the definitions (the papers named below), not from slm_jax. Both share the config and the names of the
parameters, so that weights can be copied (`weights_of`). Needs torch >= 2.9 (torch.optim.Muon).

Shapes: B batch, T tokens, S tokens as keys or candidates, D dim, H query heads, G key/value heads, K channels of a
head, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from slm_jax.config.schema import ModelConfig, OptimizerConfig

IGNORE_INDEX = -100
EOS_ID = 5
Batch = Mapping[str, Tensor]


class Attention(nn.Module):
    """Causal self-attention, rotary positions (arXiv:2104.09864), grouped queries (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.width = config.dim // config.heads
        self.window = config.window
        self.query = nn.Linear(config.dim, self.heads * self.width, bias=False)
        self.key = nn.Linear(config.dim, self.kv_heads * self.width, bias=False)
        self.value = nn.Linear(config.dim, self.kv_heads * self.width, bias=False)
        self.out = nn.Linear(self.heads * self.width, config.dim, bias=False)
        self.query_norm = nn.RMSNorm(self.width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.width, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BxTxD: Tensor, cos: Tensor, sin: Tensor, mask_BxTxS: Tensor | None) -> Tensor:
        b, t, _ = x_BxTxD.shape
        q_BxHxTxK = self.query(x_BxTxD).view(b, t, self.heads, self.width).transpose(1, 2)
        k_BxGxTxK = self.key(x_BxTxD).view(b, t, self.kv_heads, self.width).transpose(1, 2)
        v_BxGxTxK = self.value(x_BxTxD).view(b, t, self.kv_heads, self.width).transpose(1, 2)
        q_BxHxTxK = rotate(self.query_norm(q_BxHxTxK), cos, sin).to(v_BxGxTxK.dtype)
        k_BxGxTxK = rotate(self.key_norm(k_BxGxTxK), cos, sin).to(v_BxGxTxK.dtype)
        out_BxHxTxK = functional.scaled_dot_product_attention(
            q_BxHxTxK,
            k_BxGxTxK,
            v_BxGxTxK,
            attn_mask=None if mask_BxTxS is None else mask_BxTxS[:, None],
            is_causal=mask_BxTxS is None,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.out(out_BxHxTxK.transpose(1, 2).reshape(b, t, -1))


def rotate(x_BxHxTxK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the complex numbers with real part in channel i and imaginary part in i + K/2 by the position's angle."""
    real, imaginary = x_BxHxTxK.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


def angles(positions_BxT: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B, 1, T, K/2] of position / base^(2i/K)."""
    i = torch.arange(width // 2, dtype=dtype)
    angle = positions_BxT.to(dtype)[:, None, :, None] / base ** (2 * i / width)
    return angle.cos(), angle.sin()


class SwiGLU(nn.Module):
    """SwiGLU (arXiv:2002.05202); inner width 2/3 of mlp_dim, rounded up to a multiple of mlp_multiple."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = -(-2 * config.mlp_dim // (3 * config.mlp_multiple)) * config.mlp_multiple
        self.gate = nn.Linear(config.dim, width, bias=False)
        self.up = nn.Linear(config.dim, width, bias=False)
        self.down = nn.Linear(width, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm (arXiv:1910.07467)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))


class TorchTransformer(nn.Module):
    """Token ids in, next-token logits out."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        """Draw matrices from normal(0, 0.02); norm scales are 1."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.final_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        if config.tie_weights:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return logits [B, T, V]."""
        c = self.config
        t = input_ids.shape[1]
        positions = torch.arange(t)[None] if positions is None else positions
        cos, sin = angles(positions, c.dim // c.heads, c.rope_base, self.embedding.weight.dtype)
        mask = self._mask(t, attention_mask, segment_ids)
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.head(self.final_norm(x))

    def _mask(self, t: int, attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
        """Return bool [B or 1, T, S], True if attended to; None for causal attention, which has faster kernels."""
        window = self.config.window
        if attention_mask is None and segment_ids is None and (not window or window >= t):
            return None
        mask = torch.ones(1, t, t, dtype=torch.bool).tril()
        if window:
            mask = mask.triu(1 - window)
        if attention_mask is not None:
            mask = mask & (attention_mask[:, None, :] != 0)
        if segment_ids is not None:
            mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
        return mask


def mean_loss(logits: Tensor, batch: Batch, z_loss: float = 0.0, ul_alpha: float = 0.0) -> Tensor:
    """Return cross entropy + z_loss * log(Z)^2 + ul_alpha * unlikelihood, means over the positions with a label."""
    labels = batch["labels"]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not ul_alpha and not z_loss:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    log_p_BxTxV = functional.log_softmax(logits, dim=-1)
    loss = functional.nll_loss(log_p_BxTxV.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(logits, dim=-1)[labels != IGNORE_INDEX].square().mean()
    return loss + ul_alpha * unlikelihood(log_p_BxTxV, batch) / (labels != IGNORE_INDEX).sum() if ul_alpha else loss


def unlikelihood(log_p_BxTxV: Tensor, batch: Batch) -> Tensor:
    """Return the sum over labeled positions t and candidate tokens of -log(1 - p(token)) (arXiv:1908.04319).

    The candidates of t are the distinct ids of input_ids[0..t] in its own segment, without padding and t's own label.
    Without segment_ids, a segment begins at each <EOS>.
    Only their probabilities are gathered: [B, T, S] numbers, not [B, T, V].
    """
    ids = batch["input_ids"]
    log_p_BxTxS = log_p_BxTxV.gather(2, ids[:, None, :].expand(-1, ids.shape[1], -1))
    log_p_BxTxS = log_p_BxTxS.masked_fill(~candidates(batch), -torch.inf)  # log(1 - exp(-inf)) = 0
    return -torch.log1p(-log_p_BxTxS.exp()).sum()


def candidates(batch: Batch) -> Tensor:
    """Return bool [B, T, S]: input_ids[s] is the first occurrence of its id among the candidates of position t."""
    ids = batch["input_ids"]
    labels = batch["labels"]
    real = batch.get("attention_mask", torch.ones_like(ids)) != 0
    segments = batch.get("segment_ids", (ids == EOS_ID).cumsum(dim=1))
    together = real[:, None, :] & (segments[:, :, None] == segments[:, None, :])
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(-1)
    repeated = (together & earlier & (ids[:, :, None] == ids[:, None, :])).any(dim=2)
    is_candidate = together & (earlier | torch.eye(ids.shape[1], dtype=torch.bool)) & ~repeated[:, None, :]
    return is_candidate & (ids[:, None, :] != labels[:, :, None]) & (labels != IGNORE_INDEX)[:, :, None]


def make_adamw(model: nn.Module, config: OptimizerConfig, **options: Any) -> torch.optim.Optimizer:
    """Return AdamW (arXiv:1711.05101) that decays matrices only.

    Args:
        model: Module whose parameters are updated.
        config: Rate, betas and decay.
        **options: fused or foreach.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), **options)


def weights_of(params: Mapping[str, Any], vocab_size: int) -> dict[str, np.ndarray]:
    """Return parameters or gradients of slm_jax under the names and in the layout of the twin.

    `blocks` may contain one tree per layer, or one whose arrays have a leading axis of layers. Matrices are [in, out]
    in slm_jax and [out, in] in the twin. Embedding and head are [V, D] in both, with padding rows in slm_jax.
    """
    trees = dict(params)
    blocks = trees.pop("blocks", {})
    if not all(isinstance(name, int) for name in blocks):
        depth = jax.tree.leaves(blocks)[0].shape[0]
        blocks = {i: jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(depth)}
    tables = {name: np.asarray(value) for name, value in trees.items() if name in ("embedding", "head")}
    named = {f"{name}.weight": value[:vocab_size] for name, value in tables.items()}
    named["final_norm.weight"] = np.asarray(trees["final_norm"]["scale"])
    for i, block in blocks.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(block):
            *modules, kind = (str(getattr(part, "key", part)) for part in path)
            value = np.asarray(leaf)
            named[".".join(["blocks", str(i), *modules, "weight"])] = value.T if kind == "weight" else value
    return named


def load_weights(model: TorchTransformer, params: Mapping[str, Any]) -> None:
    """Copy parameters of slm_jax into the twin.

    Raises:
        KeyError: If the twin lacks a parameter, or slm_jax does.
    """
    named = weights_of(params, model.embedding.num_embeddings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(named.pop(name).copy()))
    if named:
        raise KeyError(f"not in the twin: {sorted(named)}")
