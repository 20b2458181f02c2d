r"""Find where the pre-tokens of `tokenizer.portable.pretokens.PATTERN` start, with NumPy.

Whether a pre-token starts at a character depends, with few exceptions, on the classes of that character and the one
before it. Everything but digits and long white space is decided by looking pairs of classes up; the exceptions are
corrected afterwards:

- A letter after punctuation (anything that is no letter, number or white space) belongs to it if a pre-token starts at
  the punctuation: ``[^\r\n\p{L}\p{N}]?\p{L}+``.
- A contraction starts a new pre-token after it: ``(?i:'s|'t|'re|'ve|'m|'ll|'d)``.
- White space before anything else but a number or the end of the text belongs to what follows: ``\s+(?!\S)``.
- After the last newline of a run of white space: ``\s*[\r\n]+``. Newlines after punctuation belong to it:
  ``[^\s\p{L}\p{N}]+[\r\n]*``.
- After every third number: ``\p{N}{1,3}``.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tokenizer.encoding.bulk import Block
from tokenizer.portable import character_tables

_PUNCTUATION, _APOSTROPHE, _LETTER, _NUMBER, _SPACE, _BLANK, _NEWLINE, _END = range(8)
"""Classes: apostrophes are punctuation; `_BLANK` is U+0020; `_SPACE` is other white space without newlines."""
_ANY_PUNCTUATION = (_PUNCTUATION, _APOSTROPHE)
_ANY_SPACE = (_SPACE, _BLANK, _NEWLINE)

_STARTS = 1
_LETTER_AFTER_PUNCTUATION = 2
_LETTER_AFTER_APOSTROPHE = 4
_AFTER_SPACE = 8
"""After white space that is no newline: anything else."""
_SPACE_AFTER_NEWLINE = 16
_NUMBER_AFTER_NUMBER = 32


def _rule(before: int, current: int) -> int:
    """Return what is known from the classes of a character and the one before it."""
    if _END in (before, current):
        return _STARTS
    rule = 0
    if before in (_SPACE, _BLANK) and current not in _ANY_SPACE:
        rule |= _AFTER_SPACE
    if current == _LETTER:
        if before in _ANY_PUNCTUATION:
            rule |= _LETTER_AFTER_PUNCTUATION
        if before == _APOSTROPHE:
            rule |= _LETTER_AFTER_APOSTROPHE
        return rule | _STARTS * (before in (_NUMBER, _NEWLINE))
    if current == _NUMBER:
        return rule | (_NUMBER_AFTER_NUMBER if before == _NUMBER else _STARTS)
    if current in _ANY_PUNCTUATION:
        return rule | _STARTS * (before not in (*_ANY_PUNCTUATION, _BLANK))
    if before in _ANY_SPACE:
        return _SPACE_AFTER_NEWLINE if before == _NEWLINE != current else 0
    return _STARTS * (not (current == _NEWLINE and before in _ANY_PUNCTUATION))


_RULES = bytes(_rule(pair >> 3, pair & 7) if pair < 64 else 0 for pair in range(256))


@cache
def _classes() -> np.ndarray:
    """The class of each character, uint8 [0x110000]."""
    classes = np.full(0x110000, _PUNCTUATION, dtype=np.uint8)
    tables = {
        _LETTER: character_tables.LETTERS,
        _NUMBER: character_tables.NUMBERS,
        _SPACE: character_tables.WHITE_SPACE,
    }
    for class_, ranges in tables.items():
        for item in ranges.split():
            first, _, last = item.partition("-")
            classes[int(first, 16) : int(last or first, 16) + 1] = class_
    for characters, class_ in (("'", _APOSTROPHE), (" ", _BLANK), ("\r\n", _NEWLINE)):
        classes[[ord(character) for character in characters]] = class_
    return classes


@cache
def _ascii_classes() -> bytes:
    return _classes()[:256].tobytes()


def find_starts(block: Block) -> np.ndarray:
    """Return whether a pre-token starts at each character, bool [T]; also at the ends of texts."""
    codes = block.codes
    if codes.dtype == np.uint8:
        classes = np.frombuffer(bytearray(codes.tobytes().translate(_ascii_classes())), dtype=np.uint8)
    else:
        classes = _classes().take(codes)
    classes[block.ends] = _END
    pairs = classes.copy()
    pairs[1:] |= classes[:-1] << 3
    pairs[0] |= _END << 3
    rules = np.frombuffer(pairs.tobytes().translate(_RULES), dtype=np.uint8)
    starts = (rules & _STARTS).view(bool)
    starts[1:] |= (rules[1:] & _LETTER_AFTER_PUNCTUATION).astype(bool) & ~starts[:-1]
    starts[:-1] |= (rules[1:] & _AFTER_SPACE).astype(bool)
    _split_contractions(starts, codes, np.flatnonzero(rules & _LETTER_AFTER_APOSTROPHE))
    _split_numbers(starts, np.flatnonzero(rules & _NUMBER_AFTER_NUMBER))
    _split_after_newlines(starts, classes, np.flatnonzero(rules & _SPACE_AFTER_NEWLINE))
    return starts


def _split_contractions(starts: np.ndarray, codes: np.ndarray, letters: np.ndarray) -> None:
    """Start a pre-token after each contraction; `letters` are the positions of letters after apostrophes."""
    letters = letters[starts[letters - 1]]
    if not len(letters):
        return
    # 0x20 makes ASCII letters lower case, and no other character an ASCII letter. A text's end follows the last letter.
    first = codes[letters] | 0x20
    second = codes[letters + 1] | 0x20
    short = np.zeros(len(letters), dtype=bool)
    for letter in "stmd":
        short |= first == ord(letter)
    long = np.zeros(len(letters), dtype=bool)
    for ending in ("re", "ve", "ll"):
        long |= (first == ord(ending[0])) & (second == ord(ending[1]))
    starts[letters[short] + 1] = True
    starts[letters[long] + 2] = True


def _split_numbers(starts: np.ndarray, numbers: np.ndarray) -> None:
    """Start a pre-token at every third number; `numbers` are the positions of numbers after numbers."""
    index = np.arange(len(numbers))
    is_second = np.diff(numbers, prepend=-2) != 1
    before = np.maximum.accumulate(np.where(is_second, index, 0))
    starts[numbers[(index - before) % 3 == 2]] = True


def _split_after_newlines(starts: np.ndarray, classes: np.ndarray, spaces: np.ndarray) -> None:
    """Start a pre-token after the last newline of a run of white space; `spaces` are the positions after newlines.

    Newlines after punctuation do not count as part of the run: there, a pre-token starts after the first ones as well.
    """
    if not len(spaces):
        return
    newlines = np.flatnonzero(classes == _NEWLINE)
    others = np.flatnonzero((classes < _SPACE) | (classes == _END))
    following = np.append(newlines, len(classes))[np.searchsorted(newlines, spaces)]
    run_ends = others[np.searchsorted(others, spaces)]
    index = np.arange(len(newlines))
    begins = np.diff(newlines, prepend=-2) != 1
    first = newlines[np.maximum.accumulate(np.where(begins, index, 0))]  # of the newlines next to each other
    first_before = first[np.searchsorted(newlines, spaces) - 1]
    after_punctuation = (first_before > 0) & (classes[first_before - 1] <= _APOSTROPHE)
    starts[spaces[(following > run_ends) | after_punctuation]] = True
