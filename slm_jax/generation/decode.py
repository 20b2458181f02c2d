"""Text from a model: prefill, then one compiled loop that draws, writes and feeds tokens until every row has ended.

    generate(model, tokenizer, ["Once upon", "The"], 200, Sampling(temperature=0.8, seed=1), context=256) -> texts
    stream(...) -> tokens as they come        generate_ids(...) -> all ids        python -m slm_jax.generate --help

Rows (texts) of a batch end together: prompts are padded on the left, so that every step writes one column of the cache
for all rows. What the settings of `Sampling` are, which ids are suppressed or end a text, and how long the prompts are
within a multiple of 64 tokens, compiles nothing anew.

A row sees the last `context` tokens at every layer, at most; the cache is a ring of that many columns and a little
more, so that a text may go on for ever in bounded memory. Give the length that the model was trained at (a run's
`load_run(path).context`): it has met no greater distance. A text within it is continued exactly as the whole model
would; beyond it, attention slides along.

Shapes: B rows, L columns (padding, prompts, what is drawn), V vocabulary.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.generation.sampling import Controls, Sampling, ban_ngrams, controls, penalize, sample
from slm_jax.model import ops
from slm_jax.model.kv_cache import KVCache
from slm_jax.model.transformer import Transformer, unstack_layers
from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer

_CHUNKS = (64, 512)  # prompts are fed this many tokens at a time, at least and at most (a power of two)
_STREAM_SECONDS = 0.05  # how long a streaming caller waits for the next tokens, about
_STREAM_TOKENS = 64  # and for how many of them at most
_MOST_TOKENS = 2**28  # of a batch, prompts included: 12 bytes for each are taken before the first is drawn
NO_TOKEN = -1  # in the place of a token: padding, or a row that has ended


class _State(NamedTuple):
    """All that changes while texts grow; the arrays are given away at each call (donated)."""

    cache: KVCache
    history_BxL: jax.Array  # int32: padding, prompts, drawn ids; NO_TOKEN where there is none
    column: jax.Array  # int32 scalar: the next column to fill
    seen_BxV: jax.Array  # bool: ids of the prompt and of what is drawn
    logits_BxV: jax.Array  # float32, of the token to draw next
    ended_B: jax.Array  # bool


class _Rules(NamedTuple):
    """What does not change."""

    start_B: Any  # int32: each prompt's first column
    first: Any  # int32 scalar: the first column drawn
    uniform_BxLx2: jax.Array  # float32 in [0, 1): what each token of each row is drawn by
    controls: Controls
    suppressed_V: jax.Array  # bool: never drawn
    stops_V: jax.Array  # bool: these end a text; no penalty and no n-gram rule holds them off


class Weights(NamedTuple):
    """A model's parameters as a loop wants them: the layers cut apart, matrices in the dtype of the products."""

    params: Any
    layers: list[Any]
    head_VxD: jax.Array


@functools.partial(jax.jit, static_argnames="graph")
def prepare(graph: nnx.GraphDef, params: Any) -> Weights:
    """A model's parameters, made ready for a loop."""
    model: Transformer = nnx.merge(graph, params)

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        # The scales of norms stay float32; only matrices are multiplied in dtype.
        return leaf.astype(model.dtype) if any(getattr(key, "key", None) == "weight" for key in path) else leaf

    blocks = jax.tree_util.tree_map_with_path(cast, nnx.state(model.blocks, nnx.Param))
    head_VxD = model.head_weight()[: model.vocab_size].astype(model.dtype)
    return Weights(params, unstack_layers(blocks, model.config.depth), head_VxD)


def _feed(graph: nnx.GraphDef, weights: Weights, state: _State, rules: _Rules, width: int, window: int) -> _State:
    """The state with `width` columns of its history fed to the model and the logits of the last one."""
    model: Transformer = nnx.merge(graph, weights.params)
    column = state.cache.written
    ids_BxT = jax.lax.dynamic_slice_in_dim(state.history_BxL, column, width, axis=1)
    positions_BxT = column + jnp.arange(width) - rules.start_B[:, None]
    positions_BxT = jnp.where(ids_BxT < 0, -1, positions_BxT)
    x_BxTxD, cache = model.hidden_cached(jnp.maximum(ids_BxT, 0), positions_BxT, state.cache, window, weights.layers)
    logits_BxV = ops.einsum("bd,vd->bv", x_BxTxD[:, -1], weights.head_VxD, model.dtype)
    return state._replace(cache=cache, logits_BxV=logits_BxV)


