"""Mixtures of several sources by weight."""

from collections.abc import Sequence

import numpy as np

_BLOCK = 1000  # consecutive draws in which each source has exactly its share


class Mixture:
    """Decide which source each draw (a row, or a padded batch) comes from.

    In every block of 1,000 draws each source has exactly its share, in a fixed shuffled order.

    Attributes:
        counts: Draws of each source in a block, int [S].
    """

    def __init__(self, weights: Sequence[float], seed: int):
        """Fix the order of the draws.

        Args:
            weights: The share of each source, not normalized; a share below a thousandth may get no draws.
            seed: The seed of the order.
        """
        shares = np.array(weights, np.float64) / sum(weights) * _BLOCK
        counts = np.floor(shares).astype(int)
        largest_remainders = np.argsort(counts - shares, kind="stable")[: _BLOCK - counts.sum()]
        counts[largest_remainders] += 1
        self.counts = counts
        self._source = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
        # _rank[i]: how many draws before the i-th of a block come from the same source.
        is_source = self._source[:, None] == np.arange(len(counts))
        self._rank = (np.cumsum(is_source, axis=0) - 1)[np.arange(_BLOCK), self._source]

    def locate(self, draw: int) -> tuple[int, int]:
        """Return (source, number of earlier draws from it) of a draw, counted from 0."""
        block, at = divmod(draw, _BLOCK)
        source = int(self._source[at])
        return source, block * int(self.counts[source]) + int(self._rank[at])

    def drawn(self, draws: int) -> list[int]:
        """Return how many of the first `draws` draws come from each source."""
        blocks, rest = divmod(draws, _BLOCK)
        return (blocks * self.counts + np.bincount(self._source[:rest], minlength=len(self.counts))).tolist()


def source_seed(seed: int, index: int) -> int:
    """Return the seed of the order within one source of a mixture; 32 bits."""
    return (seed + 7919 * index) % 2**32


def epochs_text(epochs: Sequence[float]) -> str:
    """Return the number of epochs of each source in words."""
    text = f"{', '.join(f'{value:.2f}' for value in epochs)} epochs"
    return f"{text} of the sources" if len(epochs) > 1 else text
