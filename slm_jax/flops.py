"""Counting the floating-point operations of a model from its shape."""

from slm_jax.config import ModelConfig
from slm_jax.transformer import swiglu_width


def matmul_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Parameters that every token is multiplied with: all matrices of the blocks and the head (the embedding is a
    look-up and counts nothing; a tied head counts once)."""
    head_width = config.dim // config.heads
    kv_dim = (config.kv_heads or config.heads) * head_width
    attention = 2 * config.dim * config.dim + 2 * config.dim * kv_dim
    return config.depth * (attention + 3 * config.dim * swiglu_width(config)) + vocab_size * config.dim


def mean_context(length: int, window: int) -> float:
    """Keys that a query sees on average, itself included: causal, within the window (0: no window)."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def forward_flops_per_token(config: ModelConfig, vocab_size: int, length: int) -> float:
    """FLOPs of one token's forward pass: 2 per multiply-add.

    Attention is counted as the causal window needs it (about half the square), whether or not the implementation
    skips the masked part.
    """
    attention = 4 * config.depth * config.dim * mean_context(length, config.window)
    return 2 * matmul_parameters(config, vocab_size) + attention


def train_flops_per_token(config: ModelConfig, vocab_size: int, length: int) -> float:
    """FLOPs of one token's training step: the backward pass costs two forward passes."""
    return 3 * forward_flops_per_token(config, vocab_size, length)