@functools.partial(jax.jit, static_argnames=("graph", "capacity", "chunk", "window"))
def _prefill(
    graph: nnx.GraphDef,
    weights: Weights,
    history_BxL: jax.Array,
    rules: _Rules,
    capacity: int,
    chunk: int,
    window: int,
) -> _State:
    """The state after the prompts, fed in chunks of columns (bounded memory, one program for prompts of any length)."""
    b = len(history_BxL)
    model: Transformer = nnx.merge(graph, weights.params)
    v = model.vocab_size
    ids_BxL = jnp.where(history_BxL < 0, v, history_BxL)  # beyond the end: dropped
    state = _State(
        cache=model.empty_cache(b, capacity),
        history_BxL=history_BxL,
        column=rules.first,
        seen_BxV=jnp.zeros((b, v), bool).at[jnp.arange(b)[:, None], ids_BxL].set(True, mode="drop"),
        logits_BxV=jnp.zeros((b, v), jnp.float32),
        ended_B=jnp.zeros(b, bool),
    )
    feed = functools.partial(_feed, graph, weights, rules=rules, width=chunk, window=window)
    return jax.lax.fori_loop(0, rules.first // chunk, lambda _, state: feed(state), state)


@functools.partial(jax.jit, static_argnames=("graph", "window"), donate_argnames="state")
def _decode(
    graph: nnx.GraphDef, weights: Weights, state: _State, rules: _Rules, until: jax.Array, window: int
) -> _State:
    """The state with columns drawn up to `until`, or until every row has ended."""

    def step(state: _State) -> _State:
        token_B = jnp.where(state.ended_B, NO_TOKEN, _draw(state, rules))
        history_BxL = jax.lax.dynamic_update_slice(state.history_BxL, token_B[:, None], (0, state.column))
        rows_B = jnp.arange(len(token_B))
        state = state._replace(
            history_BxL=history_BxL,
            column=state.column + 1,
            seen_BxV=state.seen_BxV.at[rows_B, jnp.maximum(token_B, 0)].max(token_B >= 0),
            ended_B=state.ended_B | rules.stops_V[jnp.maximum(token_B, 0)],
        )
        return _feed(graph, weights, state, rules, 1, window)

    return jax.lax.while_loop(lambda state: (state.column < until) & ~jnp.all(state.ended_B), step, state)


def _draw(state: _State, rules: _Rules) -> jax.Array:
    """The next ids int32 [B]."""
    settings = rules.controls
    logits_BxV = penalize(state.logits_BxV, state.seen_BxV & ~rules.stops_V, settings.penalty_B)
    logits_BxV = ban_ngrams(logits_BxV, state.history_BxL, rules.start_B, state.column, settings.ngram_B, rules.stops_V)
    logits_BxV = jnp.where(rules.suppressed_V, -jnp.inf, logits_BxV)
    uniform_Bx2 = jax.lax.dynamic_index_in_dim(rules.uniform_BxLx2, state.column - rules.first, 1, keepdims=False)
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
    """The next tokens int32 [B] of each row, up to max_tokens times, as they come; NO_TOKEN (-1) after a row's end.

    prompts: ids, of any lengths (none empty). sampling: one for all rows, whose random numbers then differ by row
    number; or one per row, whose text is then that of the row generated alone. context: tokens that attention sees at
    most, 0: the model's window. suppress: ids never drawn. stop: ids that end a row; they are its last.

    The same seed gives the same tokens, those of `generate_ids`, whatever else is in the batch (but a batch of another
    shape may round otherwise, which counts where two tokens are as good as equal). Raises UserError on bad input.
    """
    for tokens_BxN in _segments(model, prompts, max_tokens, sampling, context, suppress, stop, streaming=True):
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
    """What `stream` yields, row by row and all at once, from one call of the compiled loop; a stop id is included."""
    segments = list(_segments(model, prompts, max_tokens, sampling, context, suppress, stop, streaming=False))
    return [[token for token in row if token != NO_TOKEN] for row in np.concatenate(segments, axis=1).tolist()]


def _segments(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | Sequence[Sampling],
    context: int,
    suppress: Sequence[int],
    stop: Sequence[int],
    streaming: bool,
) -> Iterator[np.ndarray]:
    """Tokens int32 [B, N] as they come: one segment when not streaming."""
    settings = _check(model.vocab_size, prompts, max_tokens, sampling, context, suppress, stop)
    graph, params = nnx.split(model, nnx.Param)
    longest = max(map(len, prompts))
    chunk = min(max(_power_of_two(longest), _CHUNKS[0]), _CHUNKS[1])
    first = -(-longest // chunk) * chunk
    length = _round_up(first + max_tokens, chunk)
    window = min((w for w in (context, model.config.window) if w), default=0)
    window = 0 if window >= length else window
    capacity = min(length, _round_up(window + chunk - 1, chunk)) if window else length
    history_BxL = np.full((len(prompts), length), NO_TOKEN, np.int32)
    for row, prompt in enumerate(prompts):
        history_BxL[row, first - len(prompt) : first] = prompt
    rules = _Rules(
        start_B=np.array([first - len(prompt) for prompt in prompts], np.int32),
        first=np.int32(first),
        uniform_BxLx2=_uniforms(*_seeds(sampling, len(prompts)), length),
        controls=controls(settings),
        suppressed_V=_mask(suppress, model.vocab_size),
        stops_V=_mask(stop, model.vocab_size),
    )
    weights = prepare(graph, params)
    state = _prefill(graph, weights, history_BxL, rules, capacity, chunk, window)
    column, end = first, first + max_tokens
    count = 1 if streaming else max_tokens
    while column < end:
        clock = time.perf_counter()
        state = _decode(graph, weights, state, rules, np.int32(min(column + count, end)), window)
        drawn, column = column, int(state.column)
        yield np.array(state.history_BxL)[:, drawn:column]  # a copy: the next call takes the buffer
        if np.asarray(state.ended_B).all():
            return
        # The first segment is short, for the first token to come soon; then as many as fit the time.
        per_token = (time.perf_counter() - clock) / count
        count = min(max(int(_STREAM_SECONDS / per_token), 1), 2 * count, _STREAM_TOKENS)


def _check(
    vocab_size: int,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | Sequence[Sampling],
    context: int,
    suppress: Sequence[int],
    stop: Sequence[int],
) -> Sequence[Sampling]:
    """The settings of each row. Raises UserError with all that is wrong."""
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    problems = [problem for each in dict.fromkeys(settings) for problem in each.problems()]
    if len(settings) != len(prompts):
        problems.append(f"{len(settings)} samplings for {len(prompts)} prompts: give one, or one for each")
    if not prompts:
        problems.append("no prompts: give at least one")
    if not all(len(prompt) for prompt in prompts):
        problems.append("a prompt has no tokens: begin it with <EOS>, as encode_prompt does")
    if max_tokens < 1:
        problems.append(f"max_tokens {max_tokens} must be 1 or more")
    if len(prompts) * (max(map(len, prompts), default=0) + max_tokens) > _MOST_TOKENS:
        problems.append(
            f"max_tokens {max_tokens:,} is too much: the texts of a batch (here {len(prompts)}) may have "
            f"{_MOST_TOKENS:,} tokens in all, prompts included"
        )
    if context < 0:
        problems.append(f"context {context} must be 0 (the model's window) or more")
    for name, ids in (("prompt", (i for prompt in prompts for i in prompt)), ("suppress", suppress), ("stop", stop)):
        if outside := [int(i) for i in ids if not 0 <= i < vocab_size][:3]:
            problems.append(f"{name} ids {outside} are outside the model's vocabulary of {vocab_size}")
    if len(set(suppress)) >= vocab_size:
        problems.append("every id is suppressed: leave one to draw")
    if problems:
        raise UserError("; ".join(problems))
    return settings


def _power_of_two(n: int) -> int:
    """The least power of two that is no less."""
    return 1 << (n - 1).bit_length()


def _round_up(n: int, unit: int) -> int:
    """To a multiple of unit, and to few values: at most an eighth more, so that few shapes are compiled."""
    unit = max(unit, _power_of_two(n) // 16)
    return -(-n // unit) * unit


def _seeds(sampling: Sampling | Sequence[Sampling], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [B]: a seed and a row number for each row."""
    if isinstance(sampling, Sampling):
        return np.full(rows, sampling.seed, np.uint32), np.arange(rows, dtype=np.uint32)
    return np.array([each.seed for each in sampling], np.uint32), np.zeros(rows, np.uint32)


@functools.partial(jax.jit, static_argnames="length")
def _uniforms(seed_B: jax.Array, row_B: jax.Array, length: int) -> jax.Array:
    """float32 [B, length, 2] in [0, 1): those of a step come of the seed, the row number and the step, nothing else.

    Made before the loop: inside it, at one token a time, they would take longer than the draw.
    """
    return jax.vmap(jax.vmap(uniform_pair, (None, None, 0)), (0, 0, None))(seed_B, row_B, jnp.arange(length))


def uniform_pair(seed: jax.Array, row: jax.Array, step: jax.Array) -> jax.Array:
    """float32 [2] in [0, 1): what the token `step` of a text is drawn by."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step)
    return jax.random.uniform(key, (2,))


def _mask(ids: Sequence[int], size: int) -> Any:
    mask = np.zeros(size, bool)
    mask[list(ids)] = True
    return mask


def generate(
    model: Transformer,
    tokenizer: HybridTokenizer,
    prompts: str | Sequence[str],
    max_tokens: int = 200,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    context: int = 0,
) -> list[str]:
    """Each prompt's continuation, up to the end of its text or max_tokens; an empty prompt begins a new document."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    eos = tokenizer.token2id["<EOS>"]
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rows = generate_ids(model, ids, max_tokens, sampling, context, never_drawn(tokenizer), [eos])
    return [tokenizer.decode([token for token in row if token != eos]) for row in rows]


def encode_prompt(tokenizer: HybridTokenizer, prompt: str) -> list[int]:
    """The ids of a prompt as the beginning of a document (of which an empty one leaves all to the model)."""
    return [tokenizer.token2id["<EOS>"], *tokenizer.encode(prompt, mode="flat")]


def never_drawn(tokenizer: HybridTokenizer) -> list[int]:
    """Ids that ordinary text never holds, <EOS> apart: they stand in no training text."""
    names = ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK>", "<RES>")
    return [tokenizer.token2id[name] for name in names]
