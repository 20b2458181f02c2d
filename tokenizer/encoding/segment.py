"""Text to ids: the reference. Short, slow, and the meaning of every faster way.

A key is written with the fewest ids there are for it (Viterbi over its characters); among equals the one whose
first token is longest wins, then whose second is, and so on. Then phrases join ids of neighbouring keys, from left
to right, the longest first.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizer.units import iterate_keys, text_to_bytes
from tokenizer.vocabulary import FIRST_BYTE, Edge, Vocabulary

LookUp = Callable[[str], Edge | None]


def edges_of_key(key: str, vocabulary: Vocabulary, look_up: LookUp | None = None) -> list[tuple[str, Edge]]:
    """The best segmentation of one key: (text, ids) for each step; a character without an entry is its bytes.

    `look_up` may stand in for `vocabulary.edges.get`.
    """
    look_up = look_up or vocabulary.edges.get
    longest, length = vocabulary.longest, len(key)
    cost = [0] * (length + 1)
    steps: list[tuple[str, Edge]] = [("", ())] * length
    for start in range(length - 1, -1, -1):
        best = 1 << 30
        for end in range(start + 1, min(length, start + longest) + 1):
            text = key[start:end]
            ids = look_up(text)
            if ids is None:
                if end > start + 1:
                    continue
                ids = tuple(FIRST_BYTE + value for value in text_to_bytes(text))
            total = len(ids) + cost[end]
            if total <= best:  # "or equal": the longer one wins a tie
                best, steps[start] = total, (text, ids)
        cost[start] = best
    path, at = [], 0
    while at < length:
        path.append(steps[at])
        at += len(steps[at][0])
    return path


def segment_key(key: str, vocabulary: Vocabulary, look_up: LookUp | None = None) -> list[int]:
    """The ids of one key."""
    return [id_ for _, ids in edges_of_key(key, vocabulary, look_up) for id_ in ids]


def join_phrases(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """Ids with phrases joined: at each place from left to right the longest phrase that fits, else the id itself.

    Nothing is joined right behind <CAPS>, whose meaning is one token of the text before joining.
    """
    table = vocabulary.phrase_table
    if not table.sequences:
        return ids
    out: list[int] = []
    at, caps = 0, vocabulary.caps
    while at < len(ids):
        taken = 1
        if not (at and ids[at - 1] == caps):
            for length in range(min(table.longest, len(ids) - at), 1, -1):
                phrase = table.sequences.get(tuple(ids[at : at + length]))
                if phrase is not None:
                    out.append(phrase)
                    taken = length
                    break
        if taken == 1:
            out.append(ids[at])
        at += taken
    return out


def encode_reference(text: str, vocabulary: Vocabulary) -> list[int]:
    """The ids of a text, by definition."""
    ids = [id_ for key in iterate_keys(text) for id_ in segment_key(key, vocabulary)]
    return join_phrases(ids, vocabulary)
