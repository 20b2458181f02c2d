"""Batches of preference pairs: a row holds the chosen and the rejected conversation of a pair, padded to one width.

Rows of similar length share a batch, as in padded.py. The log-probabilities of the reference, which the loss compares
with, are a part of a batch (see `training.dpo.loss`).
"""

from collections.abc import Iterator

import grain
import numpy as np

from slm_jax.data.batches.arrays import row
from slm_jax.data.batches.mixture import epochs_text
from slm_jax.data.batches.padded import bucket_widths, empty_batch
from slm_jax.data.pairs import Pairs
from slm_jax.utils.batch import IGNORE_INDEX, Arrays
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural

_REFERENCE = "reference"
_LENGTH_STEP = 64  # a recommended row length is a multiple of this


class PairRows:
    """The pairs whose responses fit into rows of a length, at least in part.

    Attributes:
        pairs: All pairs.
        train: The training pairs that are used, int64.
        validation: The held-out pairs that are used, int64.
        sizes: Tokens of the longer sequence of each pair, without its first token, which is only read; int64 [P].
        truncated: Number of pairs that lose the end of a response.
        skipped: Number of pairs that are not used, because a prompt fills a row.
    """

    def __init__(self, pairs: Pairs, length: int):
        """Find the pairs that can be used with rows of `length` tokens."""
        self.pairs = pairs
        self.length = length
        self.sizes = pairs.sizes().max(axis=1) - 1
        fits = np.array([self._has_responses(pair) for pair in range(len(pairs))], bool)
        index = np.arange(len(pairs))
        self.train = index[fits & (index < pairs.train)]
        self.validation = index[fits & (index >= pairs.train)]
        self.skipped = int(np.count_nonzero(~fits))
        self.truncated = int(np.count_nonzero(fits & (self.sizes > length)))

    def _has_responses(self, pair: int) -> bool:
        """Return whether both sequences have predicted tokens in a row."""
        return all(self.pairs.sequence(pair, side)[1][1 : self.length + 1].any() for side in (0, 1))

    def write(self, pair: int, into: Arrays) -> None:
        """Write a pair into empty arrays [2 W]."""
        width = len(into["input_ids"]) // 2
        for side in (0, 1):
            ids, predicted = self.pairs.sequence(pair, side)
            size = min(ids.size - 1, width)
            at = slice(side * width, side * width + size)
            into["input_ids"][at] = ids[:size]
            targets = ids[1 : size + 1].astype(np.int32)  # stored without a sign, which IGNORE_INDEX needs
            into["labels"][at] = np.where(predicted[1 : size + 1], targets, IGNORE_INDEX)
            into["attention_mask"][at] = 1


def empty_pairs(count: int, width: int) -> Arrays:
    """Return a batch without content: int32 [count, 2 · width], and float32 [count, 2] for the reference."""
    return empty_batch(count, 2 * width) | {_REFERENCE: np.zeros((count, 2), np.float32)}


