"""Packed batches: windows of full length that run across documents.

Batches are a function of position: `at(step)` returns the same arrays whatever was read before.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from slm_jax.data.batches.arrays import Tokens, circular_segments, empty_arrays, read_circular, row
from slm_jax.data.batches.mixture import Mixture, epochs_text, source_seed, unused_text
from slm_jax.data.corpus.corpus import MixturePart
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.utils.batch import IGNORE_INDEX, Arrays
from slm_jax.utils.errors import UserError


def window(tokens: Tokens, offset: int, index: int, length: int, into: Arrays | None = None) -> Arrays:
    """Return one window of a token stream [N], read circularly from `offset`.

    The windows 0..ceil(N / length)-1 hold every token exactly once as a label, with the token before it as the input.
    Tokens of prompts have the label IGNORE_INDEX, and so have the positions after the end of the last window. The
    token before the first document is the <EOS> of the last.

    Args:
        tokens: The stream.
        offset: The token that is the first label of window 0.
        index: The window.
        length: Tokens in a window.
        into: Empty arrays [length] to write to. If they include segment_ids and positions, each document is a segment,
            and the input from which its first token is predicted (the <EOS> before it) is at position 0.

    Returns:
        input_ids and labels, int32 [length]; `into` if given.
    """
    n = len(tokens)
    count = min(length, n - index * length)
    start = offset + index * length
    ids = read_circular(tokens, start - 1, count + 1)
    arrays = into or empty_arrays(length)
    arrays["input_ids"][:count] = ids[:-1]
    arrays["labels"][:count] = ids[1:]
    if isinstance(tokens, TokenStream) and tokens.has_prompts:
        for a, b in circular_segments(n, start, count):
            mask = tokens.prompt_mask(a, b)
            at = (a - start) % n
            arrays["labels"][at : at + b - a][mask] = IGNORE_INDEX
    if "segment_ids" in arrays:
        _write_segments(tokens, start, count, arrays)
    return arrays


def _write_segments(tokens: Tokens, start: int, count: int, arrays: Arrays) -> None:
    """Write segment_ids and positions of the tokens start..start+count-1; padding is a segment of its own."""
    assert isinstance(tokens, TokenStream)
    n = len(tokens)
    starts = [np.zeros(1, np.int64)]
    for a, b in circular_segments(n, start, count):
        starts.append(tokens.document_starts(a, b) + ((a - start) % n - a))
    segment_starts = np.unique(np.concatenate(starts))
    lengths = np.diff(segment_starts, append=count)
    arrays["segment_ids"][:count] = np.repeat(np.arange(segment_starts.size), lengths)
    arrays["segment_ids"][count:] = segment_starts.size
    arrays["positions"][:count] = np.arange(count) - np.repeat(segment_starts, lengths)


def empty_batch(rows: int, length: int, segments: bool) -> Arrays:
    """Return a batch without content, int32 [rows, length], with segment_ids and positions if asked for."""
    arrays = empty_arrays(rows, length)
    if segments:
        arrays["segment_ids"] = np.zeros((rows, length), np.int32)
        arrays["positions"] = np.zeros((rows, length), np.int32)
    return arrays


class ShuffledWindows:
    """Endless shuffled windows of one token stream; each epoch holds every token once.

    Each epoch visits the windows in a new order and cuts them at a new offset, so that contexts differ. A stream
    shorter than a window gives windows that are not full.

    Attributes:
        count: Windows in an epoch.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int):
        """Fix the order of the windows.

        Args:
            tokens: The stream.
            length: Tokens in a window.
            seed: The seed of order and offsets.
        """
        self.count = -(-len(tokens) // length)
        self._tokens = tokens
        self._length = length
        self._seed = seed
        self._order = grain.MapDataset.range(self.count).seed(seed).shuffle().repeat()

    def locate(self, number: int) -> tuple[int, int]:
        """Return (offset of the epoch, window) of a draw, counted from 0."""
        digest = hashlib.sha256(f"{self._seed} {number // self.count}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % len(self._tokens), int(self._order[number])

    def write(self, number: int, into: Arrays) -> None:
        """Write the window of a draw into empty arrays [length]."""
        offset, index = self.locate(number)
        window(self._tokens, offset, index, self._length, into)

    def num_bytes(self, number: int) -> int:
        """Return the UTF-8 bytes of text that the labels of a draw encode."""
        assert isinstance(self._tokens, TokenStream)
        offset, index = self.locate(number)
        n = len(self._tokens)
        start = index * self._length
        count = min(self._length, n - start)
        return sum(self._tokens.num_bytes_between(a, b) for a, b in circular_segments(n, offset + start, count))


def check_packed_size(num_tokens: int, batch_size: int, length: int) -> None:
    """Check that training text fills a packed batch.

    Args:
        num_tokens: Training tokens of all sources.
        batch_size: Rows in a batch.
        length: Tokens in a row.

    Raises:
        UserError: There are too few tokens.
    """
    if num_tokens < batch_size * length:
        raise UserError(
            f"the training text has {num_tokens:,} tokens, but one batch takes {batch_size} x {length} = "
            f"{batch_size * length:,}: add text, or lower --train.batch_size or --train.sequence_length"
        )


class PackedBatches:
    """Endless shuffled batches [B, T] of one token stream, or of several mixed by weight.

    Attributes:
        windows: Windows in an epoch of all sources together.
    """

    def __init__(
        self,
        tokens: Tokens | Sequence[MixturePart],
        batch_size: int,
        length: int,
        seed: int,
        segments: bool = False,
        rows: Callable[[Any, int, int], Any] = ShuffledWindows,
    ):
        """Fix the order of the rows.

        Args:
            tokens: One stream, or the parts of a mixture.
            batch_size: Rows in a batch, B.
            length: Tokens in a row, T.
            seed: The seed of the order.
            segments: Whether batches have segment_ids and positions.
            rows: Makes the rows of a stream, given its length and seed.

        Raises:
            UserError: There are too few tokens for one batch.
        """
        if isinstance(tokens, TokenStream | np.ndarray):
            streams: list[Tokens] = [tokens]
            weights = [1.0]
            self._names = [""]
        else:
            streams = [part.train for part in tokens]
            weights = [part.weight for part in tokens]
            self._names = [part.name for part in tokens]
        check_packed_size(sum(map(len, streams)), batch_size, length)
        self._batch_size = batch_size
        self._length = length
        self._segments = segments
        self._sources = [rows(s, length, source_seed(seed, k)) for k, s in enumerate(streams)]
        self._mixture = Mixture(weights, seed) if len(streams) > 1 else None
        self.windows = sum(source.count for source in self._sources)

    def _locate(self, number: int) -> tuple[Any, int]:
        """Return (source, draw from it) of a row, counted from the first row of step 0."""
        if self._mixture is None:
            return self._sources[0], number
        source, draw = self._mixture.locate(number)
        return self._sources[source], draw

    def at(self, step: int, shard: int = 0, num_shards: int = 1) -> Arrays:
        """Return the batch of an optimizer step, or one of several equal parts of its rows.

        Args:
            step: The step, counted from 0.
            shard: The index of the part.
            num_shards: The number of parts; concatenated, they are the whole batch.

        Returns:
            input_ids, labels, and with segments segment_ids and positions, int32 [B / num_shards, T].
        """
        rows = self._batch_size // num_shards
        batch = self.empty_batch(rows)
        first = step * self._batch_size + shard * rows
        for i in range(rows):
            source, draw = self._locate(first + i)
            source.write(draw, row(batch, i))
        return batch

    def empty_batch(self, rows: int = 0) -> Arrays:
        """Return a batch (or `rows` rows of one) without content, of the largest shape that batches have."""
        return empty_batch(rows or self._batch_size, self._length, self._segments)

    def summary(self, steps: int, total: bool = True) -> Iterator[str]:
        """Yield lines for the log.

        Args:
            steps: The number of steps.
            total: State how often these read the text also where it is one source, of which `expectation` states it.
        """
        if total or len(self._sources) > 1:
            yield f"{steps:,} steps are {epochs_text(self.epochs(steps))}"

    def warnings(self, steps: int) -> Iterator[str]:
        """Yield what training for `steps` steps leaves out, with a remedy."""
        yield from unused_text(self._names, self.epochs(steps), steps)

    def num_bytes(self, step: int) -> int:
        """Return the UTF-8 bytes of text that the labels of a step encode; over an epoch, those of all its text."""
        rows = range(step * self._batch_size, (step + 1) * self._batch_size)
        return sum(source.num_bytes(draw) for source, draw in map(self._locate, rows))

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which as many rows were drawn as all sources have together."""
        return self.windows / self._batch_size

    def epochs(self, steps: int) -> list[float]:
        """Return how often each source is read in the first `steps` steps."""
        rows = steps * self._batch_size
        drawn = [rows] if self._mixture is None else self._mixture.drawn(rows)
        return [count / source.count for count, source in zip(drawn, self._sources, strict=True)]


def sequential_batches(tokens: Tokens, batch_size: int, length: int, segments: bool = False) -> Iterator[Arrays]:
    """Yield batches [B, T] that predict every token of a stream once, in order; the last is filled up with padding."""
    windows = -(-len(tokens) // length)
    for start in range(0, windows, batch_size):
        batch = empty_batch(batch_size, length, segments)
        for i in range(min(batch_size, windows - start)):
            window(tokens, 0, start + i, length, row(batch, i))
        yield batch
