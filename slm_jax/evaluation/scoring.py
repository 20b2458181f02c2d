"""Batched, compiled log-probabilities of given tokens, which all language-model tasks are computed from.

An item is a sequence of token ids and the index of the first one to score. A sequence that exceeds the context is split
into windows in which each token is scored once. Windows of similar length are batched and padded to one of a few
widths, each compiled once; the padding is on the right, where causal attention cannot see it. Only the scored positions
pass through the output head, whose logits are computed in chunks.

Shapes: R rows of a batch, W its width, N scored positions (padded), C positions of a chunk, S chunks, D model
dimension, V vocabulary.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from slm_jax.distributed.sharding import mesh_of, replicated
from slm_jax.model.transformer import Transformer
from slm_jax.utils.errors import UserError

_CHUNK = 1024  # rows of logits in memory at a time
_MIN_WASTE = 16_000  # padding tokens that justify compiling another width; compiled programs are cached across runs
_BATCH_TOKENS = 16384  # enough to keep an accelerator busy
_CPU_BATCH_TOKENS = 2048  # fits into the processor's cache
_MAX_IN_FLIGHT = 4  # batches dispatched before the first result is read


class Item(NamedTuple):
    """Token ids [n], of which those from index `first` (at least 1) on are scored given all tokens before them."""

    ids: np.ndarray
    first: int = 1


class TokenScores(NamedTuple):
    """Scores of the scored tokens of one item.

    Attributes:
        logprobs: Log-probabilities in nats, float32 [n - first].
        ranks: Number of tokens that are more probable, int32 [n - first]; 0 is the greedy choice. Ties are ordered by
            token id, as in greedy decoding.
    """

    logprobs: np.ndarray
    ranks: np.ndarray

    @property
    def total(self) -> float:
        """Joint log-probability of the scored tokens in nats, summed in float64."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def greedy(self) -> bool:
        """True if greedy decoding would generate exactly these tokens."""
        return bool((self.ranks == 0).all())


class Window(NamedTuple):
    """A window with inputs ids[begin:end], which scores ids[scored:end + 1], each given the inputs before it."""

    begin: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        """Number of input tokens."""
        return self.end - self.begin


def windows(length: int, first: int, context: int, stride: int) -> Iterator[Window]:
    """Split a sequence into overlapping windows that score each of its tokens from `first` on once.

    The first window scores all the tokens it contains; each further one scores `stride` tokens, which have at least
    context - stride + 1 tokens before them. With stride 1 every token has the full context.

    Args:
        length: Number of tokens of the sequence.
        first: Index of the first token to score.
        context: Maximum number of input tokens of a window.
        stride: Tokens scored by each window after the first, at most `context`.

    Yields:
        The windows, from left to right.
    """
    last = length - 1
    done = first - 1  # index of the last token scored so far
    while done < last:
        end = min(last, max(context, done + stride))
        yield Window(max(0, end - context), end, done + 1)
        done = end


class _Row(NamedTuple):
    """A row of a batch: a window of the item with this index."""

    item: int
    window: Window


class _Batch(NamedTuple):
    """Rows that are computed together: padded to `width` tokens, and with empty rows to `num_rows` rows."""

    rows: list[_Row]
    num_rows: int
    width: int


