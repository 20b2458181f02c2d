"""A cache of pre-tokens for short texts, which are encoded without NumPy."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

SHORT_CACHE_LIMIT = 16 << 20
"""Upper bound in bytes for the estimated size of a cache, which is emptied when it would exceed it."""
_ENTRY_BYTES = 200
"""Bytes of an entry other than its characters, of at most four bytes each, and its ids."""
_MAX_CACHED = 64
"""Characters of the longest pre-token that is cached."""


class ShortCache:
    """The ids of pre-tokens, made one at a time. Safe to use from several threads at once.

    Args:
        segment: Returns the ids of a pre-token, as the bytes of an int32 array.
    """

    def __init__(self, segment: Callable[[str], bytes]) -> None:
        self._segment = segment
        self._entries: dict[str, bytes] = {}
        self.size_in_bytes = 0
        self._lock = Lock()

    def ids(self, pretokens: list[str]) -> bytes:
        """Return the concatenated ids of pre-tokens."""
        rows = list(map(self._entries.get, pretokens))
        if None in rows:
            rows = [self._add(pretoken) if ids is None else ids for pretoken, ids in zip(pretokens, rows, strict=True)]
        return b"".join(rows)  # type: ignore[arg-type]  # no None is left

    def _add(self, pretoken: str) -> bytes:
        ids = self._entries.get(pretoken)
        if ids is not None:  # the text has it more than once
            return ids
        ids = self._segment(pretoken)
        if len(pretoken) <= _MAX_CACHED:
            size = 4 * len(pretoken) + len(ids) + _ENTRY_BYTES
            with self._lock:
                if self.size_in_bytes + size > SHORT_CACHE_LIMIT:
                    self._entries.clear()
                    self.size_in_bytes = 0
                self._entries[pretoken] = ids
                self.size_in_bytes += size
        return ids
