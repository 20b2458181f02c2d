"""Caches of attention keys and values that generation reads and extends.

Both are circular buffers of S columns; they differ in which column a new token is written to.

Shapes: B sequences, T new tokens, S columns (the capacity), G key/value heads, K channels of a head.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """A cache whose sequences advance together: each new token has the same column in all of them.

    T new tokens at once need T to divide S and `written`; S columns then serve a window of S + 1 - T tokens.

    Attributes:
        keys: One array [B·G, S, K] per layer. Three axes, because XLA then updates the array in place.
        values: One array [B·G, S, K] per layer.
        positions: int32 [B, S], the position of the token in each column; -1: the column is empty or padding.
        written: int32 scalar, the columns written so far.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array
    written: jax.Array

    def reserve(self, positions_BxT: jax.Array) -> tuple["KVCache", jax.Array]:
        """Reserve the next T columns.

        Args:
            positions_BxT: int32, the positions of the new tokens, -1 for padding.

        Returns:
            The cache with these positions, and the first of the columns, an int32 scalar.
        """
        column = self.written % self.positions.shape[1]
        positions = jax.lax.dynamic_update_slice(self.positions, positions_BxT, (0, column))
        return self._replace(positions=positions, written=self.written + positions_BxT.shape[1]), column


class SlotCache(NamedTuple):
    """A cache whose sequences advance independently: position p of each is stored in column p mod S.

    Attributes:
        keys: As in `KVCache`.
        values: As in `KVCache`.
        positions: As in `KVCache`.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array

    def reserve(self, positions_BxT: jax.Array) -> tuple["SlotCache", jax.Array]:
        """Reserve one column in each sequence (T = 1).

        Args:
            positions_BxT: int32 [B, 1], the positions of the new tokens.

        Returns:
            The cache with these positions, and the reserved columns, int32 [B].
        """
        column_B = positions_BxT[:, 0] % self.positions.shape[1]
        sequence_B = jnp.arange(len(column_B))
        positions = self.positions.at[sequence_B, column_B].set(positions_BxT[:, 0])
        return self._replace(positions=positions), column_B


Cache = TypeVar("Cache", KVCache, SlotCache)
