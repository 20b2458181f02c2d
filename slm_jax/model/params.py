"""The model's parameters as a tree: their shapes without arrays, their kinds, and a change of the vocabulary's size.

The tree is a pure dict of arrays, {"embedding": …, "blocks": {"attention": {"query": {"weight": …}, …}, …}, …}; the
leaves under "blocks" have a leading axis of layers.
"""

from typing import Any

from flax import nnx

from slm_jax.config.schema import Config
from slm_jax.model.ops import compute_dtype
from slm_jax.model.transformer import Transformer


def abstract_model(config: Config, vocab_size: int) -> tuple[nnx.GraphDef, Any]:
    """Return the graph and the abstract parameters of the config's Transformer, without creating any array."""
    dtype = compute_dtype(config.train.dtype)
    abstract = nnx.eval_shape(lambda: Transformer(config.model, vocab_size, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(abstract, nnx.Param)
    return graph, nnx.to_pure_dict(params)


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Return whether a parameter is a matrix (or a stack of them, one per layer) rather than a vector of scales."""
    return leaf.ndim >= (3 if is_in_blocks(path) else 2)


def is_in_blocks(path: tuple[Any, ...]) -> bool:
    """Return whether a parameter belongs to the blocks and so has a leading axis of layers."""
    return getattr(path[0], "key", None) == "blocks"
