"""Padded batches: each document begins a row; rows of similar length share a batch, so that little is padding."""

import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from slm_jax.data.batches.arrays import empty_arrays, read_circular, row
from slm_jax.data.batches.mixture import Mixture, epochs_text, source_seed, unused_text
from slm_jax.data.corpus.corpus import MixturePart
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.utils.batch import IGNORE_INDEX, Arrays
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural

_BUCKETS = 4  # widths of batches: quarters of the longest row
_MOST = 0.95  # of the instructions should fit
_LENGTH_STEP = 64  # a recommended row length is a multiple of this


def bucket_widths(length: int) -> list[int]:
    """Return the widths of batches for rows of at most `length` tokens, ascending; all but the last multiples of 8."""
    return sorted({min(length, math.ceil(length * k / _BUCKETS / 8) * 8) for k in range(1, _BUCKETS + 1)})


class PaddedRows:
    """The rows of a stream: where each begins, and how many tokens it has.

    A text that is longer than a row continues in further rows, each with the token before it as its first input. A
    longer instruction or conversation loses its end, and one whose first response begins after the row is skipped; both
    are counted.

    Attributes:
        stream: The stream.
        starts: The first token of each row, int64 [R].
        sizes: The tokens of each row, int32 [R].
        truncated_responses: Number of instructions or conversations that lose their end.
        skipped: Number of instructions or conversations without a row.
        instruction_sizes: The tokens of each instruction or conversation, prompt and end included, int64 [I].
    """

    def __init__(self, stream: TokenStream, length: int):
        """Cut a stream into rows of at most `length` tokens."""
        ends = stream.ends
        starts = np.concatenate([[0], ends[:-1]])
        sizes = ends - starts
        prompts = stream.documents["prompt"].astype(np.int64)
        is_text = prompts == 0
        rows = np.where(is_text, -(-sizes // length), prompts < length)  # of each document
        self.stream = stream
        self._length = length
        truncated = ~is_text & (prompts < length) & (sizes > length)
        self._truncated = np.column_stack([starts, ends])[truncated]  # documents that lose their end
        self.truncated_responses = int(np.count_nonzero(truncated))
        self.skipped = int(np.count_nonzero(~is_text & (prompts >= length)))
        self.instruction_sizes = sizes[~is_text]
        index_in_document = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        self.starts = np.repeat(starts, rows) + index_in_document * length
        self.sizes = np.minimum(length, np.repeat(ends, rows) - self.starts).astype(np.int32)

    def __len__(self) -> int:
        return self.starts.size

    def truncated_turns(self) -> int:
        """Return the turns of the assistant that conversations lose at their end, in whole or in part."""
        count = 0
        for start, end in self._truncated.tolist():
            response = self.stream.response_mask(start, end)
            last = response & ~np.append(response[1:], False)  # the last token of each turn
            count += int(np.count_nonzero(last[self._length :]))
        return count

    def write(self, index: int, into: Arrays) -> None:
        """Write a row into empty arrays [W]: labels are its tokens, input_ids the tokens before them."""
        start = int(self.starts[index])
        size = int(self.sizes[index])
        ids = read_circular(self.stream, start - 1, size + 1)  # before a document is the <EOS> of the one before
        into["input_ids"][:size] = ids[:-1]
        into["labels"][:size] = ids[1:]
        if "attention_mask" in into:
            into["attention_mask"][:size] = 1
        mask = self.stream.prompt_mask(start, start + size)
        if mask is not None:
            into["labels"][:size][mask] = IGNORE_INDEX

    def num_bytes(self, index: int) -> int:
        """Return the UTF-8 bytes of text that the labels of a row encode."""
        start = int(self.starts[index])
        return self.stream.num_bytes_between(start, start + int(self.sizes[index]))


def check_padded_size(parts: Sequence[MixturePart], length: int) -> None:
    """Check that every source has a row to predict.

    Raises:
        UserError: The prompts of a source leave no tokens for a response.
    """
    for part in parts:
        if not any((shard.verified_documents()["prompt"] < length).any() for shard in part.train.shards):
            raise UserError(
                f"{part.name}: every prompt fills a row of {length} tokens, which leaves none for a response: raise "
                "--train.sequence_length"
            )


def empty_batch(rows: int, width: int) -> Arrays:
    """Return a batch without content, int32 [rows, width], with attention_mask."""
    return empty_arrays(rows, width) | {"attention_mask": np.zeros((rows, width), np.int32)}


class _BucketedRows:
    """The batches of one source; each epoch holds every row once.

    Attributes:
        rows: The rows.
        count: Batches in an epoch.
        padding: The fraction of positions without a token, over an epoch.
    """

    def __init__(self, stream: TokenStream, batch_size: int, length: int, seed: int):
        self.rows = PaddedRows(stream, length)
        self._batch_size = batch_size
        self._widths = bucket_widths(length)
        bucket = np.searchsorted(self._widths, self.rows.sizes)
        self._members = [np.flatnonzero(bucket == b) for b in range(len(self._widths))]
        batches = [-(-members.size // batch_size) for members in self._members]
        self._ends = np.cumsum(batches)  # a batch is of the first bucket whose end is above its number
        self.count = int(self._ends[-1])
        sizes = (self.count, *(members.size for members in self._members))
        orders = [grain.MapDataset.range(max(size, 1)).seed(seed).shuffle().repeat() for size in sizes]
        self._order = orders[0]  # of the batches
        self._orders = orders[1:]  # of the rows in each bucket
        area = sum(n * batch_size * width for n, width in zip(batches, self._widths, strict=True))
        self.padding = 1 - float(self.rows.sizes.sum()) / max(area, 1)

    def members(self, number: int) -> tuple[int, list[int]]:
        """Return (width, rows) of a batch, counted from 0; the last batch of a bucket may have fewer rows."""
        epoch = number // self.count
        at = int(self._order[number])
        bucket = int(np.searchsorted(self._ends, at, side="right"))
        in_bucket = at - (int(self._ends[bucket - 1]) if bucket else 0)
        members = self._members[bucket]
        order = self._orders[bucket]
        first = in_bucket * self._batch_size
        last = min(first + self._batch_size, members.size)
        return self._widths[bucket], [int(members[int(order[epoch * members.size + i])]) for i in range(first, last)]


class PaddedBatches:
    """Endless shuffled batches [B, W] of padded rows, W one of `bucket_widths`; batches of several sources alternate.

    Attributes:
        batches: Batches in an epoch of all sources together.
    """

    def __init__(self, parts: Sequence[MixturePart], batch_size: int, length: int, seed: int):
        """Fix the order of the batches.

        Args:
            parts: The parts of a mixture, or the only corpus.
            batch_size: Rows in a batch, B.
            length: Tokens in the longest row.
            seed: The seed of the order.

        Raises:
            UserError: The prompts of a source leave no tokens for a response.
        """
        check_padded_size(parts, length)
        self._batch_size = batch_size
        self._length = length
        self._sources = [
            _BucketedRows(part.train, batch_size, length, source_seed(seed, k)) for k, part in enumerate(parts)
        ]
        self._mixture = Mixture([part.weight for part in parts], seed) if len(parts) > 1 else None
        self._names = [part.name for part in parts]
        self.batches = sum(source.count for source in self._sources)

    @property
    def padding(self) -> float:
        """The fraction of positions without a token, over an epoch of each source."""
        return sum(source.padding * source.count for source in self._sources) / self.batches

    def empty_batch(self) -> Arrays:
        """Return a batch without content, of the largest shape that batches have."""
        return empty_batch(self._batch_size, self._length)

    def _locate(self, step: int) -> tuple[PaddedRows, int, list[int]]:
        """Return (rows of the source, width, indices of the rows) of a step's batch."""
        source, number = (0, step) if self._mixture is None else self._mixture.locate(step)
        width, members = self._sources[source].members(number)
        return self._sources[source].rows, width, members

    def at(self, step: int, shard: int = 0, num_shards: int = 1) -> Arrays:
        """Return the batch of an optimizer step, or one of several equal parts of its rows.

        Args:
            step: The step, counted from 0.
            shard: The index of the part.
            num_shards: The number of parts; concatenated, they are the whole batch.

        Returns:
            input_ids, labels and attention_mask, int32 [B / num_shards, W].
        """
        rows, width, members = self._locate(step)
        size = self._batch_size // num_shards
        batch = empty_batch(size, width)
        for i, index in enumerate(members[shard * size : (shard + 1) * size]):
            rows.write(index, row(batch, i))
        return batch

    def num_bytes(self, step: int) -> int:
        """Return the UTF-8 bytes of text that the labels of a step encode."""
        rows, _, members = self._locate(step)
        return sum(rows.num_bytes(index) for index in members)

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which as many batches were drawn as all sources have together."""
        return float(self.batches)

    def epochs(self, steps: int) -> list[float]:
        """Return how often each source is read in the first `steps` steps."""
        drawn = [steps] if self._mixture is None else self._mixture.drawn(steps)
        return [count / source.count for count, source in zip(drawn, self._sources, strict=True)]

    def summary(self, steps: int, total: bool = True) -> Iterator[str]:
        """Yield lines for the log.

        Args:
            steps: The number of steps.
            total: State how often these read the text also where it is one source, of which `expectation` states it.
        """
        if total or len(self._sources) > 1:
            yield f"{steps:,} steps are {epochs_text(self.epochs(steps))}, {self.padding:.1%} padding"
        else:
            yield f"{self.padding:.1%} padding"

    def warnings(self, steps: int) -> Iterator[str]:
        """Yield what training for `steps` steps leaves out, with a remedy."""
        yield from truncation_warnings([source.rows for source in self._sources], self._length)
        yield from unused_text(self._names, self.epochs(steps), steps)


def truncation_warnings(rows: Sequence[PaddedRows], length: int) -> Iterator[str]:
    """Yield which instructions and conversations rows of at most `length` tokens cut or leave out, with a remedy."""
    yield from _conversation_warnings([each for each in rows if each.stream.has_conversations], length)
    rows = [each for each in rows if not each.stream.has_conversations]
    truncated = sum(each.truncated_responses for each in rows)
    skipped = sum(each.skipped for each in rows)
    if truncated or skipped:
        sizes = np.concatenate([each.instruction_sizes for each in rows])
        if truncated:
            yield (
                f"{truncated:,} of {plural(sizes.size, 'response')} are longer than a row of {length} tokens "
                f"and lose their end: {_fitting_length(sizes, length)}"
            )
        if skipped:
            yield (
                f"{skipped:,} of {plural(sizes.size, 'instruction')} are skipped, because their prompt alone fills "
                f"a row of {length} tokens: {_fitting_length(sizes, length)}"
            )


def _conversation_warnings(rows: Sequence[PaddedRows], length: int) -> Iterator[str]:
    truncated = sum(each.truncated_responses for each in rows)
    skipped = sum(each.skipped for each in rows)
    if not (truncated or skipped):
        return
    sizes = np.concatenate([each.instruction_sizes for each in rows])
    if truncated:
        turns = sum(each.truncated_turns() for each in rows)
        total = sum(each.stream.num_turns for each in rows)
        yield (
            f"{turns:,} of {plural(total, 'turn')} of the assistant are truncated or left out: {truncated:,} of "
            f"{plural(sizes.size, 'conversation')} are longer than a row of {length} tokens: "
            f"{_fitting_length(sizes, length)}"
        )
    if skipped:
        yield (
            f"{skipped:,} of {plural(sizes.size, 'conversation')} are skipped, because their first response begins "
            f"after a row of {length} tokens: {_fitting_length(sizes, length)}"
        )


def _fitting_length(sizes: np.ndarray, length: int) -> str:
    """Return the sequence lengths that hold most instructions, and all of them, as advice."""
    longest = int(sizes.max())
    most = -(-int(np.quantile(sizes, _MOST, method="higher")) // _LENGTH_STEP) * _LENGTH_STEP
    if length < most < longest:
        return f"--train.sequence_length {most} would hold {_MOST:.0%} of them whole, {longest} all"
    return f"--train.sequence_length {longest} would hold all of them whole"


def sequential_padded_batches(stream: TokenStream, batch_size: int, length: int) -> Iterator[tuple[Arrays, int]]:
    """Yield (batch [B, length], UTF-8 bytes of text that it predicts) of every row of a stream once, in order."""
    rows = PaddedRows(stream, length)
    for start in range(0, len(rows), batch_size):
        batch = empty_batch(batch_size, length)
        members = range(start, min(start + batch_size, len(rows)))
        for i, index in enumerate(members):
            rows.write(index, row(batch, i))
        yield batch, sum(rows.num_bytes(index) for index in members)
