"""Resize a training state to another vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.model.params import has_vocabulary_axis, pure_params
from slm_jax.model.transformer import Transformer, resize_vocabulary_rows
from slm_jax.training.train_step import TrainState


def resize_vocabulary(state: TrainState, model: Transformer, vocab_size: int) -> TrainState:
    """Return the state for another vocabulary size, and set the resized parameters in the model.

    The rows of ids that both vocabularies have stay bit-identical in parameters and moments. New rows are drawn as in
    `Transformer.resize_token_embeddings`, their moments are 0; their averages are the new rows.

    Args:
        state: A training state.
        model: The model of that state, changed in place.
        vocab_size: Entries of the new vocabulary.
    """
    nnx.update(model, state.params)
    old_size = model.vocab_size
    model.resize_token_embeddings(vocab_size, jax.random.fold_in(state.key, state.step))

    def resize(path: tuple[Any, ...], moment: jax.Array) -> jax.Array:
        if not has_vocabulary_axis(path):
            return moment
        rows = len(model.embedding[...])
        new = jnp.zeros((*moment.shape[:-2], rows, moment.shape[-1]), moment.dtype)
        return resize_vocabulary_rows(moment, old_size, vocab_size, new)

    opt_state = jax.tree_util.tree_map_with_path(resize, state.opt_state)
    params = pure_params(model)

    def resize_mean(path: tuple[Any, ...], mean: jax.Array, param: jax.Array) -> jax.Array:
        return resize_vocabulary_rows(mean, old_size, vocab_size, param) if has_vocabulary_axis(path) else mean

    average = state.average
    if average:
        means = jax.tree_util.tree_map_with_path(resize_mean, average["params"], params)
        average = {**average, "params": means}
    return state._replace(params=params, opt_state=opt_state, average=average)
