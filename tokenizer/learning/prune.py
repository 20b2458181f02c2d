"""From more entries than wanted to the ones that earn their place.

Merges are learned greedily, and many that were needed on the way are hardly used in the end (Chizhov et al., "Picky
BPE", 2024, call them junk). Here more entries are learned than asked for, the training text is segmented with all
of them, and those that save fewest tokens go, as long as every entry that stays can still be made of two others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from tokenizer.units import capitalised


class EntryGraph:
    """Entries as texts, each made of two others; `fixed` ones need no parents and stay.

    Args:
        fixed: texts that stand by themselves and cannot be removed.
        single: removable texts that stand by themselves (alphabet characters).
        made: removable texts that are made of two others.
        pairs: {lower: upper} case pairs; an entry may be a case mark and its lower-case form.
    """

    def __init__(self, fixed: Iterable[str], single: Iterable[str], made: Iterable[str], pairs: dict[str, str]) -> None:
        self.single = set(single)
        self.made = set(made)
        self.known = {*fixed, *self.single, *self.made}
        self._lower = {ord(upper): lower for lower, upper in pairs.items()}
        self._upper = {ord(lower): upper for lower, upper in pairs.items()}
        self._pairs = pairs
        self._children: dict[str, set[str]] = {}
        self._parents: dict[str, tuple[str, ...]] = {}
        for text in self.made:
            parents = self.parents(text)
            if parents is None:
                raise ValueError(f"{text!r} cannot be made of two entries")
            self._link(text, parents)

    def _link(self, text: str, parents: tuple[str, ...]) -> None:
        self._parents[text] = parents
        for parent in parents:
            self._children.setdefault(parent, set()).add(text)

    def parents(self, text: str, without: str = "") -> tuple[str, ...] | None:
        """Two entries, other than `without`, that make `text`, or ("<UP>" or "<CAPS>", entry)."""
        marked = self.marked(text)
        if marked is not None and marked[1] != without:
            return marked
        known = self.known
        for cut in range(len(text) - 1, 0, -1):
            left, right = text[:cut], text[cut:]
            if left in known and right in known and without not in (left, right):
                return left, right
        return None

    def marked(self, text: str) -> tuple[str, str] | None:
        """(case mark, entry) that spell `text`, or None."""
        if text.islower():
            return None
        small = text.translate(self._lower)
        if small == text or small not in self.known:
            return None
        if capitalised(small, self._pairs) == text:
            return "<UP>", small
        return ("<CAPS>", small) if small.translate(self._upper) == text else None

    def remove(self, text: str) -> set[str] | None:
        """Remove an entry; return the texts that it or others no longer need as parents.

        None, and nothing happens, where another entry cannot be made without it.
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
        for texts in (self.known, self.single, self.made, released):
            texts.discard(text)
        return released

    def shrink(self, losses: dict[str, int], size: int) -> None:
        """Remove entries of least loss until `size` removable ones are left, or nothing more can go."""
        heap = [(losses.get(text, 0), -len(text), text) for text in self.single | self.made]
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
            for text in released & needed.keys():  # perhaps it can go now; the heap keeps the order by loss
                heapq.heappush(heap, needed.pop(text))
