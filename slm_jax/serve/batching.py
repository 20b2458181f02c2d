"""Continuous batching: compiled programs over a block of slots that sequences join and leave at any step.

Every slot has its own token count. Token p of a slot is stored in column p mod S of the slot's cache, independently of
the other slots, so that the operands of a slot's computation, and their order, are those of the sequence running alone:
the same request gives the same bits whatever it is batched with. (The number of slots is part of the program; another
number may round differently.)

A prompt is fed in chunks to a cache of its own, whose columns are then copied into a slot. A block starts with few
columns and is enlarged when a sequence needs more, up to the context; beyond it, a slot's cache is a circular buffer.

Shapes: B slots, T tokens of a chunk, S columns, V vocabulary, N steps of a call (maximum), K most probable ids.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.generation.batch import NO_TOKEN, uniform_pair
from slm_jax.generation.decode import DecodeWeights, next_logits
from slm_jax.generation.sampling import SamplingArrays, penalize, sample
from slm_jax.model.kv_cache import KVCache, SlotCache
from slm_jax.model.transformer import Transformer

MAX_STEPS = 32
"""Maximum number of decoding steps of one call (N)."""
TOP_LOGPROBS = 5
"""Number of most probable ids reported for each token (K)."""


class Block(NamedTuple):
    """Device state of a block of slots; donated at each call.

    Attributes:
        cache: Keys and values.
        logits_BxV: float32, the logits of the next token.
        seen_BxV: bool, ids of the prompt and the generated text.
    """

    cache: SlotCache
    logits_BxV: jax.Array
    seen_BxV: jax.Array


class SlotInputs(NamedTuple):
    """Inputs of each slot, passed by the host at each call.

    Attributes:
        position_B: int32, number of tokens so far, prompt included.
        generated_B: int32, number of generated tokens so far.
        remaining_B: int32, number of tokens that may still be generated; 0: the slot is empty.
        seed_B: uint32.
        ignore_eos_B: bool, never sample the ids that end a sequence.
        logprobs_B: bool, compute log-probabilities.
        chat_B: bool, the sequence is a conversation.
        sampling: Sampling settings.
    """

    position_B: Any
    generated_B: Any
    remaining_B: Any
    seed_B: Any
    ignore_eos_B: Any
    logprobs_B: Any
    chat_B: Any
    sampling: SamplingArrays


class Logprobs(NamedTuple):
    """Log-probabilities of the model itself, before any sampling setting.

    Attributes:
        token: float32 [...], of the token at that position.
        top_ids_K: int32 [..., K], the most probable ids, in descending order.
        top_K: float32 [..., K], of these ids.
    """

    token: jax.Array
    top_ids_K: jax.Array
    top_K: jax.Array


class TokenMasks(NamedTuple):
    """Masks over the vocabulary, [2, V]: the first row for texts, the second one for conversations.

    Attributes:
        suppressed_2xV: bool, ids that are never sampled.
        stops_2xV: bool, ids that end a sequence; exempt from the repetition penalty (see generation/sampling.py).
    """

    suppressed_2xV: Any
    stops_2xV: Any


def compute_logprobs(logits: jax.Array, ids: jax.Array) -> Logprobs:
    """Return log-probabilities of ids int32 [...], and of the most probable ids, under logits float32 [..., V]."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    top_K, top_ids_K = jax.lax.top_k(logits, TOP_LOGPROBS)
    token = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] - log_total
    return Logprobs(token, top_ids_K.astype(jnp.int32), top_K - log_total[..., None])


@functools.partial(jax.jit, static_argnames=("graph", "slots", "columns"))
def empty_block(graph: nnx.GraphDef, weights: DecodeWeights, slots: int, columns: int) -> Block:
    """Return a block of empty slots."""
    model: Transformer = nnx.merge(graph, weights.params)
    v = model.vocab_size
    empty = model.empty_cache(slots, columns)
    cache = SlotCache(empty.keys, empty.values, empty.positions)
    return Block(cache, jnp.zeros((slots, v), jnp.float32), jnp.zeros((slots, v), bool))


@functools.partial(jax.jit, static_argnames=("graph", "columns"))
def empty_prompt_cache(graph: nnx.GraphDef, weights: DecodeWeights, columns: int) -> KVCache:
    """Return the cache that one prompt is fed to."""
    model: Transformer = nnx.merge(graph, weights.params)
    return model.empty_cache(1, columns)