class PairBatches:
    """Endless shuffled batches of training pairs, [B, 2 W] with W one of `bucket_widths`.

    Attributes:
        rows: The pairs.
        reference: The reference's log-probabilities, float32 [P, 2]; zeros until they are set.
    """

    def __init__(self, pairs: Pairs, batch_size: int, length: int, seed: int):
        """Fix the order of the batches.

        Args:
            pairs: The pairs.
            batch_size: Pairs in a batch, B.
            length: Tokens of the longest sequence.
            seed: The seed of the order.

        Raises:
            UserError: The prompts leave no tokens for responses.
        """
        self.rows = PairRows(pairs, length)
        if not (self.rows.train.size and self.rows.validation.size):
            raise UserError(
                f"every prompt fills a row of {length} tokens, which leaves none for a response: raise "
                "--train.sequence_length"
            )
        self.reference = np.zeros((len(pairs), 2), np.float32)
        self._batch_size = batch_size
        self._length = length
        self._widths = bucket_widths(length)
        bucket = np.searchsorted(self._widths, np.minimum(self.rows.sizes[self.rows.train], length))
        self._members = [self.rows.train[bucket == b] for b in range(len(self._widths))]
        self._ends = np.cumsum([-(-members.size // batch_size) for members in self._members])
        self.batches = int(self._ends[-1])
        sizes = (self.batches, *(max(members.size, 1) for members in self._members))
        orders = [grain.MapDataset.range(size).seed(seed).shuffle().repeat() for size in sizes]
        self._order, self._orders = orders[0], orders[1:]

    def empty_batch(self) -> Arrays:
        """Return a batch without content, of the largest shape that batches have."""
        return empty_pairs(self._batch_size, self._length)

    def _locate(self, step: int) -> tuple[int, list[int]]:
        """Return (width, pairs) of a step's batch; the last batch of a bucket may have fewer pairs."""
        epoch = step // self.batches
        at = int(self._order[step])
        bucket = int(np.searchsorted(self._ends, at, side="right"))
        members, order = self._members[bucket], self._orders[bucket]
        first = (at - (int(self._ends[bucket - 1]) if bucket else 0)) * self._batch_size
        last = min(first + self._batch_size, members.size)
        return self._widths[bucket], [int(members[int(order[epoch * members.size + i])]) for i in range(first, last)]

    def at(self, step: int, shard: int = 0, num_shards: int = 1) -> Arrays:
        """Return the batch of an optimizer step, or one of several equal parts of its rows.

        Args:
            step: The step, counted from 0.
            shard: The index of the part.
            num_shards: The number of parts.
        """
        width, members = self._locate(step)
        size = self._batch_size // num_shards
        return self.batch_of(members[shard * size : (shard + 1) * size], size, width)

    def batch_of(self, members: list[int], size: int, width: int | None = None) -> Arrays:
        """Return a batch of some pairs.

        Args:
            members: The pairs, at most `size`.
            size: Rows of the batch.
            width: Tokens of a sequence; None: the largest.
        """
        batch = empty_pairs(size, width or self._length)
        for i, pair in enumerate(members):
            self.rows.write(pair, row(batch, i))
            batch[_REFERENCE][i] = self.reference[pair]
        return batch

    def validation_batches(self, size: int, max_tokens: int) -> Iterator[Arrays]:
        """Yield the held-out pairs once, in order.

        Args:
            size: Pairs in a batch.
            max_tokens: As many pairs as fit in this many tokens, at least one; 0: all.
        """
        members = self.rows.validation
        if max_tokens:
            total = np.cumsum(self.rows.pairs.sizes()[members].sum(axis=1))
            members = members[: max(1, int(np.searchsorted(total, max_tokens, side="right")))]
        for start in range(0, len(members), size):
            yield self.batch_of(members[start : start + size].tolist(), size)

    def num_bytes(self, step: int) -> int:
        """Return 0: the loss of a pair is not that of a text."""
        del step
        return 0

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which every training pair was in a batch."""
        return float(self.batches)

    def epochs(self, steps: int) -> list[float]:
        """Return how often the pairs are used in the first `steps` steps."""
        return [steps / self.batches]

    def summary(self, steps: int, total: bool = True) -> Iterator[str]:
        """Yield lines for the log."""
        repeated = f", {steps:,} steps are {epochs_text(self.epochs(steps))}" if total else ""
        yield f"{plural(self.rows.train.size, 'pair')} to train on, {self.rows.validation.size:,} held out{repeated}"

    def warnings(self, steps: int) -> Iterator[str]:
        """Yield what training leaves out, with a remedy."""
        del steps
        longest = -(-int(self.rows.sizes.max()) // _LENGTH_STEP) * _LENGTH_STEP
        remedy = f"--train.sequence_length {longest} would hold all of them whole"
        if self.rows.truncated:
            count = f"{self.rows.truncated:,} of {plural(len(self.rows.pairs), 'pair')}"
            yield f"{count} are longer than a row of {self._length} tokens and lose the end of a response: {remedy}"
        if self.rows.skipped:
            yield f"{plural(self.rows.skipped, 'pair')} are skipped, because a prompt fills a row: {remedy}"
