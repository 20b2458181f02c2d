"""Keys and values of conversations that were computed before, so that the next turn computes only its own tokens.

A turn of a conversation repeats the earlier ones. Their keys and values are kept, and are bit-identical to those that a
run without the cache computes: the value that a program gives for a token depends on the tokens up to it, but in the
last bits also on the program, that is on the size of the chunk that the token is computed in and on its place there. A
conversation is therefore fed in chunks that depend on its messages alone (`prefill.conversation_chunks`), whether there
is a cache or not, and a chunk is reused if it and all chunks before it have the same ids, sizes and places. What
decoding computed, one token at a time by another program, is never reused: the engine feeds an answer again as a part
of the conversation while it has nothing else to do.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from slm_jax.model.kv_cache import KVCache

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 30.0  # seconds without the cache after an error; twice as many after each further one without a reuse
_LONGEST_PAUSE = 600.0
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


class PromptChunk(NamedTuple):
    """A part of a prompt that one call computes.

    Attributes:
        first: Position of its first token.
        length: Number of its tokens.
        size: Number of tokens of the program that computes it; the rest is padding.
    """

    first: int
    length: int
    size: int

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.first + self.length


@dataclass(eq=False)
class _Entry:
    """The longest conversation known that begins with these chunks."""

    ids: np.ndarray
    chunks: Sequence[PromptChunk]
    cache: KVCache
    bytes: int

    def common(self, ids: np.ndarray, chunks: Sequence[PromptChunk]) -> int:
        """Return the number of leading chunks that another prompt has in common with this one."""
        length = min(len(ids), len(self.ids))
        differs = self.ids[:length] != ids[:length]
        same = int(np.argmax(differs)) if differs.any() else length
        pairs = zip(self.chunks, chunks, strict=False)
        return next((n for n, (own, other) in enumerate(pairs) if own != other or own.end > same),
                    min(len(self.chunks), len(chunks)))  # fmt: skip


class PrefixCache:
    """Keys and values of the newest conversations of one model, within a bound on memory.

    It may be used from any thread. Entries belong to the weights that computed them.

    Attributes:
        bytes: Size of all entries.
        evicted: Number of entries dropped because of the bound, the least recently used first.
    """

    def __init__(self, max_bytes: int):
        """Create an empty cache.

        Args:
            max_bytes: Maximum size of all entries in bytes; 0: keep nothing.
        """
        self._limit = max_bytes
        self._pause = _FIRST_PAUSE
        self._resumes = -math.inf  # as time.monotonic()
        self.bytes = 0
        self.evicted = 0
        self._weights: Any = None
        self._entries: list[_Entry] = []  # the least recently used first
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:
        """Maximum size of all entries; 0: nothing is kept, as for some time after an error (see `optional`)."""
        return self._limit if time.monotonic() >= self._resumes else 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, weights: Any, ids: np.ndarray, chunks: Sequence[PromptChunk]) -> tuple[KVCache | None, int]:
        """Find the entry that has most leading chunks in common with a prompt.

        Args:
            weights: The weights that compute the prompt.
            ids: Its ids, int32 [T].
            chunks: Its chunks.

        Returns:
            The entry's keys and values, of which columns from the end of these chunks on belong to another prompt, and
            the number of chunks; (None, 0) without a common one.
        """
        with self._lock:
            if weights is not self._weights or not self._entries:
                return None, 0
            common = [entry.common(ids, chunks) for entry in self._entries]
            best = max(range(len(common)), key=common.__getitem__)
            if not common[best]:
                return None, 0
            entry = self._entries.pop(best)
            self._entries.append(entry)
            return entry.cache, common[best]

    def add(self, weights: Any, ids: np.ndarray, chunks: Sequence[PromptChunk], cache: KVCache) -> None:
        """Keep a prompt, in the place of those that it continues; drop others if the bound requires it.

        Args:
            weights: The weights that computed it; a prompt of others than those of `reset` is not kept.
            ids: Its ids, int32 [T].
            chunks: Its chunks.
            cache: Its keys and values, in columns 0 to T - 1.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        with self._lock:
            max_bytes = self.max_bytes
            if weights is not self._weights or size > max_bytes:
                return
            common = [entry.common(ids, chunks) for entry in self._entries]
            if any(count == len(chunks) for count in common):
                return  # a part of an entry
            pairs = zip(self._entries, common, strict=True)
            self._entries = [entry for entry, count in pairs if count < len(entry.chunks)]
            self._entries.append(_Entry(ids, chunks, cache, size))
            self.bytes = sum(entry.bytes for entry in self._entries)
            while self.bytes > max_bytes:
                self.bytes -= self._entries.pop(0).bytes
                self.evicted += 1

    def note_reuse(self) -> None:
        """Note that an entry was restored: the cache works, so the next error counts as the first one."""
        with self._lock:
            self._pause = _FIRST_PAUSE

    def has(self, weights: Any, ids: np.ndarray, chunks: Sequence[PromptChunk]) -> bool:
        """Return whether all chunks of a prompt are kept."""
        with self._lock:
            return weights is self._weights and any(e.common(ids, chunks) == len(chunks) for e in self._entries)

    def reset(self, weights: Any) -> None:
        """Drop all entries, and keep those of other weights from now on."""
        with self._lock:
            self._weights = weights
            self._drop_entries()

    def _drop_entries(self) -> None:
        """Free the memory of all entries; the lock is held."""
        self._entries = []
        self.bytes = 0

    @contextlib.contextmanager
    def optional(self, work: str) -> Iterator[None]:
        """Do work that requests can do without.

        After an error the memory of all entries is freed, and there is no cache for a while: 30 seconds, twice as long
        after each further error before an entry was reused (`note_reuse`), at most 10 minutes: if only restoring fails,
        what is kept in between proves nothing. If memory was short, the cache may be half as large from then on.

        Args:
            work: The work, for the log.
        """
        try:
            yield
        except Exception as error:  # above all of the device: out of memory
            is_short = isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
            with self._lock:
                pause = self._pause
                self._resumes = time.monotonic() + pause
                self._pause = min(2 * pause, _LONGEST_PAUSE)
                self._limit = self._limit // 2 if is_short else self._limit
                self._drop_entries()  # not by `reset`: another thread may have set other weights
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            size = f", with {self._limit / 1e6:,.0f} MB (--prefix_cache)" if is_short else ""
            logger.warning(
                "warning: %s failed (%s): for %.0f s, turns of conversations are computed in full; then the prefix "
                "cache is used again%s",
                work,
                reason,
                pause,
                size,
            )