@functools.partial(jax.jit, static_argnames=("graph", "window", "logprobs"), donate_argnames="cache")
def prefill_chunk(
    graph: nnx.GraphDef,
    weights: DecodeWeights,
    cache: KVCache,
    ids_T: jax.Array,
    first: jax.Array,
    count: jax.Array,
    next_T: jax.Array,
    window: int,
    logprobs: bool,
) -> tuple[KVCache, jax.Array, Logprobs | None]:
    """Run the model on a chunk of a prompt.

    Args:
        graph: Graph of the model.
        weights: Its parameters.
        cache: The cache of this prompt, donated: position p is in column p mod S. A chunk that does not begin at a
            multiple of T must end before the last column.
        ids_T: int32 [T], the chunk, padded at the end.
        first: int32 scalar, position of the chunk in the prompt.
        count: int32 scalar, number of ids that are not padding.
        next_T: int32 [T], the id after each id of the chunk.
        window: Number of tokens that attention sees.
        logprobs: Whether to compute log-probabilities.

    Returns:
        The updated cache; logits float32 [V] after the last id; log-probabilities [T] of `next_T`, or None.
    """
    model: Transformer = nnx.merge(graph, weights.params)
    index_T = jnp.arange(len(ids_T))
    cache = cache._replace(written=first)  # over the padding of the chunk before
    positions_1xT = jnp.where(index_T < count, first + index_T, -1)[None]
    x_1xTxD, cache = model.hidden_cached(ids_T[None], positions_1xT, cache, window, weights.layers)
    last_D = jax.lax.dynamic_index_in_dim(x_1xTxD[0], count - 1, keepdims=False)
    logits_V = next_logits(model, weights, last_D)
    if not logprobs:
        return cache, logits_V, None
    logits_TxV = next_logits(model, weights, x_1xTxD[0])
    return cache, logits_V, compute_logprobs(logits_TxV, next_T)


@functools.partial(jax.jit, donate_argnames="block")
def insert(
    block: Block, slot: jax.Array, prompt: KVCache, length: jax.Array, logits_V: jax.Array, seen_V: jax.Array
) -> Block:
    """Copy a prompt into a slot.

    Args:
        block: The block, donated.
        slot: int32 scalar, index of the slot.
        prompt: The prompt's cache, after its last chunk.
        length: int32 scalar, number of tokens of the prompt.
        logits_V: float32 [V], the logits after the prompt.
        seen_V: bool [V], ids of the prompt.
    """
    columns = block.cache.positions.shape[1]
    prompt_columns = prompt.positions.shape[1]
    # The newest position that belongs in each column of the slot, and the column where the prompt's cache has it.
    position_S = length - 1 - (length - 1 - jnp.arange(columns)) % columns
    source_S = position_S % prompt_columns

    def put(cache_NxSxK: jax.Array, prompt_GxPxK: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache_NxSxK, prompt_GxPxK[:, source_S], (slot * len(prompt_GxPxK), 0, 0))

    cache = block.cache._replace(
        keys=tuple(map(put, block.cache.keys, prompt.keys)),
        values=tuple(map(put, block.cache.values, prompt.values)),
        positions=block.cache.positions.at[slot].set(jnp.maximum(position_S, -1)),
    )
    return Block(cache, block.logits_BxV.at[slot].set(logits_V), block.seen_BxV.at[slot].set(seen_V))


@functools.partial(jax.jit, static_argnames="columns")
def trim_prompt(prompt: KVCache, columns: int) -> KVCache:
    """Return a copy of the first columns of a prompt's cache."""
    keys, values = (tuple(x[:, :columns] for x in xs) for xs in (prompt.keys, prompt.values))
    return prompt._replace(keys=keys, values=values, positions=prompt.positions[:, :columns])


@functools.partial(jax.jit, static_argnames="columns")
def restore_prompt(kept: KVCache, length: jax.Array, columns: int) -> KVCache:
    """Return a cache of a prompt whose first tokens are kept.

    Args:
        kept: Keys and values from `trim_prompt`, of this prompt or another one that begins with the same tokens.
        length: int32 scalar, number of tokens that both have in common.
        columns: Number of columns of the result.
    """
    pad = columns - kept.positions.shape[1]

    def widen(x_GxSxK: jax.Array) -> jax.Array:
        return jnp.pad(x_GxSxK, ((0, 0), (0, pad), (0, 0)))

    positions_1xS = jnp.arange(columns)[None]
    positions_1xS = jnp.where(positions_1xS < length, positions_1xS, -1)
    return KVCache(tuple(map(widen, kept.keys)), tuple(map(widen, kept.values)), positions_1xS, length)


