"""The reference encoder: short, slow, and the definition that every faster implementation must match.

A pre-token is encoded with the smallest possible number of ids (Viterbi search over its characters); among equals, the
segmentation with the longest first token wins, then the one with the longest second token, and so on. Then phrases join
ids of neighboring pre-tokens, from left to right, the longest phrase first.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizer.encoding.pretokenization import iterate_pretokens
from tokenizer.encoding.unicode import text_to_bytes
from tokenizer.vocabulary import FIRST_BYTE, Edge, Vocabulary


def encode_reference(text: str, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of a text by definition."""
    ids = [id_ for pretoken in iterate_pretokens(text) for id_ in segment_pretoken(pretoken, vocabulary)]
    return join_phrases(ids, vocabulary)


def segment_pretoken(
    pretoken: str, vocabulary: Vocabulary, look_up: Callable[[str], Edge | None] | None = None
) -> list[int]:
    """Return the ids of one pre-token.

    Args:
        pretoken: A text without a boundary between pre-tokens.
        vocabulary: The vocabulary to encode with.
        look_up: A replacement for `vocabulary.edges.get`, which builds all edges on first use.
    """
    look_up = look_up or vocabulary.edges.get
    longest = vocabulary.longest
    length = len(pretoken)
    cost = [0] * (length + 1)
    # For each start: the end of the best token there, and its ids.
    best_ends = [0] * length
    best_ids: list[Edge] = [()] * length
    for start in range(length - 1, -1, -1):
        lowest = 1 << 30
        for end in range(start + 1, min(length, start + longest) + 1):
            text = pretoken[start:end]
            ids = look_up(text)
            if ids is None:
                if end > start + 1:
                    continue
                ids = tuple(FIRST_BYTE + value for value in text_to_bytes(text))  # a character without an entry
            total = len(ids) + cost[end]
            if total <= lowest:  # <=: the longer token wins a tie
                lowest = total
                best_ends[start] = end
                best_ids[start] = ids
        cost[start] = lowest
    result: list[int] = []
    position = 0
    while position < length:
        result += best_ids[position]
        position = best_ends[position]
    return result


def join_phrases(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """Replace, from left to right, the longest phrase that starts at a position by its id.

    No phrase starts directly after ``<CAPS>``, which applies to one token of the text before joining.
    """
    table = vocabulary.phrase_table
    if not table.sequences:
        return ids
    result: list[int] = []
    caps = vocabulary.caps
    position = 0
    while position < len(ids):
        consumed = 1
        if not (position and ids[position - 1] == caps):
            for length in range(min(table.longest, len(ids) - position), 1, -1):
                phrase = table.sequences.get(tuple(ids[position : position + length]))
                if phrase is not None:
                    result.append(phrase)
                    consumed = length
                    break
        if consumed == 1:
            result.append(ids[position])
        position += consumed
    return result
