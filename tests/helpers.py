"""Configs, models, ids and comparisons that several tests use."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.config.schema import Config, ModelConfig
from slm_jax.model.params import is_matrix
from slm_jax.model.transformer import Transformer
from tokenizer import HybridTokenizer

FLOAT32 = jnp.dtype("float32")
BFLOAT16 = jnp.dtype("bfloat16")
FLOAT16 = jnp.dtype("float16")

TINY = {
    "model.dim": 32,
    "model.depth": 2,
    "model.heads": 4,
    "model.mlp_dim": 96,
    "train.batch_size": 8,
    "train.sequence_length": 16,
    "train.steps": 20,
    "train.dtype": "float32",
    "optimizer.warmup_steps": 2,
}

ONE_BLOCK = {
    "model.dim": 32,
    "model.depth": 1,
    "model.heads": 2,
    "model.mlp_dim": 64,
    "train.sequence_length": 32,
    "tokenizer.vocab_size": 400,
    "eval.max_tokens": 500,
}
"""Options of the smallest run, for tests of whole commands."""


def words_of(fields: dict[str, object]) -> list[str]:
    """Return options as words of a command line: `["--model.dim", "32", …]`."""
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def tiny_config(**overrides: object) -> Config:
    """Return a config that trains in seconds; overrides are written `train__steps=3`."""
    return Config.load(**{**TINY, **{k.replace("__", "."): v for k, v in overrides.items()}})


def logits_of(model: Transformer, *args: object, **kwargs: object) -> jax.Array:
    """Return the logits of a model as one program; compiling operation by operation takes eight times as long."""
    return _logits(*nnx.split(model), args, kwargs)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: object, params: object, args: tuple, kwargs: dict) -> jax.Array:
    return Transformer.__call__(nnx.merge(graph, params), *args, **kwargs)


class CompiledTransformer(Transformer):
    """A Transformer whose calls are one program each."""

    __call__ = logits_of


def tiny_model(vocab_size: int = 61, seed: int = 0, scale: float = 5.0, **fields: object) -> Transformer:
    """Return a Transformer with enlarged weights, so that every dependence is visible in float32."""
    config = ModelConfig(**{"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 96, **fields})
    return _creator(config, vocab_size, seed, scale)()


@functools.cache
def _creator(config: ModelConfig, vocab_size: int, seed: int, scale: float) -> Callable[[], Transformer]:
    """Return the compiled function that creates a tiny model."""

    @nnx.jit
    def create() -> Transformer:
        model = CompiledTransformer(config, vocab_size, rngs=nnx.Rngs(seed))
        graph, params = nnx.split(model)
        tree = nnx.to_pure_dict(params)
        tree = jax.tree_util.tree_map_with_path(lambda path, x: x * scale if is_matrix(path, x) else x, tree)
        return nnx.merge(graph, tree)

    return create


def learned_tokenizer(texts: Iterable[str], vocab_size: int = 400) -> HybridTokenizer:
    """Return a tokenizer learned from some texts."""
    tokenizer = HybridTokenizer()
    for text in texts:
        tokenizer.add_text(text)
    tokenizer.freeze_vocab(vocab_size=vocab_size)
    return tokenizer


def random_ids(shape: tuple[int, ...], vocab_size: int = 61, seed: int = 0) -> jax.Array:
    """Return random int32 ids below vocab_size."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab_size, shape), jnp.int32)


def largest_difference(a: object, b: object) -> float:
    """Return the largest absolute difference over all leaves of two trees."""
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def cosine(a: object, b: object) -> float:
    """Return the cosine similarity of two flattened trees."""
    x, y = (np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(t)]) for t in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
