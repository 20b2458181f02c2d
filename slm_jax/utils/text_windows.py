"""Hashes of all windows of a text, for finding common passages in linear time.

Polynomial hashes modulo 2**64 of the code points (Karp and Rabin, "Efficient randomized pattern-matching algorithms",
1987), computed for all windows at once from prefix sums. Equal windows have equal hashes; where
an error matters, the caller compares the windows of equal hashes.
"""

import hashlib
from functools import lru_cache

import numpy as np

# White space of `str.split`: in ASCII, as a table for `bytes.translate`; and of two and three bytes in UTF-8.
_SPACES_TO_BLANKS = bytes(32 if value < 128 and chr(value).isspace() else value for value in range(256))
_SPACES_OF_TWO_BYTES = ("\x85".encode(), "\xa0".encode())
_IS_SPACE = np.array([chr(code).isspace() for code in range(0x4000)])  # no white space has a higher code

_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses


def normalize_space(text: str) -> str:
    """Return a text with each run of white space replaced by one space, and none at its ends."""
    return " ".join(text.split())


def normalized_bytes(text: str) -> bytes:
    """Return `normalize_space` of a text in UTF-8, with lone surrogates; in less than half of the time."""
    data = text.encode("utf-8", "surrogatepass")
    values = np.frombuffer(data.translate(_SPACES_TO_BLANKS), np.uint8)
    if len(data) > len(text) and _has_other_space(data, values):
        return normalize_space(text).encode("utf-8", "surrogatepass")
    is_kept = values != ord(" ")
    is_kept[1:] |= is_kept[:-1].copy()  # the first blank after anything else
    return values[is_kept].tobytes().strip(b" ")


def _has_other_space(data: bytes, values: np.ndarray) -> bool:
    """Return whether text in UTF-8 (bytes, and uint8 [N]) has white space that is not ASCII."""
    if any(space in data for space in _SPACES_OF_TWO_BYTES):
        return True
    leads = np.flatnonzero(values - np.uint8(0xE1) < 3)  # 0xE1 to 0xE3, of the characters from U+1000 to U+3FFF
    if not leads.size:
        return False
    lead, second, third = (values.take(leads + index).astype(np.int32) for index in range(3))
    return bool(_IS_SPACE.take((lead & 0xF) << 12 | (second & 0x3F) << 6 | third & 0x3F).any())


def text_digest(text: str) -> int:
    """Return the first 8 bytes of the SHA-256 of a text, in which runs of white space count as one space."""
    return int.from_bytes(hashlib.sha256(normalized_bytes(text)).digest()[:8], "big")


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
