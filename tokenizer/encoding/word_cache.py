"""The ids of words, in hash tables that NumPy searches and fills for thousands of words at once.

A key is the bytes of a word, padded with zeros, and its length in the last byte: keys are exact, so there are no false
matches. Words of up to 15 bytes and words of up to 63 bytes have a table each; longer ones are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from threading import Lock

import numpy as np

CACHE_LIMIT = 48 << 20
"""Bytes of tables and ids above which a cache is emptied before the next text, down to its permanent words."""
MAX_KEPT = 63
"""Bytes of the longest word that is kept."""
_KEY_SIZES = (16, MAX_KEPT + 1)
PADDING = MAX_KEPT + 1
"""Bytes that are needed after the last word."""
_NO_ENTRY = np.int32(-1)
# Odd factors, for multiplicative hashing (Knuth): the golden ratio, then random ones.
_FACTORS = np.array(
    [
        *(0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F),
        *(0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3, 0x589965CC75374CC3, 0x1D8E4E27C47D124F),
    ],
    dtype=np.uint64,
)

WordIds = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Positions of words in the list that was asked for (int [m]), their concatenated ids (int32), and the number of ids of
each (int [m])."""
Segment = Callable[[np.ndarray], Iterable[WordIds]]
"""Makes the ids of the words with these indices (int64 [k]), in any order."""


