"""Log-probabilities of given tokens, batched and compiled: what every task asks of a model.

A sequence is token ids with the first that is to be scored. One that is longer than the context is cut into windows, so
that each token is scored once. Windows of about one length go together, in a few padded widths, one compilation for
each; padding stands on the right, where causal attention never sees it. Only scored positions meet the head, and their
logits are made chunk by chunk.

Shapes: R rows, W width, N scored positions (padded), C positions of a chunk, D dim, V vocabulary.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.model.transformer import Transformer
from slm_jax.utils.errors import UserError

_CHUNK = 1024  # rows of logits alive at a time
_MERGE = 16_000  # more padding than this is worth one more width: compiled programs are kept between runs
_TOKENS, _CPU_TOKENS = 16384, 2048  # a batch: enough to fill an accelerator; what stays in a processor's cache
_IN_FLIGHT = 4  # batches that the device is given before the first is read


class Item(NamedTuple):
    """Token ids [n]; those from index `first` (at least 1) on are scored, given all before them."""

    ids: np.ndarray
    first: int = 1


class TokenScores(NamedTuple):
    """Of each scored token of one sequence: its log-probability (nats) and how many tokens are ahead of it."""

    logprobs: np.ndarray  # float32 [n - first]
    ranks: np.ndarray  # int32 [n - first]; 0: the most probable (of equals the one with the lowest id)

    @property
    def total(self) -> float:
        """Log-probability of all of them together, summed in float64."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding would write exactly these tokens."""
        return bool((self.ranks == 0).all())


class Window(NamedTuple):
    """Inputs ids[begin:end]; scored are ids[scored:end + 1], each given ids[begin] up to the one before it."""

    begin: int
    end: int
    scored: int


