"""UTF-8 with lone surrogates, and pairs of lower-case and upper-case letters."""

from __future__ import annotations

import re

_SURROGATE = re.compile(rb"(\xed[\xa0-\xbf][\x80-\xbf])")
_INCOMPLETE = re.compile(
    rb"(?:[\xc2-\xdf]|[\xe0\xed][\x80-\xbf]?|[\xe1-\xec\xee\xef][\x80-\xbf]?|\xf0[\x90-\xbf]?[\x80-\xbf]?"
    rb"|[\xf1-\xf3][\x80-\xbf]{0,2}|\xf4[\x80-\x8f]?[\x80-\xbf]?)\Z"
)


def text_to_bytes(text: str) -> bytes:
    """Encode text as UTF-8; lone surrogates take their three-byte form."""
    return text.encode("utf-8", "surrogatepass")


def bytes_to_text(data: bytes) -> str:
    """Decode UTF-8. Lone surrogates are kept; invalid bytes, which a model can generate, become U+FFFD."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        parts = _SURROGATE.split(data)
    return "".join(
        part.decode("utf-8", "surrogatepass") if index % 2 else part.decode("utf-8", "replace")
        for index, part in enumerate(parts)
    )


def incomplete_tail_length(data: bytes) -> int:
    """Return the number of bytes (0 to 3) at the end that may start a character whose other bytes are missing."""
    match = _INCOMPLETE.search(data, max(0, len(data) - 3))
    return len(data) - match.start() if match else 0


def find_case_pairs(letters: set[str]) -> dict[str, str]:
    """Return {lower: upper} for the letters with a one-character upper case that maps back to them.

    The pairs are saved with a vocabulary, because case tables differ between versions of Unicode.
    """
    pairs: dict[str, str] = {}
    for letter in sorted(letters):
        upper = letter.upper()
        if upper != letter and len(upper) == 1 and upper.lower() == letter:
            pairs[letter] = upper
    return pairs


def capitalize(text: str, pairs: dict[str, str]) -> str:
    """Return the text with the first character after its spaces and newlines in upper case: the effect of ``<UP>``."""
    start = len(text) - len(text.lstrip(" \n"))
    first = text[start : start + 1]
    return text[:start] + pairs.get(first, first) + text[start + 1 :]