class WordTable:
    """A hash table from words to numbers, with linear probing; at most half of the slots are used.

    Args:
        key_size: Bytes of a key, a multiple of 8; words have fewer.
        capacity: Number of words for which there is room.
    """

    def __init__(self, key_size: int, capacity: int) -> None:
        bits = max(10, (2 * capacity - 1).bit_length())
        self.key_size = key_size
        self.capacity = 1 << bits - 1
        self.used = 0
        self._shift = np.uint64(64 - bits)
        self._last_slot = (1 << bits) - 1
        self._keys = np.zeros((1 << bits, key_size // 8), dtype=np.uint64)
        self._numbers = np.full(1 << bits, _NO_ENTRY)
        lengths = np.arange(key_size)
        masks = np.where(lengths < lengths[:, None], 255, 0).astype(np.uint8)  # [length, byte]
        self._masks = masks.view(np.uint64)
        last_bytes = np.zeros((key_size, 8), dtype=np.uint8)
        last_bytes[:, -1] = lengths
        self._length_bits = last_bytes.view(np.uint64).ravel()

    @property
    def size_in_bytes(self) -> int:
        """The size of the table."""
        return self._keys.nbytes + self._numbers.nbytes

    def keys(self, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the keys (uint64 [n, key_size / 8]) of words of `data`; their lengths are below `key_size`."""
        # A view with an item at every byte offset: items overlap.
        item = np.dtype(f"V{self.key_size}")
        items = np.ndarray(len(data) - self.key_size + 1, dtype=item, buffer=data.data, strides=(1,))
        keys = items[starts].view(np.uint64).reshape(len(starts), -1)
        keys &= self._masks.take(lengths, axis=0)
        keys[:, -1] |= self._length_bits.take(lengths)
        return keys

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the number of each word (int32 [n]), -1 where it is not in the table."""
        slots = self._slots(keys)
        result = self._numbers.take(slots)
        pending = np.flatnonzero(~self._equal(slots, keys))
        occupied = result[pending] != _NO_ENTRY
        result[pending] = _NO_ENTRY
        pending = pending[occupied]
        while len(pending):
            at = (slots[pending] + 1) & self._last_slot
            slots[pending] = at
            numbers = self._numbers.take(at)
            hit = self._equal(at, keys[pending])
            result[pending[hit]] = numbers[hit]
            pending = pending[~hit & (numbers != _NO_ENTRY)]
        return result

    def insert(self, keys: np.ndarray, next_number: int) -> tuple[np.ndarray, np.ndarray]:
        """Add words that are not in the table; some may be equal, and there must be room for all.

        Returns:
            The number of each word (int32 [n]), and, for each new number from `next_number` on, the index of a word
            that has it (int64 [m]).
        """
        slots = self._slots(keys)
        result = np.empty(len(keys), dtype=np.int32)
        new = [np.empty(0, dtype=np.int64)]
        pending = np.arange(len(keys))
        while len(pending):
            at = slots[pending]
            free = self._numbers.take(at) == _NO_ENTRY
            claimed = at[free]
            candidates = pending[free]
            self._numbers[claimed] = candidates  # where several claim a slot, one of them has it afterwards
            won = self._numbers.take(claimed) == candidates
            winners = candidates[won]
            self._numbers[claimed[won]] = np.arange(next_number, next_number + len(winners))
            self._keys[claimed[won]] = keys[winners]
            next_number += len(winners)
            new.append(winners)
            hit = self._equal(at, keys[pending])
            result[pending[hit]] = self._numbers.take(at[hit])
            pending = pending[~hit]
            slots[pending] = (slots[pending] + 1) & self._last_slot
        firsts = np.concatenate(new)
        self.used += len(firsts)
        return result, firsts

    def enlarged(self, capacity: int) -> WordTable:
        """Return a table with the same words and numbers, and more room."""
        occupied = np.flatnonzero(self._numbers != _NO_ENTRY)
        larger = WordTable(self.key_size, capacity)
        _, order = larger.insert(self._keys[occupied], 0)
        slots = np.flatnonzero(larger._numbers != _NO_ENTRY)
        larger._numbers[slots] = self._numbers[occupied[order[larger._numbers[slots]]]]
        return larger

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        mixed = keys[:, 0] * _FACTORS[0]
        for column in range(1, keys.shape[1]):
            mixed += keys[:, column] * _FACTORS[column]
        return (mixed >> self._shift).view(np.int64)

    def _equal(self, slots: np.ndarray, keys: np.ndarray) -> np.ndarray:
        stored = self._keys.take(slots, axis=0)
        equal = stored[:, 0] == keys[:, 0]
        for column in range(1, keys.shape[1]):
            equal &= stored[:, column] == keys[:, column]
        return equal


class WordCache:
    """The ids of words, found or made for many words at once. Safe to use from several threads.

    Args:
        permanent: Words that are always kept, with their ids; those that are empty or too long are left out.
    """

    def __init__(self, permanent: dict[bytes, tuple[int, ...]]) -> None:
        self._permanent = {word: ids for word, ids in permanent.items() if 0 < len(word) <= MAX_KEPT}
        self._lock = Lock()
        self._is_complete = False

    @property
    def size_in_bytes(self) -> int:
        """The size of the tables and ids."""
        arrays = (self._first, self._counts, self._ids)
        return sum(table.size_in_bytes for table in self._tables) + sum(array.nbytes for array in arrays)

    def look_up(
        self, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray, segment: Segment
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of words.

        Args:
            data: Bytes, uint8, `PADDING` or more of them after the last start.
            starts: First byte of each word, int64 [n].
            lengths: Bytes of each word, int64 [n], at least 1.
            segment: Makes the ids of words that are not cached.

        Returns:
            The concatenated ids (int32), and the number of ids of each word (int64 [n]).
        """
        with self._lock:
            needs_reset = not self._is_complete or self.size_in_bytes > CACHE_LIMIT
            # An exception, such as KeyboardInterrupt, may leave words without ids behind: then all are made again.
            self._is_complete = False
            if needs_reset:
                self._reset()
            result = self._look_up(data, starts, lengths, segment)
            self._is_complete = True
        return result

    def _reset(self) -> None:
        """Forget all but the permanent words."""
        self._tables = [WordTable(size, 0) for size in _KEY_SIZES]
        self._entries = 0
        self._used_ids = 0
        self._first = np.empty(0, dtype=np.int64)  # of each entry
        self._counts = np.empty(0, dtype=np.int64)
        self._ids = np.empty(0, dtype=np.int32)
        words = list(self._permanent)
        rows = list(self._permanent.values())

        def ids_of(indices: np.ndarray) -> Iterator[WordIds]:
            chosen = [rows[index] for index in indices.tolist()]
            counts = np.array(list(map(len, chosen)), dtype=np.int64)
            yield np.arange(len(chosen)), np.array([id_ for row in chosen for id_ in row], dtype=np.int32), counts

        if words:
            data = np.frombuffer(b"".join([*words, bytes(PADDING)]), dtype=np.uint8)
            lengths = np.array(list(map(len, words)), dtype=np.int64)
            self._look_up(data, np.cumsum(lengths) - lengths, lengths, ids_of)

    def _look_up(
        self, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray, segment: Segment
    ) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.empty(len(starts), dtype=np.int64)
        new = []
        shortest = 1
        next_number = self._entries
        for index, table in enumerate(self._tables):
            members = np.flatnonzero((lengths >= shortest) & (lengths < table.key_size))
            shortest = table.key_size
            if not len(members):
                continue
            keys = table.keys(data, starts[members], lengths[members])
            found = table.find(keys)
            missing = np.flatnonzero(found == _NO_ENTRY)
            if len(missing):
                if table.used + len(missing) > table.capacity:
                    table = self._tables[index] = table.enlarged(table.used + len(missing))
                found[missing], firsts = table.insert(keys[missing], next_number)
                next_number += len(firsts)
                new.append(members[missing[firsts]])
            numbers[members] = found
        if new:
            self._add(np.concatenate(new), segment)
        state = (self._entries, self._used_ids)
        long = np.flatnonzero(lengths >= shortest)
        if len(long):
            numbers[long] = np.arange(self._entries, self._entries + len(long))
            self._add(long, segment)
        result = self._gather(numbers)
        self._entries, self._used_ids = state  # the long ones are not kept
        return result

    def _add(self, indices: np.ndarray, segment: Segment) -> None:
        """Make the next entries: the words with these indices."""
        stop = self._entries + len(indices)
        self._first = _with_room(self._first, stop)
        self._counts = _with_room(self._counts, stop)
        for members, ids, counts in segment(indices):
            entries = self._entries + members
            self._first[entries] = self._used_ids + np.cumsum(counts) - counts
            self._counts[entries] = counts
            end = self._used_ids + len(ids)
            self._ids = _with_room(self._ids, end)
            self._ids[self._used_ids : end] = ids
            self._used_ids = end
        self._entries = stop

    def _gather(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = self._counts.take(numbers)
        ends = np.cumsum(counts)
        places = np.repeat(self._first.take(numbers) - (ends - counts), counts)
        places += np.arange(len(places))
        return self._ids.take(places), counts


def _with_room(array: np.ndarray, size: int) -> np.ndarray:
    """Return the array, or a longer copy if it has fewer than `size` items."""
    if len(array) >= size:
        return array
    longer = np.empty(max(size, 2 * len(array)), dtype=array.dtype)
    longer[: len(array)] = array
    return longer
