"""Text generation: prefill, then one compiled loop that samples tokens until every sequence has ended.

    generate(model, tokenizer, ["Once upon", "The"], 200, Sampling(temperature=0.8, seed=1), context=256) -> texts
    stream(...) -> tokens as they are sampled    generate_ids(...) -> all ids    python -m slm_jax.generate --help

Prompts are padded on the left, so that the sequences of a batch (its rows) end in the same column and every step writes
one column of the cache for all of them. Changing `Sampling` settings, suppressed ids, stop ids, or the length of
prompts within a multiple of 64 tokens compiles nothing.

Every layer attends to at most the last `context` tokens. The cache is a circular buffer of that many columns and a few
more, so texts of any length are generated in bounded memory. Pass the length that the model was trained at (a run's
`load_run(path).context`): the model has seen no larger distance. A text within the context is continued exactly as by
the full forward pass; beyond it, attention slides along.

Parameters that are split over several devices stay split: each device multiplies its part, and activations move between
devices, no matrices of the blocks. The state of the generation is replicated. All processes of the mesh must then call
`generate_ids` with the same arguments.

Shapes: B sequences, L columns (padding, prompts, generated tokens), V vocabulary.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.distributed.sharding import mesh_of
from slm_jax.generation.batch import (
    NO_TOKEN,
    BatchRequest,
    id_mask,
    pad_prompts,
    power_of_two,
    round_up,
    seeds,
    uniforms,
)
from slm_jax.generation.sampling import Sampling, SamplingArrays, ban_ngrams, penalize, sample, stack_sampling
from slm_jax.model import ops
from slm_jax.model.kv_cache import KVCache
from slm_jax.model.layers import unstack_layers
from slm_jax.model.transformer import Transformer
from slm_jax.utils.text_tokenizer import TextTokenizer, decode_continuation

_CHUNKS = (64, 512)  # minimum and maximum number of prompt tokens per prefill step, powers of two
_STREAM_SECONDS = 0.05  # approximate time between two segments of a stream
_STREAM_TOKENS = 64  # maximum number of tokens in a segment of a stream


class _State(NamedTuple):
    """State of a batch that changes during generation; its arrays are donated at each call."""

    cache: KVCache
    history_BxL: jax.Array  # int32: padding, prompts, generated ids; NO_TOKEN elsewhere
    column: jax.Array  # int32 scalar: the next column to fill
    seen_BxV: jax.Array  # bool: ids of prompt and generated text
    logits_BxV: jax.Array  # float32, of the next token
    ended_B: jax.Array  # bool


class _Inputs(NamedTuple):
    """Inputs of a batch that stay constant during generation."""

    start_B: Any  # int32: first column of each prompt
    first: Any  # int32 scalar: the first generated column
    uniform_BxLx2: Any  # float32 in [0, 1): the random numbers of each token of each sequence
    sampling: SamplingArrays
    suppressed_V: Any  # bool: never sampled
    stops_V: Any  # bool: these end a sequence; exempt from penalty and n-gram rule


class DecodeWeights(NamedTuple):
    """A model's parameters in the form that decoding uses.

    Attributes:
        params: The parameters as they are.
        layers: The parameters of each block, with matrices cast to the compute dtype.
        head_VxD: The output head without padding, in the compute dtype.
    """

    params: Any
    layers: list[Any]
    head_VxD: jax.Array


@functools.partial(jax.jit, static_argnames="graph")
def prepare_weights(graph: nnx.GraphDef, params: Any) -> DecodeWeights:
    """Unstack the blocks and cast the matrices once, not in every decoding step.

    Args:
        graph: Graph of a `Transformer`, from `nnx.split(model, nnx.Param)`; so are `params`.
        params: Its parameters.
    """
    model: Transformer = nnx.merge(graph, params)

    def to_dtype(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        # The scales of norms stay float32; only matrices are multiplied in dtype.
        return leaf.astype(model.dtype) if any(getattr(key, "key", None) == "weight" for key in path) else leaf

    blocks = jax.tree_util.tree_map_with_path(to_dtype, nnx.state(model.blocks, nnx.Param))
    head_VxD = model.head_weight()[: model.vocab_size].astype(model.dtype)
    return DecodeWeights(params, unstack_layers(blocks, model.config.depth), head_VxD)


def next_logits(model: Transformer, weights: DecodeWeights, x: jax.Array) -> jax.Array:
    """Return logits float32 [..., V] of final hidden states [..., D] with the prepared head; as `model.logits`."""
    return ops.cap_logits(ops.einsum("...d,vd->...v", x, weights.head_VxD, model.dtype), model.logit_softcap)


def _replicate(state: _State, mesh: Mesh | None) -> _State:
    """Return the state constrained to be held in full by every device of the mesh."""
    return state if mesh is None else jax.lax.with_sharding_constraint(state, NamedSharding(mesh, PartitionSpec()))


def _feed(
    graph: nnx.GraphDef, weights: DecodeWeights, state: _State, inputs: _Inputs, width: int, window: int, mesh: Any
) -> _State:
    """Run the model on the next `width` columns of the history and keep the logits of the last one."""
    model: Transformer = nnx.merge(graph, weights.params)
    column = state.cache.written
    ids_BxT = jax.lax.dynamic_slice_in_dim(state.history_BxL, column, width, axis=1)
    positions_BxT = column + jnp.arange(width) - inputs.start_B[:, None]
    positions_BxT = jnp.where(ids_BxT < 0, -1, positions_BxT)
    x_BxTxD, cache = model.hidden_cached(jnp.maximum(ids_BxT, 0), positions_BxT, state.cache, window, weights.layers)
    logits_BxV = next_logits(model, weights, x_BxTxD[:, -1])
    return _replicate(state._replace(cache=cache, logits_BxV=logits_BxV), mesh)


@functools.partial(jax.jit, static_argnames=("graph", "capacity", "chunk", "window", "mesh"))
def _prefill(
    graph: nnx.GraphDef,
    weights: DecodeWeights,
    history_BxL: jax.Array,
    inputs: _Inputs,
    capacity: int,
    chunk: int,
    window: int,
    mesh: Mesh | None,
) -> _State:
    """Run the model on the prompts, in chunks of columns: bounded memory, and one program for prompts of any length."""
    b = len(history_BxL)
    model: Transformer = nnx.merge(graph, weights.params)
    v = model.vocab_size
    ids_BxL = jnp.where(history_BxL < 0, v, history_BxL)  # out of range: dropped by the scatter
    state = _State(
        cache=model.empty_cache(b, capacity),
        history_BxL=history_BxL,
        column=inputs.first,
        seen_BxV=jnp.zeros((b, v), bool).at[jnp.arange(b)[:, None], ids_BxL].set(True, mode="drop"),
        logits_BxV=jnp.zeros((b, v), jnp.float32),
        ended_B=jnp.zeros(b, bool),
    )
    feed = functools.partial(_feed, graph, weights, inputs=inputs, width=chunk, window=window, mesh=mesh)
    return jax.lax.fori_loop(0, inputs.first // chunk, lambda _, state: feed(state), _replicate(state, mesh))


@functools.partial(jax.jit, static_argnames=("graph", "window", "mesh"), donate_argnames="state")
def _decode(
    graph: nnx.GraphDef,
    weights: DecodeWeights,
    state: _State,
    inputs: _Inputs,
    until: jax.Array,
    window: int,
    mesh: Mesh | None,
) -> _State:
    """Generate columns up to `until`, or until every sequence has ended."""

    def step(state: _State) -> _State:
        token_B = jnp.where(state.ended_B, NO_TOKEN, _sample_next(state, inputs))
        history_BxL = jax.lax.dynamic_update_slice(state.history_BxL, token_B[:, None], (0, state.column))
        rows_B = jnp.arange(len(token_B))
        state = state._replace(
            history_BxL=history_BxL,
            column=state.column + 1,
            seen_BxV=state.seen_BxV.at[rows_B, jnp.maximum(token_B, 0)].max(token_B >= 0),
            ended_B=state.ended_B | inputs.stops_V[jnp.maximum(token_B, 0)],
        )
        return _feed(graph, weights, state, inputs, 1, window, mesh)

    return jax.lax.while_loop(lambda state: (state.column < until) & ~jnp.all(state.ended_B), step, state)


def _sample_next(state: _State, inputs: _Inputs) -> jax.Array:
    """Return the next ids int32 [B]."""
    settings = inputs.sampling
    logits_BxV = penalize(state.logits_BxV, state.seen_BxV & ~inputs.stops_V, settings.penalty_B)
    logits_BxV = ban_ngrams(
        logits_BxV, state.history_BxL, inputs.start_B, state.column, settings.ngram_B, inputs.stops_V
    )
    logits_BxV = jnp.where(inputs.suppressed_V, -jnp.inf, logits_BxV)
    step = state.column - inputs.first
    uniform_Bx2 = jax.lax.dynamic_index_in_dim(inputs.uniform_BxLx2, step, 1, keepdims=False)
    return sample(logits_BxV, uniform_Bx2, settings)


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    context: int = 0,
    suppress: Sequence[int] = (),
    stop: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """Generate continuations of a batch of prompts, token by token.

    A seed fixes the tokens, whatever else is in the batch, and `generate_ids` gives the same ones. A batch of another
    shape may round differently, which matters only where two tokens are almost equally probable.

    Args:
        model: The model.
        prompts: Token ids of B prompts of any lengths, none empty.
        max_tokens: Maximum number of tokens to generate per sequence.
        sampling: One setting for all sequences, whose random numbers then differ by their index in the batch; or one
            per sequence, which then gives the text of that sequence generated alone.
        context: Maximum number of tokens that attention sees; 0: the model's window.
        suppress: Ids that are never sampled.
        stop: Ids that end a sequence; the one that does is its last token.

    Yields:
        The next token of each sequence, int32 [B], at most `max_tokens` times; NO_TOKEN (-1) after a sequence's end.

    Raises:
        UserError: Arguments are invalid; the message names all problems.
    """
    request = BatchRequest(prompts, max_tokens, sampling, context, suppress, stop)
    for tokens_BxN in _segments(model, request, streaming=True):
        yield from tokens_BxN.T


def generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    context: int = 0,
    suppress: Sequence[int] = (),
    stop: Sequence[int] = (),
) -> list[list[int]]:
    """Generate continuations of a batch of prompts in one call of the compiled loop.

    The arguments are those of `stream`.

    Returns:
        The generated ids of each sequence, a final stop id included.

    Raises:
        UserError: Arguments are invalid; the message names all problems.
    """
    request = BatchRequest(prompts, max_tokens, sampling, context, suppress, stop)
    segments = list(_segments(model, request, streaming=False))
    return [[token for token in row if token != NO_TOKEN] for row in np.concatenate(segments, axis=1).tolist()]


def _segments(model: Transformer, request: BatchRequest, streaming: bool) -> Iterator[np.ndarray]:
    """Yield tokens int32 [B, N] as they are generated: one segment unless streaming."""
    settings = request.check(model.vocab_size)
    prompts = request.prompts
    graph, params = nnx.split(model, nnx.Param)
    mesh = mesh_of(params)
    chunk = min(max(power_of_two(max(map(len, prompts))), _CHUNKS[0]), _CHUNKS[1])
    history_BxL, first = pad_prompts(prompts, request.max_tokens, chunk)
    length = history_BxL.shape[1]
    window = min((w for w in (request.context, model.config.longest_window) if w), default=0)
    window = 0 if window >= length else window
    capacity = min(length, round_up(window + chunk - 1, chunk)) if window else length
    uniform_BxLx2 = uniforms(*seeds(request.sampling, len(prompts)), length)
    inputs = _Inputs(
        start_B=np.array([first - len(prompt) for prompt in prompts], np.int32),
        first=np.int32(first),
        # An array of one device of this process cannot be an argument of a program of several processes.
        uniform_BxLx2=uniform_BxLx2 if mesh is None else np.asarray(uniform_BxLx2),
        sampling=stack_sampling(settings),
        suppressed_V=id_mask(request.suppress, model.vocab_size),
        stops_V=id_mask(request.stop, model.vocab_size),
    )
    weights = prepare_weights(graph, params)
    state = _prefill(graph, weights, history_BxL, inputs, capacity, chunk, window, mesh)
    column = first
    end = first + request.max_tokens
    count = 1 if streaming else request.max_tokens
    while column < end:
        clock = time.perf_counter()
        state = _decode(graph, weights, state, inputs, np.int32(min(column + count, end)), window, mesh)
        previous = column
        column = int(state.column)
        yield np.array(state.history_BxL)[:, previous:column]  # a copy: the next call donates the buffer
        if np.asarray(state.ended_B).all():
            return
        # The first segment is one token, for a low latency; later ones have as many as fit the time.
        seconds_per_token = (time.perf_counter() - clock) / count
        count = min(max(int(_STREAM_SECONDS / seconds_per_token), 1), 2 * count, _STREAM_TOKENS)


def generate(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompts: str | Sequence[str],
    max_tokens: int = 200,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    context: int = 0,
) -> list[str]:
    """Continue texts.

    Args:
        model: The model, e.g. `load_run(path).model`.
        tokenizer: The tokenizer it was trained with.
        prompts: One text or several; an empty one starts a new document.
        max_tokens: Maximum number of tokens to generate per text.
        sampling: One setting for all texts, or one per text; see `stream`.
        context: Maximum number of tokens that attention sees, e.g. `load_run(path).context`; 0: the model's window.

    Returns:
        The continuation of each prompt, without the prompt, up to the end of the document or `max_tokens`.

    Raises:
        UserError: Arguments are invalid; the message names all problems.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    stops = tokenizer.stop_ids
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rows = generate_ids(model, ids, max_tokens, sampling, context, suppressed_ids(tokenizer), stops)
    kept = [[token for token in row if token not in stops] for row in rows]
    return [decode_continuation(tokenizer, prompt, row) for prompt, row in zip(ids, kept, strict=True)]


def encode_prompt(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Encode a prompt as the start of a document: `<EOS>`, or what the tokenizer begins with, then the text's ids."""
    return [tokenizer.start_id, *tokenizer.encode(prompt)]


def suppressed_ids(tokenizer: TextTokenizer) -> list[int]:
    """Return the ids that generation suppresses: special ones that no training text contains, all but `<EOS>`."""
    return list(tokenizer.suppressed_ids)
