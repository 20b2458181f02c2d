"""Texts of different ages written together: compiled programs over a block of rows that texts join and leave.

Each row keeps its own count of tokens. Token p of a row stands in column p mod S of the row's cache, whatever the other
rows do, so that the numbers a row is computed with, and their order, are those of the row alone: the same request gives
the same bits in any company. (The number of rows is part of the program, and another number may round otherwise.)

A prompt is fed in chunks to a cache of its own, whose columns then replace a row's. Blocks begin with few columns and
get more when a text needs them, up to the context; then a row's columns go round.

Shapes: B rows, T tokens of a chunk, S columns, V vocabulary, N drawn at a call (at most), K most probable ones told.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.generation.decode import NO_TOKEN, Weights, uniform_pair
from slm_jax.generation.sampling import Controls, penalize, sample
from slm_jax.model import ops
from slm_jax.model.kv_cache import KVCache
from slm_jax.model.transformer import Transformer

MOST_DRAWN = 32
"""Tokens of a row drawn by one call, at most (N)."""
TOLD = 5
"""Most probable tokens told of each place (K)."""


class RowCache(KVCache):
    """A cache whose rows each have a column of their own for the next token."""

    def claim(self, positions_BxT: jax.Array) -> tuple["RowCache", jax.Array]:
        """The cache with one column taken in each row (T = 1), and which: int32 [B]."""
        column_B = positions_BxT[:, 0] % self.positions.shape[1]
        rows_B = jnp.arange(len(column_B))
        return self._replace(positions=self.positions.at[rows_B, column_B].set(positions_BxT[:, 0])), column_B


class Block(NamedTuple):
    """What the rows have come to; given away at each call (donated)."""

    cache: RowCache
    logits_BxV: jax.Array  # float32, of the token to draw next
    seen_BxV: jax.Array  # bool: ids of the prompt and of what is drawn


class Rows(NamedTuple):
    """What the host says of the rows at each call."""

    position_B: Any  # int32: tokens so far, prompt included
    drawn_B: Any  # int32: tokens drawn so far
    left_B: Any  # int32: tokens that may still be drawn; 0: nobody is here
    seed_B: Any  # uint32
    endless_B: Any  # bool: the ids that end a text are never drawn
    told_B: Any  # bool: log-probabilities are wanted
    controls: Controls


class Told(NamedTuple):
    """Log-probabilities by the model itself, before any setting of sampling."""

    of_id: jax.Array  # float32 [...]
    ids_K: jax.Array  # int32 [..., K], the most probable first
    of_ids_K: jax.Array  # float32 [..., K]


class Fixed(NamedTuple):
    """What is the same for all requests."""

    suppressed_V: Any  # bool: never drawn
    stops_V: Any  # bool: these end a text; no penalty holds them off


def tell(logits: jax.Array, ids: jax.Array) -> Told:
    """Log-probabilities of ids int32 [...] and of the most probable ones, of logits [..., V]."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    top, top_ids = jax.lax.top_k(logits, TOLD)
    of_id = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] - log_total
    return Told(of_id, top_ids.astype(jnp.int32), top - log_total[..., None])


@functools.partial(jax.jit, static_argnames=("graph", "rows", "columns"))
def empty_block(graph: nnx.GraphDef, weights: Weights, rows: int, columns: int) -> Block:
    """A block with nobody in it."""
    model: Transformer = nnx.merge(graph, weights.params)
    v = model.vocab_size
    cache = RowCache(*model.empty_cache(rows, columns))
    return Block(cache, jnp.zeros((rows, v), jnp.float32), jnp.zeros((rows, v), bool))


@functools.partial(jax.jit, static_argnames=("graph", "columns"))
def empty_prompt(graph: nnx.GraphDef, weights: Weights, columns: int) -> KVCache:
    """The cache that one prompt is fed to."""
    model: Transformer = nnx.merge(graph, weights.params)
    return model.empty_cache(1, columns)


@functools.partial(jax.jit, static_argnames=("graph", "window", "told"), donate_argnames="cache")
def feed_prompt(
    graph: nnx.GraphDef,
    weights: Weights,
    cache: KVCache,
    ids_T: jax.Array,
    first: jax.Array,
    count: jax.Array,
    next_T: jax.Array,
    window: int,
    told: bool,
) -> tuple[KVCache, jax.Array, Told | None]:
    """The cache with ids[:count] of a prompt fed, which stand at position `first` of it; the logits [V] after them.

    told: also what the model thought of next[t], the id that follows ids[t].
    """
    model: Transformer = nnx.merge(graph, weights.params)
    index_T = jnp.arange(len(ids_T))
    positions_1xT = jnp.where(index_T < count, first + index_T, -1)[None]
    x_1xTxD, cache = model.hidden_cached(ids_T[None], positions_1xT, cache, window, weights.layers)
    last_D = jax.lax.dynamic_index_in_dim(x_1xTxD[0], count - 1, keepdims=False)
    logits_V = ops.einsum("d,vd->v", last_D, weights.head_VxD, model.dtype)
    if not told:
        return cache, logits_V, None
    return cache, logits_V, tell(ops.einsum("td,vd->tv", x_1xTxD[0], weights.head_VxD, model.dtype), next_T)