def windows(length: int, first: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of at most `context` inputs that score the tokens first..length-1 once each.

    The first window scores as much as it holds; each further one `stride` tokens, with at least context - stride + 1
    tokens before each; stride 1 gives each token the whole context.
    """
    done, last = first - 1, length - 1
    while done < last:
        end = min(last, max(context, done + stride))
        yield Window(max(0, end - context), end, done + 1)
        done = end


class _Row(NamedTuple):
    sequence: int
    window: Window

    @property
    def length(self) -> int:
        return self.window.end - self.window.begin


class Scorer:
    """Scores sequences under one model."""

    def __init__(self, model: Transformer, context: int, stride: int = 0, batch_tokens: int = 0):
        """context: tokens that the model sees at most, the length that it was trained at. stride: tokens that a further
        window of a longer sequence scores, 0: half the context. batch_tokens: padded tokens computed at once, 0: as
        suits the device."""
        self._graph, self._params = nnx.split(model, nnx.Param)
        self.context = context
        self.batch_tokens = batch_tokens or (_CPU_TOKENS if jax.default_backend() == "cpu" else _TOKENS)
        self.stride = min(stride or (context + 1) // 2, context)

    def score(self, sequences: Sequence[Item]) -> list[TokenScores]:
        """Of each sequence, in order. Raises UserError if the model gives no numbers."""
        rows = [
            _Row(i, window)
            for i, each in enumerate(sequences)
            for window in windows(len(each.ids), each.first, self.context, self.stride)
        ]
        sizes = [len(each.ids) - each.first for each in sequences]
        starts = np.cumsum([0, *sizes])
        logprobs, ranks = np.zeros(starts[-1], np.float32), np.zeros(starts[-1], np.int32)
        pending: list[tuple[np.ndarray, Any]] = []

        def read() -> None:
            places, found = pending.pop(0)
            logprobs[places], ranks[places] = (np.asarray(array)[: places.size] for array in found)

        for width, members in _batches(rows, self.context, self.batch_tokens):
            arrays, places = self._arrays(sequences, starts, members, width)
            pending.append((places, _score(self._graph, self._params, *arrays)))
            if len(pending) > _IN_FLIGHT:
                read()
        while pending:
            read()
        if not np.isfinite(logprobs).all():
            raise UserError("the model's probabilities are no numbers: its weights are, or its training diverged")
        return [TokenScores(logprobs[a:b], ranks[a:b]) for a, b in itertools.pairwise(starts)]

    def _arrays(
        self, sequences: Sequence[Item], starts: np.ndarray, members: tuple[list[_Row], int], width: int
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """(ids [R, W], scored positions [N] in all of the batch, their labels [N]); and their places in the results."""
        rows, count = members
        ids_RxW = np.zeros((count, width), np.int32)
        at, labels, places = [], [], []
        for r, (i, (begin, end, scored)) in enumerate(rows):
            ids, first = sequences[i]
            ids_RxW[r, : end - begin] = ids[begin:end]
            at.append(np.arange(scored - 1 - begin, end - begin) + r * width)
            labels.append(ids[scored : end + 1])
            places.append(np.arange(scored, end + 1) + (starts[i] - first))
        found = np.concatenate(at)
        size = _padded(found.size, count * width)
        at_N, labels_N = np.zeros(size, np.int32), np.zeros(size, np.int32)
        at_N[: found.size], labels_N[: found.size] = found, np.concatenate(labels)
        return (ids_RxW, at_N, labels_N), np.concatenate(places)


def _padded(count: int, whole: int) -> int:
    """Room for so many scored positions: the whole batch, a quarter, a sixteenth …, so that few sizes are compiled."""
    while whole >= 4 * max(count, 16):
        whole = -(-whole // 4)
    return whole


def _widths(lengths: np.ndarray, context: int) -> np.ndarray:
    """Ascending widths that windows of these lengths are padded to: powers of two and one and a half times them, less
    those whose few windows are sooner computed one wider than compiled for."""
    ladder = np.array([*(w for k in range(4, 30) for w in (1 << k, 3 << (k - 1)) if w < context), context])
    met, counts = np.unique(np.searchsorted(ladder, lengths), return_counts=True)
    found, waiting = [], 0  # windows of narrower rungs that were not worth a width of their own
    for i, width in enumerate(ladder[met]):
        waiting += counts[i]
        if i + 1 == len(met) or waiting * (ladder[met[i + 1]] - width) > _MERGE:
            found.append(width)
            waiting = 0
    return np.array(found)


def _batches(rows: list[_Row], context: int, batch_tokens: int) -> Iterator[tuple[int, tuple[list[_Row], int]]]:
    """(width, (windows of at most it, rows of the batch)): the longest first, so that memory is short at once or not at
    all."""
    if not rows:
        return
    lengths = np.array([row.length for row in rows])
    order = np.argsort(-lengths, kind="stable")
    widths = _widths(lengths, context)
    bucket = np.searchsorted(widths, lengths[order])
    for b in range(len(widths) - 1, -1, -1):
        members = order[bucket == b]
        count = min(max(1, batch_tokens // int(widths[b])), 1 << (len(members) - 1).bit_length())
        for start in range(0, len(members), count):
            yield int(widths[b]), ([rows[i] for i in members[start : start + count]], count)


@functools.partial(jax.jit, static_argnames="graph")
def _score(
    graph: nnx.GraphDef, params: Any, ids_RxW: jax.Array, at_N: jax.Array, labels_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability float32 [N] and rank int32 [N] of labels at positions of the flattened batch."""
    model: Transformer = nnx.merge(graph, params)
    x_RxWxD = model.hidden(ids_RxW)
    x_NxD = x_RxWxD.reshape(-1, x_RxWxD.shape[-1])[at_N]
    chunks = -(-at_N.size // _CHUNK)
    size = -(-at_N.size // chunks)
    more = chunks * size - at_N.size

    def chunk(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_CxD, labels_C = pair
        logits_CxV = model.logits(x_CxD)
        label_Cx1 = jnp.take_along_axis(logits_CxV, labels_C[:, None], axis=1)
        lower_CxV = jnp.arange(logits_CxV.shape[1]) < labels_C[:, None]
        ahead_CxV = (logits_CxV > label_Cx1) | ((logits_CxV == label_Cx1) & lower_CxV)
        return label_Cx1[:, 0] - jax.nn.logsumexp(logits_CxV, axis=1), jnp.sum(ahead_CxV, axis=1, dtype=jnp.int32)

    x_SxCxD = jnp.pad(x_NxD, ((0, more), (0, 0))).reshape(chunks, size, -1)
    logprobs, ranks = jax.lax.map(chunk, (x_SxCxD, jnp.pad(labels_N, (0, more)).reshape(chunks, size)))
    return logprobs.reshape(-1)[: at_N.size], ranks.reshape(-1)[: at_N.size]
