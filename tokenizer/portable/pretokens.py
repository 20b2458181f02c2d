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
from collections.abc import Callable, Iterator
from functools import cache

from tokenizer.encoding.pretokenization import cut_blocks
from tokenizer.portable import character_tables


def _class_content(ranges: str, highest: int) -> str:
    """Return hexadecimal ranges as the content of a character class, in literal characters: all engines accept them."""
    parts = []
    for item in ranges.split():
        first, _, last = item.partition("-")
        if int(first, 16) <= highest:
            parts.append(chr(int(first, 16)) + (f"-{chr(int(last, 16))}" if last else ""))
    return "".join(parts)


def _pattern(highest: int = 0x10FFFF) -> str:
    """Return the pattern for texts whose characters are at most `highest`."""
    letters = _class_content(character_tables.LETTERS, highest)
    numbers = _class_content(character_tables.NUMBERS, highest)
    space = _class_content(character_tables.WHITE_SPACE, highest)
    return (
        r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"  # (?i:'s) would match 'ſ in some engines
        rf"|[^\r\n{letters}{numbers}]?[{letters}]+|[{numbers}]{{1,3}}"
        rf"| ?[^{space}{letters}{numbers}]+[\r\n]*"
        rf"|[{space}]*[\r\n]+|[{space}]+(?![^{space}])|[{space}]+"
    )


PATTERN = _pattern()
"""The pattern in the syntax that Python's `re`, Oniguruma, Rust's regex crates and JavaScript have in common."""

_split_ascii = re.compile(_pattern(0x7F)).findall


@cache
def _split_up_to(highest: int) -> Callable[[str], list[str]]:
    return re.compile(_pattern(highest)).findall


def split_pretokens(text: str) -> list[str]:
    """Split a text into pre-tokens, whose concatenation is the text.

    Python's `re` compares a character with one range after another beyond U+FFFF: four times as fast without them.
    """
    if text.isascii():
        return _split_ascii(text)
    return _split_up_to(0xFFFF if max(text) <= "\uffff" else 0x10FFFF)(text)


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
# Learning divides texts here. It may forget rare pre-tokens between blocks: other blocks would give other vocabularies.
_COUNTED_END = re.compile(rf"(?<=[^{_S}]) ")


@cache
def _block_end() -> re.Pattern[str]:
    r"""Return a pattern that matches where a pre-token starts, whatever else the text has before and after.

    1. No pre-token has a space after anything but white space: only `\s*`, `\s+` and the first character take spaces.
    2. None has anything but letters and numbers after a letter or number: `\p{L}+`, `\p{N}{1,3}` and contractions end
       pre-tokens.
    3. None has anything but white space after a newline: `[\r\n]*` and `[\r\n]+` end pre-tokens.

    The text before such a place is split alike if it ends there: only `\s+(?!\S)` depends on what follows a pre-token,
    and it ends before the last white space that is not a newline, which is before the place.
    """
    words = "".join(_class_content(ranges, 0x10FFFF) for ranges in (character_tables.LETTERS, character_tables.NUMBERS))
    return re.compile(rf"(?<=[^{_S}]) |(?<=[{words}])[^{words}]|(?<=[\r\n])[^{_S}]")


def blocks_to_encode(text: str, size: int) -> Iterator[str]:
    """Return consecutive blocks of a text, each ending where a pre-token ends.

    Args:
        text: Any text.
        size: Approximate number of characters of a block, exceeded in words, numbers and runs of other characters that
            are longer.
    """
    if len(text) <= size:  # the pattern takes 7 ms to compile
        return iter((text,))
    return cut_blocks(text, size, _block_end())


def count_pretokens(text: str) -> Iterator[Counter[str]]:
    """Yield counts of the pre-tokens of parts of a text, for learning; long ones are counted in parts."""
    for block in cut_blocks(text, _COUNTED_CHARACTERS, _COUNTED_END):
        counts: Counter[str] = Counter()
        for chunk, count in Counter(split_chunks(block)).items():
            for pretoken in split_pretokens(chunk):
                counts[pretoken] += count
        for pretoken in [pretoken for pretoken in counts if len(pretoken) > _MAX_COUNTED]:
            count = counts.pop(pretoken)
            for start in range(0, len(pretoken), _MAX_COUNTED):
                counts[pretoken[start : start + _MAX_COUNTED]] += count
        yield counts
