"""The hash table over 64-bit keys equals a dict."""

import random

import numpy as np
import pytest

from tokenizer.encoding.key_table import KeyTable

_INVERSE = pow(0x9E3779B97F4A7C15, -1, 2**64)


def _keys(kind: str, source: random.Random) -> list[int]:
    """Return distinct keys that are random, small, or all of one slot, the last one of the table."""
    if kind == "random":
        return list({source.getrandbits(64) for _ in range(3000)})
    if kind == "small":
        return list(range(3000))
    return [(2**64 - 1 - product) * _INVERSE % 2**64 for product in range(300)]


@pytest.mark.parametrize("dtype", [np.int32, np.uint64])
@pytest.mark.parametrize("kind", ["random", "small", "one slot"])
def test_key_table_is_a_dict(kind, dtype):
    source = random.Random(3)
    keys = _keys(kind, source)
    known = dict(zip(keys[::2], source.choices(range(2**31), k=len(keys) // 2), strict=True))
    table = KeyTable(np.array(list(known), dtype=np.uint64), np.array(list(known.values()), dtype=dtype), missing=7)
    sought = [*keys, 0, 2**64 - 2]
    found = table.find(np.array([*sought, 2**64 - 1], dtype=np.uint64))  # the last one marks empty slots
    assert found.dtype == dtype
    assert found.tolist() == [known.get(key, 7) for key in sought] + [7]
    indices, values = table.find_known(np.array(sought, dtype=np.uint64))
    assert values.dtype == dtype
    assert indices.tolist() == [index for index, key in enumerate(sought) if key in known]
    assert values.tolist() == [known[key] for key in sought if key in known]


def test_key_table_without_keys():
    table = KeyTable(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int32), missing=-1)
    assert table.find(np.arange(5, dtype=np.uint64)).tolist() == [-1] * 5
    assert not len(table.find(np.empty(0, dtype=np.uint64)))
