r"""Pre-tokenization of portable tokenizers: the pattern of Llama 3, which llama.cpp calls "llama-bpe".

    (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+

Letters (\p{L}), numbers (\p{N}) and white space (\s) are those of `character_tables`, not of the regular expression
engine: Python, Rust and C++ libraries have different versions of Unicode. `PATTERN` spells the tables out, so every
engine splits alike; saved files name it `PORTABLE_PATTERN`. llama.cpp has its own code for this pattern; its tables are
those of Unicode 15.1 as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from tokenizer.portable import character_tables


def _class_content(ranges: str, highest: int) -> str:
    """Return hexadecimal ranges as the content of a character class, in literal characters: all engines accept them."""
    parts = []
    for item in ranges.split():
        first, _, last = item.partition("-")
        if int(first, 16) <= highest:
            parts.append(chr(int(first, 16)) + (f"-{chr(int(last, 16))}" if last else ""))
    return "".join(parts)


def _pattern(highest: int = 0x10FFFF, end: str = "") -> str:
    """Return the pattern for texts whose characters are at most `highest`; `end` counts as the end of a text."""
    letters = _class_content(character_tables.LETTERS, highest)
    numbers = _class_content(character_tables.NUMBERS, highest)
    space = _class_content(character_tables.WHITE_SPACE, highest)
    return (
        r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"  # (?i:'s) would match 'ſ in some engines
        rf"|[^\r\n{letters}{numbers}{end}]?[{letters}]+|[{numbers}]{{1,3}}"
        rf"| ?[^{space}{letters}{numbers}{end}]+[\r\n]*"
        rf"|[{space}]*[\r\n]+|[{space}]+(?![^{space}{end}])|[{space}]+"
    )


PATTERN = _pattern()
"""The pattern in the syntax that Python's `re`, Oniguruma, Rust's regex crates and JavaScript have in common."""

END_OF_TEXT = "\0"
"""Separates the texts of `split_many`."""
find_unusual = re.compile("[\0\U00010000-\U0010ffff]").search
"""Find a character in a text that `split_many` does not take."""
_split_ascii = re.compile(_pattern(0x7F)).findall


@cache
def _split_up_to(highest: int, end: str = "") -> Callable[[str], list[str]]:
    return re.compile(_pattern(highest, end) + (f"|{end}" if end else "")).findall


def split_pretokens(text: str) -> list[str]:
    """Split a text into pre-tokens, whose concatenation is the text.

    Python's `re` compares a character with one range after another beyond U+FFFF: four times as fast without them.
    """
    if text.isascii():
        return _split_ascii(text)
    return _split_up_to(0xFFFF if max(text) <= "\uffff" else 0x10FFFF)(text)


def split_many(texts: Sequence[str]) -> list[str] | None:
    """Return the pre-tokens of texts, with `END_OF_TEXT` between those of two texts: faster than one by one.

    Returns:
        None if a text has a character that is `END_OF_TEXT` or above U+FFFF.
    """
    joined = END_OF_TEXT.join(texts)
    if joined.count(END_OF_TEXT) >= max(1, len(texts)):
        return None
    if joined.isascii():
        return _split_up_to(0x7F, END_OF_TEXT)(joined)
    if len(joined.encode("utf-16-le", "surrogatepass")) > 2 * len(joined):  # much faster than max(joined)
        return None
    return _split_up_to(0xFFFF, END_OF_TEXT)(joined)


_S = _class_content(character_tables.WHITE_SPACE, 0x10FFFF)

# A pre-token ends before a space that follows anything but white space, and after the last newline of a run of white
# space. The first alternative is the usual case: a word, perhaps indented, up to such a place. The second one takes
# everything up to the next one: tabs, carriage returns, rare kinds of white space, the end of a text.
_CHUNK = re.compile(
    rf" *[^{_S}]++(?:(?= )|\n++(?= *[^{_S}])|\Z)"
    rf"|(?:[{_S}]*[^{_S}]++(?! |[{_S}]*[\r\n]|\Z))*+[{_S}]*+[^{_S}]*+(?:[{_S}]*[\r\n])?"
)
split_chunks = _CHUNK.findall
"""Split a text into chunks, each of several pre-tokens: the pre-tokens of the chunks are those of the text. Faster.

The last one is empty.
"""
_COUNTED_CHARACTERS = 8 << 20
"""Characters whose pre-tokens are counted before they are added to the others; this part is held twice."""
_MAX_COUNTED = 48
"""Characters of the longest pre-token that is counted as one."""
_BLOCK_END = re.compile(rf"(?<=[^{_S}]) ")


def split_blocks(text: str, size: int, max_size: int = 0) -> Iterator[str]:
    """Yield consecutive blocks of a text, each ending where a pre-token ends.

    Args:
        text: Any text.
        size: Approximate number of characters of the first block.
        max_size: Blocks double in size until they reach this; 0 keeps the size constant.
    """
    start = 0
    while len(text) - start > size:
        boundary = _BLOCK_END.search(text, start + size)
        if boundary is None:
            break
        yield text[start : boundary.start()]
        start = boundary.start()
        if size < max_size:
            size *= 2
    yield text[start:] if start else text


def count_pretokens(text: str) -> Iterator[Counter[str]]:
    """Yield counts of the pre-tokens of parts of a text, for learning; long ones are counted in parts."""
    for block in split_blocks(text, _COUNTED_CHARACTERS):
        counts: Counter[str] = Counter()
        for chunk, count in Counter(split_chunks(block)).items():
            for pretoken in split_pretokens(chunk):
                counts[pretoken] += count
        for pretoken in [pretoken for pretoken in counts if len(pretoken) > _MAX_COUNTED]:
            count = counts.pop(pretoken)
            for start in range(0, len(pretoken), _MAX_COUNTED):
                counts[pretoken[start : start + _MAX_COUNTED]] += count
        yield counts