@functools.partial(jax.jit, static_argnames="columns")
def resize(block: Block, columns: int) -> Block:
    """Return the block with more or fewer columns; every sequence in it must fit into both."""

    def fit(x: jax.Array, fill: int) -> jax.Array:
        pad = max(columns - x.shape[1], 0)
        return jnp.pad(x[:, :columns], ((0, 0), (0, pad), (0, 0))[: x.ndim], constant_values=fill)

    keys, values = (tuple(fit(x, 0) for x in xs) for xs in (block.cache.keys, block.cache.values))
    cache = block.cache._replace(keys=keys, values=values, positions=fit(block.cache.positions, -1))
    return block._replace(cache=cache)


@functools.partial(jax.jit, static_argnames=("graph", "window"), donate_argnames="block")
def decode(
    graph: nnx.GraphDef,
    weights: DecodeWeights,
    block: Block,
    inputs: SlotInputs,
    masks: TokenMasks,
    steps: jax.Array,
    window: int,
) -> tuple[Block, jax.Array, Logprobs]:
    """Generate up to `steps` tokens in every slot, or until every sequence has ended.

    Args:
        graph: Graph of the model.
        weights: Its parameters.
        block: The block, donated.
        inputs: Counts and settings of the slots.
        masks: Masks over the vocabulary.
        steps: int32 scalar, at most MAX_STEPS.
        window: Number of tokens that attention sees.

    Returns:
        The block; generated ids int32 [B, N], NO_TOKEN where there is none, a stop id being the last of its sequence;
        and log-probabilities [B, N], zeros unless some slot has them computed.
    """
    model: Transformer = nnx.merge(graph, weights.params)
    b = len(inputs.remaining_B)
    index_B = jnp.arange(b)
    chat_B = inputs.chat_B.astype(jnp.int32)
    step_BxN = inputs.generated_B[:, None] + jnp.arange(MAX_STEPS)
    uniform_BxNx2 = jax.vmap(jax.vmap(uniform_pair, (None, None, 0)), (0, None, 0))(
        inputs.seed_B, jnp.uint32(0), step_BxN
    )

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, block, active_B, ids_BxN, logprobs = carry
        uniform_Bx2 = jax.lax.dynamic_index_in_dim(uniform_BxNx2, i, 1, keepdims=False)
        token_B = _sample_next(block, inputs, masks, uniform_Bx2)
        logprobs = jax.lax.cond(
            jnp.any(inputs.logprobs_B),
            lambda all_: jax.tree.map(
                lambda old, new: old.at[:, i].set(new), all_, compute_logprobs(block.logits_BxV, token_B)
            ),
            lambda all_: all_,
            logprobs,
        )
        ids_BxN = ids_BxN.at[:, i].set(jnp.where(active_B, token_B, NO_TOKEN))
        seen_BxV = block.seen_BxV.at[index_B, token_B].max(active_B)
        position_B = jnp.where(active_B, inputs.position_B + i, -1)
        # The last token of a sequence is fed too: the other slots need the step in any case.
        x_Bx1xD, cache = model.hidden_cached(token_B[:, None], position_B[:, None], block.cache, window, weights.layers)
        logits_BxV = next_logits(model, weights, x_Bx1xD[:, -1])
        active_B &= ~masks.stops_2xV[chat_B, token_B] & (i + 1 < inputs.remaining_B)
        return i + 1, Block(cache, logits_BxV, seen_BxV), active_B, ids_BxN, logprobs

    ids_BxN = jnp.full((b, MAX_STEPS), NO_TOKEN)
    start = (jnp.int32(0), block, inputs.remaining_B > 0, ids_BxN, _zero_logprobs(b))
    _, block, _, ids_BxN, logprobs = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & jnp.any(carry[2]), step, start
    )
    return block, ids_BxN, logprobs


def _zero_logprobs(slots: int) -> Logprobs:
    return Logprobs(
        token=jnp.zeros((slots, MAX_STEPS)),
        top_ids_K=jnp.zeros((slots, MAX_STEPS, TOP_LOGPROBS), jnp.int32),
        top_K=jnp.zeros((slots, MAX_STEPS, TOP_LOGPROBS)),
    )


def _sample_next(block: Block, inputs: SlotInputs, masks: TokenMasks, uniform_Bx2: jax.Array) -> jax.Array:
    """Return the next ids int32 [B], sampled as by `slm_jax.generation.decode`."""
    kind_B = inputs.chat_B.astype(jnp.int32)
    stops_BxV = masks.stops_2xV[kind_B]
    logits_BxV = penalize(block.logits_BxV, block.seen_BxV & ~stops_BxV, inputs.sampling.penalty_B)
    never_BxV = masks.suppressed_2xV[kind_B] | (inputs.ignore_eos_B[:, None] & stops_BxV)
    return sample(jnp.where(never_BxV, -jnp.inf, logits_BxV), uniform_Bx2, inputs.sampling)
