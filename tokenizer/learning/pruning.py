"""Prune a set of entries to the ones that save the most tokens.

Merges are learned greedily, and many that were needed on the way are hardly used in the end (Chizhov et al., "Picky
BPE", 2024, call them junk tokens). More entries are learned than requested, the training text is segmented with all of
them, and those that save the fewest tokens are removed, as long as every remaining entry can still be made of two
others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from tokenizer.encoding.unicode import capitalize


class EntryGraph:
    """Entries by text, each made of two other entries.

    Args:
        fixed: Texts without parents that cannot be removed.
        single: Removable texts without parents (alphabet characters).
        composed: Removable texts that are made of two others.
        pairs: {lower: upper}; an entry may be made of a case mark and its lower-case form.
    """

    def __init__(
        self, fixed: Iterable[str], single: Iterable[str], composed: Iterable[str], pairs: dict[str, str]
    ) -> None:
        self.single = set(single)
        self.composed = set(composed)
        self._entries = {*fixed, *self.single, *self.composed}
        self._lower = {ord(upper): lower for lower, upper in pairs.items()}
        self._upper = {ord(lower): upper for lower, upper in pairs.items()}
        self._pairs = pairs
        self._children: dict[str, set[str]] = {}
        self._parents: dict[str, tuple[str, ...]] = {}
        for text in self.composed:
            parents = self.parents(text)
            if parents is None:
                raise ValueError(f"{text!r} cannot be made of two entries")
            self._link(text, parents)

    def _link(self, text: str, parents: tuple[str, ...]) -> None:
        self._parents[text] = parents
        for parent in parents:
            self._children.setdefault(parent, set()).add(text)

    def parents(self, text: str, without: str = "") -> tuple[str, ...] | None:
        """Return two entries, other than `without`, that make `text`, or ("<UP>" or "<CAPS>", entry)."""
        marked = self.case_mark_and_entry(text)
        if marked is not None and marked[1] != without:
            return marked
        entries = self._entries
        for split in range(len(text) - 1, 0, -1):
            left = text[:split]
            right = text[split:]
            if left in entries and right in entries and without not in (left, right):
                return left, right
        return None

    def case_mark_and_entry(self, text: str) -> tuple[str, str] | None:
        """Return the case mark and the entry that spell `text`, or None."""
        if text.islower():
            return None
        lower = text.translate(self._lower)
        if lower == text or lower not in self._entries:
            return None
        if capitalize(lower, self._pairs) == text:
            return "<UP>", lower
        if lower.translate(self._upper) == text:
            return "<CAPS>", lower
        return None

    def remove(self, text: str) -> set[str] | None:
        """Remove an entry if every entry that is made of it can be made of others.

        Returns:
            The entries that are needed less as parents after the removal; None if the entry could not be removed.
        """
        moved = []
        for child in sorted(self._children.get(text, ())):
            parents = self.parents(child, without=text)
            if parents is None:
                return None
            moved.append((child, parents))
        released = set(self._parents.get(text, ()))
        for child, parents in moved:
            for parent in self._parents[child]:
                self._children[parent].discard(child)
                released.add(parent)
            self._link(child, parents)
        for parent in self._parents.pop(text, ()):
            self._children[parent].discard(text)
        for texts in (self._entries, self.single, self.composed, released):
            texts.discard(text)
        return released

    def shrink(self, saved: dict[str, int], size: int) -> None:
        """Remove the entries that save the fewest tokens until `size` removable ones are left, if possible.

        Args:
            saved: {text: tokens that the entry saves on the training text}.
            size: Number of removable entries to keep.
        """
        heap = [(saved.get(text, 0), -len(text), text) for text in self.single | self.composed]
        excess = len(heap) - size
        heapq.heapify(heap)
        needed: dict[str, tuple[int, int, str]] = {}
        while excess > 0 and heap:
            item = heapq.heappop(heap)
            released = self.remove(item[2])
            if released is None:
                needed[item[2]] = item
                continue
            excess -= 1
            for text in released & needed.keys():  # may be removable now; the heap keeps the order
                heapq.heappush(heap, needed.pop(text))
