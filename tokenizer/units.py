"""The reversible layer: text to keys, letters to their upper case, bytes to text.

A *key* is a block of spaces and newlines together with the word after it: ``"a new\\n\\n  line"`` has the keys
``"a"``, ``" new"``, ``"\\n\\n  line"``. Keys are encoded one by one and never influence each other, which is what
makes a memory of keys exact. Only space and newline cut keys: no Unicode table takes part, so that the
ids are the same in every version of Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_KEY = 32
"""Characters of the longest key that is encoded in one piece; longer ones are cut by `LONG_KEY_PART`."""

KEY = re.compile(r"[ \n]*[^ \n]+|[ \n]+")

# ASCII, Latin-1 and general punctuation, the stops of Hebrew, Arabic, Devanagari and CJK: where a long key may be cut.
PUNCTUATION = (
    r"!-/:-@\[-`{-\x7f\x00-\x09\x0b-\x1f\xa0-\xbf\u05be\u05c0\u05c3\u060c\u061b\u061f\u06d4\u0964\u0965"
    r"\u2000-\u206f\u3000-\u303f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
LONG_KEY_PART = re.compile(
    rf" ?[^ \n{PUNCTUATION}]{{1,24}}[{PUNCTUATION}]{{0,7}}|[ \n]{{1,32}}| ?[{PUNCTUATION}]{{1,31}}"
)


def cut_long_key(key: str) -> list[str]:
    """The parts, of at most `MAX_KEY` characters each, in which a key is encoded; their concatenation is the key."""
    if len(key) <= MAX_KEY:
        return [key]
    return LONG_KEY_PART.findall(key)


def iterate_keys(text: str) -> Iterator[str]:
    """The keys of a text in order, long ones cut: the reference for every faster way of cutting."""
    for key in KEY.findall(text):
        yield from cut_long_key(key)


def case_pairs(letters: set[str]) -> dict[str, str]:
    """{lower: upper} for the letters that have a one-character upper case which leads back to them.

    The pairs are stored with a frozen vocabulary, because the case tables differ between versions of Unicode.
    """
    pairs: dict[str, str] = {}
    for letter in sorted(letters):
        upper = letter.upper()
        if upper != letter and len(upper) == 1 and upper.lower() == letter:
            pairs[letter] = upper
    return pairs


def capitalised(text: str, pairs: dict[str, str]) -> str:
    """The text with its first character behind spaces and newlines in upper case: what ``<UP>`` means."""
    at = len(text) - len(text.lstrip(" \n"))
    return text[:at] + pairs.get(text[at : at + 1], text[at : at + 1]) + text[at + 1 :]


_SURROGATE = re.compile(rb"(\xed[\xa0-\xbf][\x80-\xbf])")
_UNFINISHED = re.compile(
    rb"(?:[\xc2-\xdf]|[\xe0\xed][\x80-\xbf]?|[\xe1-\xec\xee\xef][\x80-\xbf]?|\xf0[\x90-\xbf]?[\x80-\xbf]?"
    rb"|[\xf1-\xf3][\x80-\xbf]{0,2}|\xf4[\x80-\x8f]?[\x80-\xbf]?)\Z"
)


def bytes_to_text(data: bytes) -> str:
    """UTF-8 to text: lone surrogates are kept, and bytes that are no UTF-8 (a model can write any) become U+FFFD."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        parts = _SURROGATE.split(data)
    return "".join(
        part.decode("utf-8", "surrogatepass") if index % 2 else part.decode("utf-8", "replace")
        for index, part in enumerate(parts)
    )


def unfinished_tail(data: bytes) -> int:
    """How many bytes at the end, 0 to 3, may be the beginning of a character of which the rest is still to come."""
    match = _UNFINISHED.search(data, max(0, len(data) - 3))
    return len(data) - match.start() if match else 0


def text_to_bytes(text: str) -> bytes:
    """UTF-8, with lone surrogates in their three-byte form."""
    return text.encode("utf-8", "surrogatepass")
