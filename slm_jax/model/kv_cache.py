"""The cache of attention keys and values that generation reads and extends.

Shapes: B sequences, T new tokens, S columns (the capacity), G key/value heads, K channels of a head.
"""

from typing import NamedTuple

import jax


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, one column for all rows; full, it goes round.

    S columns serve a window of S + 1 - T tokens while T are fed at once; T divides S and what was written before.
    """

    keys: tuple[jax.Array, ...]  # per layer [B·G, S, K], S the capacity; three axes, which XLA updates in place
    values: tuple[jax.Array, ...]
    positions: jax.Array  # int32 [B, S], -1 where a column is empty or padding
    written: jax.Array  # int32 scalar: columns written so far

    def claim(self, positions_BxT: jax.Array) -> tuple["KVCache", jax.Array]:
        """The cache with the next T columns taken for new tokens (-1: padding), and the first of them."""
        column = self.written % self.positions.shape[1]
        positions = jax.lax.dynamic_update_slice(self.positions, positions_BxT, (0, column))
        return self._replace(positions=positions, written=self.written + positions_BxT.shape[1]), column
