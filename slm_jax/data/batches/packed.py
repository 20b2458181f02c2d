"""Batches as a function of position: `at(step)` is the same array whatever happened before."""

import hashlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from slm_jax.data.corpus.corpus import MixturePart, TokenStream
from slm_jax.utils.batch import IGNORE_INDEX
from slm_jax.utils.errors import UserError

Arrays = dict[str, np.ndarray]
Stream = TokenStream | np.ndarray  # token ids [N]; of an array every token is predicted

_BLOCK = 1000  # rows in which a mixture has its exact shares


def ring(tokens: Stream, start: int, count: int) -> np.ndarray:
    """Token ids [count] of a stream that is read in a circle, from `start` on."""
    n = len(tokens)
    start %= n
    if start + count <= n:
        return tokens[start : start + count]
    return np.concatenate([tokens[start:n], tokens[0 : start + count - n]])


def window(tokens: Stream, offset: int, index: int, length: int, into: Arrays | None = None) -> Arrays:
    """Window `index` of the token stream [N], read in a circle from `offset`: input_ids and labels int32 [length].

    The windows 0..ceil(N / length)-1 hold every token exactly once as labels[t], with the one before it as
    input_ids[t]; those that are not to be predicted (of a prompt) are IGNORE_INDEX. The last window is filled up with
    IGNORE_INDEX labels. Before the first document comes the <EOS> of the last. into: blank arrays to write to; where
    they include segment_ids and positions, each document is a segment, and what predicts its first token stands at its
    position 0.
    """
    n = len(tokens)
    count = min(length, n - index * length)
    start = offset + index * length
    stream = ring(tokens, start - 1, count + 1)
    row = into or blank(length)
    row["input_ids"][:count], row["labels"][:count] = stream[:-1], stream[1:]
    if isinstance(tokens, TokenStream) and tokens.has_prompts:
        for a, b in stretches(n, start, count):
            mask = tokens.prompt_mask(a, b)
            at = (a - start) % n
            row["labels"][at : at + b - a][mask] = IGNORE_INDEX
    if "segment_ids" in row:
        _write_segments(tokens, start, count, row)
    return row


def _write_segments(tokens: Stream, start: int, count: int, row: Arrays) -> None:
    assert isinstance(tokens, TokenStream)
    n, found = len(tokens), [np.zeros(1, np.int64)]
    for a, b in stretches(n, start, count):
        found.append(tokens.document_starts(a, b) + ((a - start) % n - a))
    begins = np.unique(np.concatenate(found))
    lengths = np.diff(begins, append=count)
    row["segment_ids"][:count] = np.repeat(np.arange(begins.size), lengths)
    row["segment_ids"][count:] = begins.size
    row["positions"][:count] = np.arange(count) - np.repeat(begins, lengths)


