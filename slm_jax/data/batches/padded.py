"""Padded batches: each document begins its own row; rows of about one length go together, so that little is padding."""

import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from slm_jax.data.batches.packed import Arrays, Mixture, blank, epochs_text, ring
from slm_jax.data.corpus.corpus import MixturePart, TokenStream
from slm_jax.utils.batch import IGNORE_INDEX
from slm_jax.utils.errors import UserError

_BUCKETS = 4  # widths that rows come in: quarters of the longest


def widths(length: int) -> list[int]:
    """The widths of batches for rows of at most `length` tokens, ascending; multiples of 8 but for the last."""
    return sorted({min(length, math.ceil(length * k / _BUCKETS / 8) * 8) for k in range(1, _BUCKETS + 1)})


class Rows:
    """The rows of a split: where each begins in the stream, and how many tokens it has.

    A longer text goes on in further rows, each with the token before as its first input. Of a longer instruction the
    end of the response is lost; one whose prompt fills the row is left out. Both are counted.
    """

    def __init__(self, split: TokenStream, length: int):
        ends = split.ends
        starts = np.concatenate([[0], ends[:-1]])
        sizes, prompts = ends - starts, split.documents["prompt"].astype(np.int64)
        whole = prompts == 0
        counts = np.where(whole, -(-sizes // length), prompts < length)
        self.cut_responses = int(np.count_nonzero(~whole & (prompts < length) & (sizes > length)))
        self.left_out = int(np.count_nonzero(~whole & (prompts >= length)))
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the row in its document
        self.starts = np.repeat(starts, counts) + number * length
        self.sizes = np.minimum(length, np.repeat(ends, counts) - self.starts).astype(np.int32)
        self.split = split

    def __len__(self) -> int:
        return self.starts.size

    def write(self, index: int, arrays: Arrays) -> None:
        """Row `index` into blank arrays [width]: labels are its tokens, input_ids the ones before them."""
        start, size = int(self.starts[index]), int(self.sizes[index])
        tokens = ring(self.split, start - 1, size + 1)  # before a document stands the <EOS> of the one before
        arrays["input_ids"][:size], arrays["labels"][:size] = tokens[:-1], tokens[1:]
        arrays["attention_mask"][:size] = 1
        mask = self.split.prompt_mask(start, start + size)
        if mask is not None:
            arrays["labels"][:size][mask] = IGNORE_INDEX

    def num_bytes(self, index: int) -> int:
        """UTF-8 bytes of the text that the row's labels stand for."""
        start = int(self.starts[index])
        return self.split.num_bytes_between(start, start + int(self.sizes[index]))


def blank_rows(batch_size: int, width: int) -> Arrays:
    """Nothing to read and nothing to predict, int32 [batch_size, width]."""
    return blank(batch_size, width) | {"attention_mask": np.zeros((batch_size, width), np.int32)}


class _Buckets:
    """The batches of one source: in an epoch every row is in one, once."""

    def __init__(self, split: TokenStream, batch_size: int, length: int, seed: int):
        self.rows, self._batch_size, self._widths = Rows(split, length), batch_size, widths(length)
        bucket = np.searchsorted(self._widths, self.rows.sizes)
        self._members = [np.flatnonzero(bucket == b) for b in range(len(self._widths))]
        batches = [-(-members.size // batch_size) for members in self._members]
        self._ends = np.cumsum(batches)
        self.count = int(self._ends[-1])
        orders = [grain.MapDataset.range(max(n, 1)) for n in (self.count, *(m.size for m in self._members))]
        self._order, *self._orders = [order.seed(seed).shuffle().repeat() for order in orders]
        area = sum(n * batch_size * width for n, width in zip(batches, self._widths, strict=True))
        self.padding = 1 - float(self.rows.sizes.sum()) / max(area, 1)

    def members(self, index: int) -> tuple[int, list[int]]:
        """(width, rows) of the index-th batch; the last of a width may have fewer rows than others."""
        epoch, at = index // self.count, int(self._order[index])
        bucket = int(np.searchsorted(self._ends, at, side="right"))
        number = at - (int(self._ends[bucket - 1]) if bucket else 0)
        members, order = self._members[bucket], self._orders[bucket]
        first, last = number * self._batch_size, min((number + 1) * self._batch_size, members.size)
        return self._widths[bucket], [int(members[int(order[epoch * members.size + i])]) for i in range(first, last)]


class PaddedBatches:
    """Endless shuffled batches [B, W] of padded rows, W of `widths(length)`; several sources take turns by weight."""

    def __init__(self, parts: Sequence[MixturePart], batch_size: int, length: int, seed: int):
        """Raises UserError if no row has anything to predict."""
        self._batch_size, self._length = batch_size, length
        self._sources = [
            _Buckets(part.train, batch_size, length, (seed + 7919 * k) % 2**32) for k, part in enumerate(parts)
        ]
        for part, source in zip(parts, self._sources, strict=True):
            if not len(source.rows):
                raise UserError(f"{part.name}: no prompt leaves room for a response: raise --train.sequence_length")
        self._mixture = Mixture([part.weight for part in parts], seed) if len(parts) > 1 else None
        self.batches = sum(source.count for source in self._sources)

    @property
    def padding(self) -> float:
        """The share of positions that hold no token, over an epoch of each source."""
        shares = [(source.padding, source.count) for source in self._sources]
        return sum(share * count for share, count in shares) / self.batches

    def empty_batch(self) -> Arrays:
        """A batch without content, of the shape that batches have at most."""
        return blank_rows(self._batch_size, self._length)

    def _place(self, step: int) -> tuple[Rows, int, list[int]]:
        source, index = self._mixture.place(step) if self._mixture else (0, step)
        return self._sources[source].rows, *self._sources[source].members(index)

    def at(self, step: int, host: int = 0, hosts: int = 1) -> Arrays:
        """The batch of step `step` (from 0): input_ids, labels and attention_mask int32 [B, W].

        Of several hosts each may ask for its equal part of the rows; put together they are the whole batch.
        """
        rows, width, members = self._place(step)
        size = self._batch_size // hosts
        arrays = blank_rows(size, width)
        for i, index in enumerate(members[host * size : (host + 1) * size]):
            rows.write(index, {name: array[i] for name, array in arrays.items()})
        return arrays

    def num_bytes(self, step: int) -> int:
        """UTF-8 bytes of the text that the targets of a step stand for."""
        rows, _, members = self._place(step)
        return sum(rows.num_bytes(index) for index in members)

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which as many batches were taken as all sources together have."""
        return float(self.batches)

    def epochs(self, steps: int) -> list[float]:
        """How often each source was read in the first `steps` steps."""
        taken = self._mixture.taken(steps) if self._mixture else [steps]
        return [n / source.count for n, source in zip(taken, self._sources, strict=True)]

    def summary(self, steps: int) -> Iterator[str]:
        """What is lost, in words; how often so many steps read the text; and the share of padding."""
        cut, left = (sum(getattr(s.rows, name) for s in self._sources) for name in ("cut_responses", "left_out"))
        if cut:
            yield f"{cut:,} responses are longer than --train.sequence_length and lose their end"
        if left:
            yield f"{left:,} instructions are left out: their prompt alone fills --train.sequence_length"
        yield f"{steps:,} steps are {epochs_text(self.epochs(steps))}, {self.padding:.1%} padding"


def sequential_padded_batches(split: TokenStream, batch_size: int, length: int) -> Iterator[tuple[Arrays, int]]:
    """(batch [B, length], bytes of text that it predicts): every row of a split once, in order."""
    rows = Rows(split, length)
    for start in range(0, len(rows), batch_size):
        arrays = blank_rows(batch_size, length)
        members = range(start, min(start + batch_size, len(rows)))
        for i, index in enumerate(members):
            rows.write(index, {name: array[i] for name, array in arrays.items()})
        yield arrays, sum(rows.num_bytes(index) for index in members)