@functools.partial(jax.jit, donate_argnames="block")
def join(
    block: Block, row: jax.Array, prompt: KVCache, length: jax.Array, logits_V: jax.Array, seen_V: jax.Array
) -> Block:
    """The block with a prompt of `length` tokens in a row."""
    columns, from_columns = block.cache.positions.shape[1], prompt.positions.shape[1]
    # The newest token that stands in each column, and where the prompt's cache has it.
    position_S = length - 1 - (length - 1 - jnp.arange(columns)) % columns
    source_S = position_S % from_columns

    def put(cache_NxSxK: jax.Array, prompt_GxPxK: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache_NxSxK, prompt_GxPxK[:, source_S], (row * len(prompt_GxPxK), 0, 0))

    cache = block.cache._replace(
        keys=tuple(map(put, block.cache.keys, prompt.keys)),
        values=tuple(map(put, block.cache.values, prompt.values)),
        positions=block.cache.positions.at[row].set(jnp.maximum(position_S, -1)),
    )
    return Block(cache, block.logits_BxV.at[row].set(logits_V), block.seen_BxV.at[row].set(seen_V))


@functools.partial(jax.jit, static_argnames="columns")
def resize(block: Block, columns: int) -> Block:
    """The block with more or fewer columns; every text in it must fit into both."""

    def fit(x: jax.Array, fill: int) -> jax.Array:
        pad = max(columns - x.shape[1], 0)
        return jnp.pad(x[:, :columns], ((0, 0), (0, pad), (0, 0))[: x.ndim], constant_values=fill)

    keys, values = (tuple(fit(x, 0) for x in xs) for xs in (block.cache.keys, block.cache.values))
    cache = block.cache._replace(keys=keys, values=values, positions=fit(block.cache.positions, -1))
    return block._replace(cache=cache)


@functools.partial(jax.jit, static_argnames=("graph", "window"), donate_argnames="block")
def draw(
    graph: nnx.GraphDef, weights: Weights, block: Block, rows: Rows, fixed: Fixed, steps: jax.Array, window: int
) -> tuple[Block, jax.Array, Told]:
    """The block after up to `steps` tokens of each row, or until every row has ended: (block, ids [B, N], told [B, N]).

    NO_TOKEN stands where none was drawn. A stop is the last token of its row.
    """
    model: Transformer = nnx.merge(graph, weights.params)
    b = len(rows.left_B)
    index_B = jnp.arange(b)
    step_BxN = rows.drawn_B[:, None] + jnp.arange(MOST_DRAWN)
    uniform_BxNx2 = jax.vmap(jax.vmap(uniform_pair, (None, None, 0)), (0, None, 0))(
        rows.seed_B, jnp.uint32(0), step_BxN
    )

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, block, active_B, ids_BxN, told = carry
        uniform_Bx2 = jax.lax.dynamic_index_in_dim(uniform_BxNx2, i, 1, keepdims=False)
        token_B = _choose(block, rows, fixed, uniform_Bx2)
        told = jax.lax.cond(
            jnp.any(rows.told_B),
            lambda told: jax.tree.map(lambda old, new: old.at[:, i].set(new), told, tell(block.logits_BxV, token_B)),
            lambda told: told,
            told,
        )
        ids_BxN = ids_BxN.at[:, i].set(jnp.where(active_B, token_B, NO_TOKEN))
        seen_BxV = block.seen_BxV.at[index_B, token_B].max(active_B)
        position_B = jnp.where(active_B, rows.position_B + i, -1)
        # Fed even where it is the last: the rows that go on need the step in any case.
        x_Bx1xD, cache = model.hidden_cached(token_B[:, None], position_B[:, None], block.cache, window, weights.layers)
        logits_BxV = ops.einsum("bd,vd->bv", x_Bx1xD[:, -1], weights.head_VxD, model.dtype)
        active_B &= ~fixed.stops_V[token_B] & (i + 1 < rows.left_B)
        return i + 1, Block(RowCache(*cache), logits_BxV, seen_BxV), active_B, ids_BxN, told

    told = Told(
        jnp.zeros((b, MOST_DRAWN)), jnp.zeros((b, MOST_DRAWN, TOLD), jnp.int32), jnp.zeros((b, MOST_DRAWN, TOLD))
    )
    start = (jnp.int32(0), block, rows.left_B > 0, jnp.full((b, MOST_DRAWN), NO_TOKEN), told)
    _, block, _, ids_BxN, told = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[2]), step, start)
    return block, ids_BxN, told


def _choose(block: Block, rows: Rows, fixed: Fixed, uniform_Bx2: jax.Array) -> jax.Array:
    """The next ids int32 [B], as `generate` draws them."""
    logits_BxV = penalize(block.logits_BxV, block.seen_BxV & ~fixed.stops_V, rows.controls.penalty_B)
    never_BxV = fixed.suppressed_V | (rows.endless_B[:, None] & fixed.stops_V)
    return sample(jnp.where(never_BxV, -jnp.inf, logits_BxV), uniform_Bx2, rows.controls)