def stretches(n: int, start: int, count: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the one or two stretches of a stream [n] that a stretch of the circle is."""
    start %= n
    yield start, min(n, start + count)
    if start + count > n:
        yield 0, start + count - n


def blank(*shape: int) -> Arrays:
    """Nothing to read and nothing to predict, int32 [shape]."""
    return {"input_ids": np.zeros(shape, np.int32), "labels": np.full(shape, IGNORE_INDEX, np.int32)}


def blank_rows(rows: int, length: int, segments: bool) -> Arrays:
    """The same [rows, length], perhaps with segment_ids and positions."""
    more = {name: np.zeros((rows, length), np.int32) for name in ("segment_ids", "positions") if segments}
    return blank(rows, length) | more


class Windows:
    """Endless shuffled windows of one token stream; every token is in one once per epoch.

    Each epoch visits the windows in a new order and cuts them at a new offset, so that contexts differ.
    """

    def __init__(self, tokens: Stream, length: int, seed: int):
        """Raises nothing: a stream shorter than a window gives windows that are not full."""
        self.count = -(-len(tokens) // length)  # windows in an epoch
        self._tokens, self._length, self._seed = tokens, length, seed
        self._order = grain.MapDataset.range(self.count).seed(seed).shuffle().repeat()

    def place(self, index: int) -> tuple[int, int]:
        """(offset of the epoch, window) of the index-th row."""
        digest = hashlib.sha256(f"{self._seed} {index // self.count}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % len(self._tokens), int(self._order[index])

    def write(self, index: int, row: Arrays) -> None:
        """The index-th row, into blank arrays [length]."""
        window(self._tokens, *self.place(index), self._length, row)

    def num_bytes(self, index: int) -> int:
        """UTF-8 bytes of the text that the targets of the index-th row stand for."""
        assert isinstance(self._tokens, TokenStream)
        offset, at = self.place(index)
        n, start = len(self._tokens), at * self._length
        count = min(self._length, n - start)
        return sum(self._tokens.num_bytes_between(a, b) for a, b in stretches(n, offset + start, count))


class Mixture:
    """Which of several sources gives the i-th row: of every 1,000 each has its share, in a fixed shuffled order."""

    def __init__(self, weights: Sequence[float], seed: int):
        """weights: shares, not normalised. Each of at least a thousandth gets rows."""
        shares = np.array(weights, np.float64) / sum(weights) * _BLOCK
        counts = np.floor(shares).astype(int)
        largest = np.argsort(counts - shares, kind="stable")[: _BLOCK - counts.sum()]
        counts[largest] += 1
        self.counts = counts
        self._source = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
        hits = self._source[:, None] == np.arange(len(counts))
        self._rank = (np.cumsum(hits, axis=0) - 1)[np.arange(_BLOCK), self._source]

    def place(self, index: int) -> tuple[int, int]:
        """(source, how many of its rows came before)."""
        block, at = divmod(index, _BLOCK)
        source = int(self._source[at])
        return source, block * int(self.counts[source]) + int(self._rank[at])

    def taken(self, rows: int) -> list[int]:
        """How many of the first so many rows each source gives."""
        block, rest = divmod(rows, _BLOCK)
        return (block * self.counts + np.bincount(self._source[:rest], minlength=len(self.counts))).tolist()


def epochs_text(epochs: Sequence[float]) -> str:
    """In words, for each source."""
    return f"{', '.join(f'{each:.2f}' for each in epochs)} epochs" + (" of the sources" if len(epochs) > 1 else "")


class PackedBatches:
    """Endless shuffled batches [B, T] of one token stream, or of several mixed by weight."""

    def __init__(
        self, tokens: Stream | Sequence[MixturePart], batch_size: int, length: int, seed: int, segments: bool = False
    ):
        """segments: with segment_ids and positions. Raises UserError when the streams do not fill one batch."""
        parts = tokens if not isinstance(tokens, TokenStream | np.ndarray) else [MixturePart(tokens, 1.0, "")]  # type: ignore[arg-type]
        total = sum(len(part.train) for part in parts)
        if total < batch_size * length:
            raise UserError(
                f"the training text has {total:,} tokens, but one batch takes {batch_size} x {length} = "
                f"{batch_size * length:,}: add text, or lower --train.batch_size or --train.sequence_length"
            )
        self._batch_size, self._length, self._segments = batch_size, length, segments
        self._sources = [Windows(part.train, length, (seed + 7919 * k) % 2**32) for k, part in enumerate(parts)]
        self._mixture = Mixture([part.weight for part in parts], seed) if len(parts) > 1 else None
        self.windows = sum(source.count for source in self._sources)

    def _place(self, row: int) -> tuple[Windows, int]:
        source, index = self._mixture.place(row) if self._mixture else (0, row)
        return self._sources[source], index

    def at(self, step: int, host: int = 0, hosts: int = 1) -> Arrays:
        """The batch of optimizer step `step` (from 0): input_ids and labels (segment_ids, positions) int32 [B, T].

        Of several hosts each may ask for its equal part of the rows; put together they are the whole batch.
        """
        rows = self._batch_size // hosts
        arrays = self.empty_batch(rows)
        first = step * self._batch_size + host * rows
        for i in range(rows):
            source, index = self._place(first + i)
            source.write(index, {name: array[i] for name, array in arrays.items()})
        return arrays

    def empty_batch(self, rows: int = 0) -> Arrays:
        """A batch (or some rows of one) without content, of the shapes that batches have at most."""
        return blank_rows(rows or self._batch_size, self._length, self._segments)

    def summary(self, steps: int) -> Iterator[str]:
        """What one should know of the batches: how often so many steps read the text."""
        yield f"{steps:,} steps are {epochs_text(self.epochs(steps))}"

    def num_bytes(self, step: int) -> int:
        """UTF-8 bytes of the text that the targets of a step stand for: over an epoch, exactly those of its text."""
        rows = range(step * self._batch_size, (step + 1) * self._batch_size)
        return sum(source.num_bytes(index) for source, index in map(self._place, rows))

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which as many rows were taken as all sources together have."""
        return self.windows / self._batch_size

    def epochs(self, steps: int) -> list[float]:
        """How often each source was read in the first `steps` steps."""
        rows = steps * self._batch_size
        taken = self._mixture.taken(rows) if self._mixture else [rows]
        return [n / source.count for n, source in zip(taken, self._sources, strict=True)]


def sequential_batches(tokens: Stream, batch_size: int, length: int, segments: bool = False) -> Iterator[Arrays]:
    """Batches [B, T] that predict every token once, in order; the last is filled up with IGNORE_INDEX labels."""
    windows = -(-len(tokens) // length)
    for start in range(0, windows, batch_size):
        arrays = blank_rows(batch_size, length, segments)
        for i in range(min(batch_size, windows - start)):
            window(tokens, 0, start + i, length, {name: array[i] for name, array in arrays.items()})
        yield arrays