class Scorer:
    """Scores token sequences with a model."""

    def __init__(self, model: Transformer, context: int, stride: int = 0, batch_tokens: int = 0):
        """Split the model into graph and parameters.

        Args:
            model: The model.
            context: Maximum number of input tokens; normally the length that the model was trained at.
            stride: Tokens scored by each window after the first of a sequence that exceeds the context; 0: half the
                context.
            batch_tokens: Tokens per batch, padding included; 0: a default for the device.
        """
        self._graph, self._params = nnx.split(model, nnx.Param)  # the arrays of the model, not copies
        self._mesh = mesh_of(self._params)
        self.context = context
        self.batch_tokens = batch_tokens or (_CPU_BATCH_TOKENS if model.platform.name == "cpu" else _BATCH_TOKENS)
        self.stride = min(stride or (context + 1) // 2, context)

    def score(self, items: Sequence[Item]) -> list[TokenScores]:
        """Score items.

        Returns:
            The scores of each item, in order.

        Raises:
            UserError: The model's log-probabilities are not finite.
        """
        rows = [
            _Row(i, window)
            for i, item in enumerate(items)
            for window in windows(len(item.ids), item.first, self.context, self.stride)
        ]
        # The scores of all items lie one after another in two flat arrays; those of item i begin at starts[i].
        starts = np.cumsum([0, *(len(item.ids) - item.first for item in items)])
        logprobs = np.zeros(starts[-1], np.float32)
        ranks = np.zeros(starts[-1], np.int32)
        pending: list[tuple[np.ndarray, Any]] = []

        def read_oldest() -> None:
            destinations, (batch_logprobs, batch_ranks) = pending.pop(0)
            logprobs[destinations] = np.asarray(batch_logprobs)[: destinations.size]
            ranks[destinations] = np.asarray(batch_ranks)[: destinations.size]

        for batch in _batches(rows, self.context, self.batch_tokens):
            arrays, destinations = _batch_arrays(batch, items, starts)
            pending.append((destinations, _score(self._graph, self._params, *arrays, self._mesh)))
            if len(pending) > _MAX_IN_FLIGHT:
                read_oldest()
        while pending:
            read_oldest()
        if not np.isfinite(logprobs).all():
            raise UserError(
                "the model's log-probabilities are not finite: its weights contain NaN or infinity, or training "
                "diverged"
            )
        return [TokenScores(logprobs[a:b], ranks[a:b]) for a, b in itertools.pairwise(starts)]


def _batch_arrays(
    batch: _Batch, items: Sequence[Item], starts: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Return the inputs of `_score` for a batch, and the indices of its scores in the flat result arrays."""
    ids_RxW = np.zeros((batch.num_rows, batch.width), np.int32)
    positions = []
    labels = []
    destinations = []
    for r, (i, (begin, end, scored)) in enumerate(batch.rows):
        ids, first = items[i]
        ids_RxW[r, : end - begin] = ids[begin:end]
        positions.append(np.arange(scored - 1 - begin, end - begin) + r * batch.width)
        labels.append(ids[scored : end + 1])
        destinations.append(np.arange(scored, end + 1) + (starts[i] - first))
    flat_positions = np.concatenate(positions)
    size = _padded_size(flat_positions.size, ids_RxW.size)
    positions_N = np.zeros(size, np.int32)
    positions_N[: flat_positions.size] = flat_positions
    labels_N = np.zeros(size, np.int32)
    labels_N[: flat_positions.size] = np.concatenate(labels)
    return (ids_RxW, positions_N, labels_N), np.concatenate(destinations)


def _padded_size(count: int, batch_size: int) -> int:
    """Return a size for `count` scored positions: the whole batch or a power of 1/4 of it, so that few are compiled."""
    while batch_size >= 4 * max(count, 16):
        batch_size = -(-batch_size // 4)
    return batch_size


def _widths(lengths: np.ndarray, context: int) -> np.ndarray:
    """Return the ascending widths that windows of these lengths are padded to.

    Candidates are the powers of two and 1.5 times them. A candidate is dropped if padding its few windows to the next
    one costs less than compiling another program.
    """
    powers = range(4, 30)
    candidates = [width for k in powers for width in (1 << k, 3 << (k - 1)) if width < context]
    ladder = np.array([*candidates, context])
    used, counts = np.unique(np.searchsorted(ladder, lengths), return_counts=True)
    widths = []
    waiting = 0  # windows whose own width was dropped
    for i, width in enumerate(ladder[used]):
        waiting += counts[i]
        if i + 1 == len(used) or waiting * (ladder[used[i + 1]] - width) > _MIN_WASTE:
            widths.append(width)
            waiting = 0
    return np.array(widths)


def _batches(rows: list[_Row], context: int, batch_tokens: int) -> Iterator[_Batch]:
    """Yield batches, the longest windows first, so that a lack of memory shows up at the start."""
    if not rows:
        return
    lengths = np.array([row.window.length for row in rows])
    order = np.argsort(-lengths, kind="stable")
    widths = _widths(lengths, context)
    bucket = np.searchsorted(widths, lengths[order])
    for b in range(len(widths) - 1, -1, -1):
        width = int(widths[b])
        members = order[bucket == b]
        # A power of two, and not many more rows than there are windows.
        num_rows = min(max(1, batch_tokens // width), 1 << (len(members) - 1).bit_length())
        for start in range(0, len(members), num_rows):
            yield _Batch([rows[i] for i in members[start : start + num_rows]], num_rows, width)


@functools.partial(jax.jit, static_argnames=("graph", "mesh"))
def _score(
    graph: nnx.GraphDef,
    params: Any,
    ids_RxW: jax.Array,
    positions_N: jax.Array,
    labels_N: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability, float32 [N], and the rank, int32 [N], of labels at positions of the flat batch.

    The results of parameters that are split over a mesh are held in full by every device of it.
    """
    model: Transformer = nnx.merge(graph, params)
    x_RxWxD = model.hidden(ids_RxW)
    x_NxD = x_RxWxD.reshape(-1, x_RxWxD.shape[-1])[positions_N]
    num_chunks = -(-positions_N.size // _CHUNK)
    chunk_size = -(-positions_N.size // num_chunks)
    padding = num_chunks * chunk_size - positions_N.size

    def score_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_CxD, labels_C = chunk
        logits_CxV = model.logits(x_CxD)
        label_Cx1 = jnp.take_along_axis(logits_CxV, labels_C[:, None], axis=1)
        lower_id_CxV = jnp.arange(logits_CxV.shape[1]) < labels_C[:, None]
        ahead_CxV = (logits_CxV > label_Cx1) | ((logits_CxV == label_Cx1) & lower_id_CxV)
        return label_Cx1[:, 0] - jax.nn.logsumexp(logits_CxV, axis=1), jnp.sum(ahead_CxV, axis=1, dtype=jnp.int32)

    x_SxCxD = jnp.pad(x_NxD, ((0, padding), (0, 0))).reshape(num_chunks, chunk_size, -1)
    labels_SxC = jnp.pad(labels_N, (0, padding)).reshape(num_chunks, chunk_size)
    logprobs, ranks = jax.lax.map(score_chunk, (x_SxCxD, labels_SxC))
    results = (logprobs.reshape(-1)[: positions_N.size], ranks.reshape(-1)[: positions_N.size])
    return results if mesh is None else jax.lax.with_sharding_constraint(results, replicated(mesh))
