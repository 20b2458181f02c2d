r"""Pre-tokenization: split text into pre-tokens, which are encoded independently of each other.

A *pre-token* is a run of spaces and newlines together with the word after it: ``"a new\n\n  line"`` consists of
``"a"``, ``" new"`` and ``"\n\n  line"``. Because no pre-token influences another one, caching their ids is exact. Only
space and newline separate pre-tokens; no Unicode table is involved, so the ids are the same in every Python version.

`iterate_pretokens` is the definition. `split_plain` and `split_any` are the fast ways to the same result; they give
pre-tokens in *short form*, which drops a single leading space: ``"word"`` stands for ``" word"``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_PRETOKEN = 32
"""Characters of the longest pre-token that is encoded as one; `split_long_pretoken` splits longer ones."""

PRETOKEN = re.compile(r"[ \n]*[^ \n]+|[ \n]+")

# ASCII, Latin-1 and general punctuation, and the full stops of Hebrew, Arabic, Devanagari and CJK: positions where a
# long pre-token may be split.
PUNCTUATION = (
    r"!-/:-@\[-`{-\x7f\x00-\x09\x0b-\x1f\xa0-\xbf\u05be\u05c0\u05c3\u060c\u061b\u061f\u06d4\u0964\u0965"
    r"\u2000-\u206f\u3000-\u303f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_LONG_PRETOKEN_PART = re.compile(
    rf" ?[^ \n{PUNCTUATION}]{{1,24}}[{PUNCTUATION}]{{0,7}}|[ \n]{{1,32}}| ?[{PUNCTUATION}]{{1,31}}"
)
_FIRST_WORD = re.compile(r"[^ \n]+")
_BOUNDARY = re.compile(r"(?<=[^ \n])[ \n]")
# Also in a long pre-token after punctuation and before anything else: there, a part of it always ends. What remains on
# either side is long as well, and hence split into the same parts.
_PART_BOUNDARY = re.compile(
    r"(?<=[^ \n])[ \n]"
    rf"|(?<=[{PUNCTUATION}])(?<=[^ \n]{{{MAX_PRETOKEN + 1}}})[^ \n{PUNCTUATION}](?=[^ \n]{{{MAX_PRETOKEN}}})"
)
# A pre-token without its single leading space; any other white space stays in front of it.
_SHORT_FORMS = re.compile(r"(?: (?=[^ \n]))?([ \n]*[^ \n]+|[ \n]+)")

SEPARATORS = frozenset((" ", "\n"))
UNSPLIT_RUNS = frozenset(("", "\n", "\n\n"))
"""Results of `split_plain` that show that the text has runs of white space, for which only `split_any` is right."""


def iterate_pretokens(text: str) -> Iterator[str]:
    """Yield the pre-tokens of a text in order, long ones split: the reference for the faster functions."""
    for pretoken in PRETOKEN.findall(text):
        yield from split_long_pretoken(pretoken)


def split_long_pretoken(pretoken: str) -> list[str]:
    """Split a pre-token into parts of at most `MAX_PRETOKEN` characters, which are encoded independently."""
    if len(pretoken) <= MAX_PRETOKEN:
        return [pretoken]
    return _LONG_PRETOKEN_PART.findall(pretoken)


def split_blocks(text: str, size: int) -> Iterator[str]:
    """Return consecutive blocks of a text, each ending where a pre-token ends.

    Args:
        text: Any text.
        size: Approximate number of characters of a block.
    """
    return cut_blocks(text, size, _BOUNDARY)


def blocks_to_encode(text: str, size: int) -> Iterator[str]:
    """Return blocks as `split_blocks` does, each ending where a pre-token or a part of a long one ends.

    They are of bounded size in texts without spaces too, unless these are without punctuation.

    Args:
        text: Any text.
        size: Approximate number of characters of a block, more than `MAX_PRETOKEN`.
    """
    return cut_blocks(text, size, _PART_BOUNDARY)


def cut_blocks(text: str, size: int, boundary: re.Pattern[str]) -> Iterator[str]:
    """Yield consecutive blocks of a text, each ending before a match of a pattern, after at least `size` characters."""
    start = 0
    while len(text) - start > size:
        match = boundary.search(text, start + size)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:] if start else text


def split_first_word(text: str) -> tuple[str, str]:
    """Return (the word at the very start of a text, the rest), where the rest is empty or starts with white space."""
    match = _FIRST_WORD.match(text)
    if match is None:
        return "", text
    return match.group(), text[match.end() :]


def split_plain(text: str) -> list[str]:
    """Split a text that starts with white space into pre-tokens in short form, by `str.split`.

    The result is right only if no two spaces are adjacent, no space is next to a newline, and no more than two newlines
    are adjacent; otherwise it contains one of `UNSPLIT_RUNS`.
    """
    text = text.replace("\n", " \n")
    if "\n \n" in text:
        text = text.replace("\n \n", "\n\n")
    pretokens = text.split(" ")
    del pretokens[0]
    return pretokens


def split_any(text: str) -> list[str]:
    """Split any text that starts with white space into pre-tokens in short form."""
    return _SHORT_FORMS.findall(text)


def expand(short: str) -> str:
    """Return the text of a pre-token given in short form."""
    return short if short[:1] in SEPARATORS else " " + short
