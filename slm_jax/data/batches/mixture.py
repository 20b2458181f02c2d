"""Mixtures of several sources by weight."""

from collections.abc import Iterator, Sequence

import numpy as np

from slm_jax.config.source_names import ROWS_PER_MIX

_BLOCK = 1000  # consecutive draws in which each source has exactly its share
_LARGEST_BLOCK = ROWS_PER_MIX
_FEW = 10  # draws in a block below which rounding would change a share by more than a tenth


class Mixture:
    """Decide which source each draw (a row, or a padded batch) comes from.

    In every block of draws each source has its share, at least one draw, in a fixed shuffled order. A block has 1,000
    draws; if a share is below a thousandth it has 10,000, 100,000 or 1,000,000, so that rounding hardly changes it.

    Attributes:
        counts: Draws of each source in a block, int [S].
    """

    def __init__(self, weights: Sequence[float], seed: int):
        """Fix the order of the draws.

        Args:
            weights: The share of each source, not normalized, as `mix_problems` allows them.
            seed: The seed of the order.
        """
        self._block = _block_size(weights)
        shares = np.array(weights, np.float64) / sum(weights) * self._block
        counts = np.floor(shares).astype(int)
        largest_remainders = np.argsort(counts - shares, kind="stable")[: self._block - counts.sum()]
        counts[largest_remainders] += 1
        self.counts = counts
        self._source = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
        # _rank[i]: how many draws before the i-th of a block come from the same source.
        self._rank = np.empty(self._block, np.int64)
        for source, count in enumerate(counts):
            self._rank[self._source == source] = np.arange(count)

    def locate(self, draw: int) -> tuple[int, int]:
        """Return (source, number of earlier draws from it) of a draw, counted from 0."""
        block, at = divmod(draw, self._block)
        source = int(self._source[at])
        return source, block * int(self.counts[source]) + int(self._rank[at])

    def drawn(self, draws: int) -> list[int]:
        """Return how many of the first `draws` draws come from each source."""
        blocks, rest = divmod(draws, self._block)
        return (blocks * self.counts + np.bincount(self._source[:rest], minlength=len(self.counts))).tolist()


def _block_size(weights: Sequence[float]) -> int:
    """Return the draws of a block: 1,000, more if a share is below a thousandth."""
    smallest = min(weights) / sum(weights)
    size = _BLOCK
    if smallest * size < 1:
        while smallest * size < _FEW and size < _LARGEST_BLOCK:
            size *= 10
    return size


def unused_text(names: Sequence[str], epochs: Sequence[float], steps: int) -> Iterator[str]:
    """Yield a warning for each source that no step reads.

    Args:
        names: The name of each source.
        epochs: How often each is read.
        steps: The number of steps.
    """
    for name, value in zip(names, epochs, strict=True):
        if not value:
            yield (
                f"{name} is never read in {steps:,} steps: its share is too small; raise its weight in --data.mix, or "
                "train for more steps"
            )


def source_seed(seed: int, index: int) -> int:
    """Return the seed of the order within one source of a mixture; 32 bits."""
    return (seed + 7919 * index) % 2**32


def epochs_text(epochs: Sequence[float]) -> str:
    """Return the number of epochs of each source in words."""
    text = f"{', '.join(f'{value:.2f}' for value in epochs)} epochs"
    return f"{text} of the sources" if len(epochs) > 1 else text
