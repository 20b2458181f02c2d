"""The implementation of `segment`, `offsets`, `explain_token`, `top_merges` and `db_status`.

Each function implements the method of `HybridTokenizer` of that name, which documents it.
"""

from __future__ import annotations

from collections import Counter

from tokenizer.decoding.decoder import Decoder
from tokenizer.encoding.unicode import bytes_to_text
from tokenizer.inspect.results import Explanation, Merge, Merges, Segment, Segments, Status
from tokenizer.learning.counting import PretokenCounts
from tokenizer.portable.reference import merge_bytes
from tokenizer.vocabulary import FIRST_BYTE, NL, SP, Vocabulary, byte_name


def token_bytes(vocabulary: Vocabulary, ids: list[int]) -> list[bytes]:
    """Return the bytes of each id, with case marks applied."""
    table = Decoder(vocabulary).table
    result = []
    mark = -1
    for id_ in ids:
        result.append(table[id_] if mark < 0 else vocabulary.marked_data(id_, mark))
        mark = id_ if id_ in vocabulary.case_marks else -1
    return result


def segment(vocabulary: Vocabulary, ids: list[int]) -> Segments:
    """Implement `HybridTokenizer.segment` for the ids of a text."""
    return Segments(
        Segment(_printable(data), vocabulary.kind(id_), id_)
        for id_, data in zip(ids, token_bytes(vocabulary, ids), strict=True)
    )


def _printable(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(map(byte_name, data))


def offsets(vocabulary: Vocabulary, ids: list[int]) -> list[tuple[int, int]]:
    """Implement `HybridTokenizer.offsets` for the ids of a text.

    A character starts at every byte that is not a UTF-8 continuation byte.
    """
    spans = []
    started = 0  # characters that start before the current token
    for data in token_bytes(vocabulary, ids):
        starts = sum(1 for value in data if not _is_continuation(value))
        first = started
        if data and _is_continuation(data[0]):
            first -= 1
        spans.append((first, started + starts))
        started += starts
    return spans


def _is_continuation(value: int) -> bool:
    return value & 0xC0 == 0x80


def explain(vocabulary: Vocabulary, ids: list[int]) -> Explanation:
    """Implement `HybridTokenizer.explain_token`; several ids are those of a text that is not one token."""
    if len(ids) == 1:
        return _explain_id(vocabulary, ids[0])
    data = b"".join(token_bytes(vocabulary, ids))
    parts = tuple(_explain_id(vocabulary, id_) for id_ in ids)
    return Explanation(None, bytes_to_text(data), "text", data, parts)


def _explain_id(vocabulary: Vocabulary, id_: int) -> Explanation:
    kind = vocabulary.kind(id_)
    data = vocabulary.data[id_]
    parents = vocabulary.parents(id_)
    parts: tuple[Explanation, ...] = ()
    if parents is not None:
        parts = tuple(_explain_id(vocabulary, parent) for parent in parents)
    elif kind == "base" and vocabulary.portable:
        parts = tuple(_explain_id(vocabulary, part) for part in merge_bytes(data, vocabulary.merge_ids))
    elif kind in ("base", "char"):
        parts = tuple(_explain_byte(value) for value in data)
    return Explanation(id_, vocabulary.names[id_], kind, data, parts)


def _explain_byte(value: int) -> Explanation:
    name = chr(value) if value < 128 else byte_name(value)
    id_ = FIRST_BYTE + value
    kind = "byte"
    if value == ord(" "):
        id_ = SP
        kind = "sp"
    elif value == ord("\n"):
        id_ = NL
        kind = "nl"
    return Explanation(id_, name, kind, bytes([value]))


def top_merges(vocabulary: Vocabulary, n: int) -> Merges:
    """Implement `HybridTokenizer.top_merges`."""
    names = vocabulary.names
    first = vocabulary.first_merge
    pairs = (*vocabulary.merges, *vocabulary.phrases)
    counts = vocabulary.counts[first - vocabulary.first_entry :] or (0,) * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: (-counts[index], index))[: max(0, n)]
    result = Merges()
    for rank, index in enumerate(order):
        left, right = pairs[index]
        id_ = first + index
        result.append(Merge(rank, id_, names[id_], names[left], names[right], counts[index]))
    return result


def status(counts: PretokenCounts | None, vocabulary: Vocabulary | None, preview: int) -> Status:
    """Implement `HybridTokenizer.db_status`; either the counts or the vocabulary must be given."""
    preview = max(0, preview)
    if vocabulary is not None:
        return _vocabulary_status(vocabulary, preview)
    assert counts is not None
    common = sorted(counts.pretokens.items(), key=lambda item: (-item[1], item[0]))[:preview]
    return Status(
        frozen=False,
        characters=counts.characters,
        keys=len(counts.pretokens),
        undercount=counts.undercount,
        vocab_size=0,
        kinds={},
        preview=tuple(common),
    )


def _vocabulary_status(vocabulary: Vocabulary, preview: int) -> Status:
    first = vocabulary.first_entry
    kinds = [vocabulary.kind(id_) for id_ in range(vocabulary.size)]
    counts = vocabulary.counts or (0,) * (vocabulary.size - first)
    shown = range(first, min(vocabulary.size, first + preview))
    return Status(
        frozen=True,
        characters=0,
        keys=0,
        undercount=0,
        vocab_size=vocabulary.size,
        kinds=dict(Counter(kinds)),
        preview=tuple((vocabulary.names[id_], counts[id_ - first]) for id_ in shown),
        special=tuple(name for name, kind in zip(vocabulary.names, kinds, strict=True) if kind in ("special", "case")),
    )
