"""A hash table over 64-bit keys that NumPy fills at once and searches for many keys at a time.

`tokenizer.encoding.word_cache.WordTable` is another one: its keys have several columns, and words are added to it
later.
"""

from __future__ import annotations

import numpy as np

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing (Knuth)
_EMPTY = np.uint64(2**64 - 1)


class KeyTable:
    """An immutable map from keys to values, by open addressing with linear probing. Keys are exact: no false matches.

    At most a quarter of the slots are used, so that a second probe is rare.

    Args:
        keys: Distinct, each below 2**64 - 1; uint64 [n].
        values: The value of each key, [n].
        missing: The value of all other keys.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray, missing: int) -> None:
        bits = max(8, (4 * len(keys)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._last_slot = (1 << bits) - 1
        self._missing = missing
        self._keys = np.full(1 << bits, _EMPTY)
        self._values = np.full(1 << bits, missing, dtype=values.dtype)
        slots = self._slots(keys)
        pending = np.arange(len(keys))
        while len(pending):  # where several claim a slot, one of them is in it afterwards
            free = pending[self._keys[slots[pending]] == _EMPTY]
            self._keys[slots[free]] = keys[free]
            pending = pending[self._keys[slots[pending]] != keys[pending]]
            slots[pending] = (slots[pending] + 1) & self._last_slot
        self._values[slots] = values

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the value of each key (uint64 [n])."""
        slots, _ = self._locate(keys)
        return self._values.take(slots)

    def find_known(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the keys that are in the table, and their values; faster than `find` where few are.

        Args:
            keys: Each below 2**64 - 1; uint64 [n].
        """
        slots, is_known = self._locate(keys)
        indices = np.flatnonzero(is_known)
        return indices, self._values.take(slots.take(indices))

    def _locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the slot of each key, an empty one if the table does not have it, and whether it has."""
        slots = self._slots(keys)
        stored = self._keys.take(slots)
        is_known = stored == keys
        pending = np.flatnonzero(~is_known & (stored != _EMPTY))
        while len(pending):
            at = (slots.take(pending) + 1) & self._last_slot
            slots[pending] = at
            stored = self._keys.take(at)
            hit = stored == keys.take(pending)
            is_known[pending[hit]] = True
            pending = pending[~hit & (stored != _EMPTY)]
        return slots, is_known

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return ((keys * _GOLDEN_RATIO) >> self._shift).view(np.int64)
