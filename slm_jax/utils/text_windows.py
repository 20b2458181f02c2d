"""Hashes of all windows of a text, for finding common passages in linear time.

Polynomial hashes modulo 2**64 of the code points (Karp and Rabin, "Efficient randomized pattern-matching algorithms",
1987), computed for all windows at once from prefix sums. Equal windows have equal hashes; where
an error matters, the caller compares the windows of equal hashes.
"""

import re
from functools import lru_cache

import numpy as np

# White space of `str.split`: in ASCII, as a table for `bytes.translate`; and the rest, in UTF-8.
_SPACES_TO_BLANKS = bytes(32 if value < 128 and chr(value).isspace() else value for value in range(256))
_find_other_space = re.compile(
    rb"[\xc2\xe1-\xe3](?:(?<=\xc2)[\x85\xa0]|(?<=\xe1)\x9a\x80|(?<=\xe2)(?:\x80[\x80-\x8a\xa8\xa9\xaf]|\x81\x9f)"
    rb"|(?<=\xe3)\x80\x80)"
).search

_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses


def normalize_space(text: str) -> str:
    """Return a text with each run of white space replaced by one space, and none at its ends."""
    return " ".join(text.split())


def normalized_bytes(text: str) -> bytes:
    """Return `normalize_space` of a text in UTF-8, with lone surrogates; in less than half of the time."""
    data = text.encode("utf-8", "surrogatepass")
    if len(data) > len(text) and _find_other_space(data):
        return normalize_space(text).encode("utf-8", "surrogatepass")
    values = np.frombuffer(data.translate(_SPACES_TO_BLANKS), np.uint8)
    is_kept = values != ord(" ")
    is_kept[1:] |= is_kept[:-1].copy()  # the first blank after anything else
    return values[is_kept].tobytes().strip(b" ")


def code_points(text: str) -> np.ndarray:
    """Return the code points of a text, uint32 [N]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def window_hashes(points: np.ndarray, size: int) -> np.ndarray:
    """Return the hash of each window of a text.

    Args:
        points: Code points, uint32 [N].
        size: Characters in a window.

    Returns:
        uint64 [max(N - size + 1, 0)]: entry i is the hash of the characters i..i+size-1.
    """
    count = points.size - size + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    powers, inverses = _powers(1 << max(points.size - 1, 1).bit_length())
    sums = np.zeros(points.size + 1, np.uint64)
    np.cumsum(_mix(points.astype(np.uint64)) * powers[: points.size], out=sums[1:])
    return _mix((sums[size:] - sums[:count]) * inverses[:count])


def _mix(values: np.ndarray) -> np.ndarray:
    """Return a permutation of 64-bit numbers that spreads each bit (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the powers of the base and of its inverse modulo 2**64, uint64 [count] each."""
    bases = np.full((2, count), [[_BASE], [pow(_BASE, -1, 2**64)]], np.uint64)
    bases[:, 0] = 1
    powers = np.cumprod(bases, axis=1, dtype=np.uint64)
    return powers[0], powers[1]
