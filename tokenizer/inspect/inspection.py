"""The answers behind `segment`, `offsets`, `explain_token`, `top_merges` and `db_status`."""

from __future__ import annotations

from collections import Counter

from tokenizer.decoding.decoder import Decoder
from tokenizer.inspect.reports import Explanation, Merge, Merges, Segment, Segments, Status
from tokenizer.learning.counting import KeyCounts
from tokenizer.units import bytes_to_text
from tokenizer.vocabulary import FIRST_BYTE, NL, SP, Vocabulary, byte_name


def pieces(vocabulary: Vocabulary, ids: list[int]) -> list[bytes]:
    """The bytes of each id in its place: behind a case mark they are in that case."""
    decoder = Decoder(vocabulary)
    marks = (vocabulary.up, vocabulary.caps) if vocabulary.lowercase else ()
    found, mark = [], -1
    for id_ in ids:
        found.append(decoder.table[id_] if mark < 0 else vocabulary.marked_data(id_, mark))
        mark = id_ if id_ in marks else -1
    return found


def segment(vocabulary: Vocabulary, ids: list[int]) -> Segments:
    """See HybridTokenizer.segment."""
    return Segments(
        Segment(_printable(data), vocabulary.kind(id_), id_)
        for id_, data in zip(ids, pieces(vocabulary, ids), strict=True)
    )


def _printable(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(map(byte_name, data))


def offsets(vocabulary: Vocabulary, ids: list[int]) -> list[tuple[int, int]]:
    """See HybridTokenizer.offsets. A character begins at each byte that is no UTF-8 continuation byte."""
    spans = []
    begun = 0
    for data in pieces(vocabulary, ids):
        starts = sum(1 for value in data if value & 0xC0 != 0x80)
        continues = bool(data) and data[0] & 0xC0 == 0x80
        spans.append((begun - continues, begun + starts))
        begun += starts
    return spans


def explain(vocabulary: Vocabulary, ids: list[int]) -> Explanation:
    """See HybridTokenizer.explain_token; several ids are the explanation of a text that is no token."""
    if len(ids) == 1:
        return _explain(vocabulary, ids[0])
    data = b"".join(pieces(vocabulary, ids))
    return Explanation(None, bytes_to_text(data), "text", data, tuple(_explain(vocabulary, id_) for id_ in ids))


def _explain(vocabulary: Vocabulary, id_: int) -> Explanation:
    kind, name, data = vocabulary.kind(id_), vocabulary.names[id_], vocabulary.data[id_]
    parents = vocabulary.parents(id_)
    if parents is not None:
        parts = tuple(_explain(vocabulary, parent) for parent in parents)
    elif kind in ("base", "char"):
        parts = tuple(_explain_byte(value) for value in data)
    else:
        parts = ()
    return Explanation(id_, name, kind, data, parts)


def _explain_byte(value: int) -> Explanation:
    id_ = {32: SP, 10: NL}.get(value, FIRST_BYTE + value)
    kind = {SP: "sp", NL: "nl"}.get(id_, "byte")
    return Explanation(id_, chr(value) if value < 128 else byte_name(value), kind, bytes([value]))


def top_merges(vocabulary: Vocabulary, n: int) -> Merges:
    """See HybridTokenizer.top_merges."""
    names, first = vocabulary.names, vocabulary.first_merge
    pairs = (*vocabulary.merges, *vocabulary.phrases)
    counts = vocabulary.counts[first - vocabulary.first_entry :] or (0,) * len(pairs)
    order = sorted(range(len(pairs)), key=lambda place: (-counts[place], place))[: max(0, n)]
    found = Merges()
    for rank, place in enumerate(order):
        left, right = pairs[place]
        found.append(Merge(rank, first + place, names[first + place], names[left], names[right], counts[place]))
    return found


def status(counts: KeyCounts | None, vocabulary: Vocabulary | None, preview: int) -> Status:
    """See HybridTokenizer.db_status."""
    if vocabulary is not None:
        kinds = Counter(vocabulary.kind(id_) for id_ in range(vocabulary.size))
        learned = range(vocabulary.first_entry, min(vocabulary.size, vocabulary.first_entry + max(0, preview)))
        known = vocabulary.counts or (0,) * (vocabulary.size - vocabulary.first_entry)
        shown = tuple((vocabulary.names[id_], known[id_ - vocabulary.first_entry]) for id_ in learned)
        special = tuple(
            name for id_, name in enumerate(vocabulary.names) if vocabulary.kind(id_) in ("special", "case")
        )
        return Status(True, 0, 0, 0, vocabulary.size, dict(kinds), shown, special)
    assert counts is not None
    common = sorted(counts.keys.items(), key=lambda item: (-item[1], item[0]))[: max(0, preview)]
    return Status(False, counts.characters, len(counts.keys), counts.undercount, 0, {}, tuple(common))
