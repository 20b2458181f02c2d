"""Best-fit batches: rows of whole documents, so that few are cut and little is padding (arXiv:2404.10830).

A document is a piece; a text longer than a row is cut into pieces of full rows and a rest, as in padded batches. Pieces
are packed by best fit, the longest first, each into the row with the least space that it fits into. Attention stays
inside a piece. A row begins with the beginning of a document, unless all its pieces continue one.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from slm_jax.data.batches.arrays import row
from slm_jax.data.batches.mixture import epochs_text
from slm_jax.data.batches.packed import PackedBatches, empty_batch
from slm_jax.data.batches.padded import PaddedRows, check_padded_size, truncation_warnings
from slm_jax.data.corpus.corpus import MixturePart
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.utils.batch import Arrays

_MUCH_PADDING = 0.1  # of the positions, from which on it is warned of


def pack(sizes: np.ndarray, length: int) -> np.ndarray:
    """Pack pieces into rows by best fit, the longest piece first.

    Pieces of one size are placed together, so that the time depends on the number of sizes, not of pieces.

    Args:
        sizes: The tokens of each piece, int [P], at least 1 and at most `length`.
        length: Tokens in a row.

    Returns:
        The row of each piece, int64 [P].
    """
    rows_of = np.empty(sizes.size, np.int64)
    free: dict[int, np.ndarray] = {}  # rows by the number of tokens that still fit
    spaces: list[int] = []  # its keys, ascending
    num_rows = 0

    def put_back(space: int, rows: np.ndarray) -> None:
        if space in free:
            free[space] = np.concatenate([free[space], rows])
        elif space and rows.size:
            free[space] = rows
            insort(spaces, space)

    order = np.argsort(-sizes, kind="stable")
    different, counts = np.unique(sizes, return_counts=True)
    groups = np.split(order, np.cumsum(counts[::-1])[:-1]) if sizes.size else []
    for size, group in zip(different[::-1].tolist(), groups, strict=True):
        pieces = group
        while pieces.size:
            at = bisect_left(spaces, size)
            space = spaces.pop(at) if at < len(spaces) else length
            per_row = space // size  # after the first piece, its row is the one with the least space for the next
            wanted = -(-pieces.size // per_row)
            if space in free:
                rows = free.pop(space)
                put_back(space, rows[wanted:])
                rows = rows[:wanted]
            else:
                rows = np.arange(num_rows, num_rows + wanted)
                num_rows += wanted
            placed = pieces[: rows.size * per_row]
            pieces = pieces[placed.size :]
            rows_of[placed] = np.repeat(rows, per_row)[: placed.size]
            in_last = placed.size - (rows.size - 1) * per_row
            put_back(space - per_row * size, rows[:-1])
            put_back(space - in_last * size, rows[-1:])
    return rows_of


class BestFitRows:
    """The rows of one stream; each epoch holds every row once, in another order.

    Attributes:
        pieces: The pieces.
        count: Rows in an epoch.
        padding: The fraction of positions without a token.
    """

    def __init__(self, stream: TokenStream, length: int, seed: int = 0):
        """Pack a stream.

        Args:
            stream: The stream.
            length: Tokens in a row.
            seed: The seed of the order.
        """
        self.pieces = PaddedRows(stream, length)
        rows_of = pack(self.pieces.sizes, length)
        continues = ~np.isin(self.pieces.starts, np.concatenate([[0], stream.ends[:-1]]))
        self._order_of_pieces = np.lexsort((continues, rows_of))
        self._ends = np.cumsum(np.bincount(rows_of))  # of the pieces of each row
        self.count = self._ends.size
        self.padding = 1 - float(self.pieces.sizes.sum()) / max(self.count * length, 1)
        self._order = grain.MapDataset.range(max(self.count, 1)).seed(seed).shuffle().repeat()

    def pieces_of(self, index: int) -> list[int]:
        """Return the pieces of a row in order."""
        start = int(self._ends[index - 1]) if index else 0
        return self._order_of_pieces[start : int(self._ends[index])].tolist()

    def write_row(self, index: int, into: Arrays) -> None:
        """Write a row into empty arrays [T]; each piece, and the padding, is a segment."""
        at = 0
        for segment, piece in enumerate(self.pieces_of(index)):
            size = int(self.pieces.sizes[piece])
            part = {name: array[at : at + size] for name, array in into.items()}
            self.pieces.write(piece, part)
            part["segment_ids"][:] = segment
            part["positions"][:] = np.arange(size)
            at += size
        into["segment_ids"][at:] = into["segment_ids"][at - 1] + 1

    def row_bytes(self, index: int) -> int:
        """Return the UTF-8 bytes of text that the labels of a row encode."""
        return sum(map(self.pieces.num_bytes, self.pieces_of(index)))

    def write(self, number: int, into: Arrays) -> None:
        """Write the row of a draw, counted from 0 over all epochs, into empty arrays [T]."""
        self.write_row(int(self._order[number]), into)

    def num_bytes(self, number: int) -> int:
        """Return the UTF-8 bytes of text that the labels of a draw encode."""
        return self.row_bytes(int(self._order[number]))


class BestFitBatches(PackedBatches):
    """Endless shuffled batches [B, T] of best-fit rows of one stream, or of several mixed by weight."""

    _sources: list[BestFitRows]

    def __init__(self, parts: Sequence[MixturePart], batch_size: int, length: int, seed: int):
        """Fix the order of the rows.

        Args:
            parts: The parts of a mixture, or the only corpus.
            batch_size: Rows in a batch, B.
            length: Tokens in a row, T.
            seed: The seed of the order.

        Raises:
            UserError: There are too few tokens for one batch, or the prompts of a source leave none for a response.
        """
        check_padded_size(parts, length)
        super().__init__(parts, batch_size, length, seed, segments=True, rows=BestFitRows)

    @property
    def padding(self) -> float:
        """The fraction of positions without a token, over an epoch of each source."""
        return sum(source.padding * source.count for source in self._sources) / self.windows

    def summary(self, steps: int, total: bool = True) -> Iterator[str]:
        """Yield lines for the log; see `PackedBatches.summary`."""
        padding = f"{self.padding:.2%} padding"
        yield f"{steps:,} steps are {epochs_text(self.epochs(steps))}, {padding}" if total else padding

    def warnings(self, steps: int) -> Iterator[str]:
        """Yield what training for `steps` steps leaves out, with a remedy."""
        yield from truncation_warnings([source.pieces for source in self._sources], self._length)
        if self.padding > _MUCH_PADDING:
            yield (
                f"{self.padding:.0%} of the positions are padding, which takes time: use another "
                f"--train.sequence_length than {self._length}, or --data.mode segmented"
            )
        yield from super().warnings(steps)


def sequential_best_fit_batches(stream: TokenStream, batch_size: int, length: int) -> Iterator[tuple[Arrays, int]]:
    """Yield (batch [B, T], UTF-8 bytes of text that it predicts) of every row of a stream once, in order."""
    rows = BestFitRows(stream, length)
    for start in range(0, rows.count, batch_size):
        batch = empty_batch(batch_size, length, segments=True)
        members = range(start, min(start + batch_size, rows.count))
        for i, index in enumerate(members):
            rows.write_row(index, row(batch, i))
        yield batch, sum(map(rows.row_bytes, members))
