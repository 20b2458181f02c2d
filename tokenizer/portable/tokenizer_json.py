"""A portable vocabulary as ``tokenizer.json``, the format of the package `tokenizers`, which many programs read."""

from __future__ import annotations

from typing import Any

from tokenizer.portable.pretokens import PATTERN
from tokenizer.vocabulary import SPECIAL_TOKENS, Vocabulary

_START = "<EOS>"


def byte_letters() -> list[str]:
    """Return the letter for each byte in the byte-level alphabet of GPT-2, [256].

    Printable bytes stand for themselves, the others for characters from U+0100 on: a space is "Ġ".
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(value if value in printable else next(others)) for value in range(256)]


def token_names(vocabulary: Vocabulary) -> list[str]:
    """Return the name of each id in a ``tokenizer.json``, [V]: its bytes as letters, or the name of a special token."""
    letters = byte_letters()
    names = ["".join([letters[value] for value in data]) for data in vocabulary.data]
    for id_ in vocabulary.special_ids:
        names[id_] = vocabulary.names[id_]
    return names


def merge_names(vocabulary: Vocabulary) -> list[list[str]]:
    """Return the names of both parts of each merge, by rank."""
    names = token_names(vocabulary)
    return [[names[left], names[right]] for left, right in vocabulary.merges]


def to_tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json`` that gives the ids of `tokenizer.portable.reference`.

    Special tokens are entries that no pre-token equals (their names join letters and punctuation), and not
    "added_tokens", which would be searched for in every text. A text starts with ``<EOS>``, as documents do in
    training, unless special tokens are turned off.
    """
    start = {"SpecialToken": {"id": _START, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, start, second],
            "special_tokens": {_START: {"id": _START, "ids": [SPECIAL_TOKENS.index(_START)], "tokens": [_START]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: id_ for id_, name in enumerate(token_names(vocabulary))},
            "merges": merge_names(vocabulary),
        },
    }
