"""Garbage collections at chosen moments."""

import gc
import weakref

import pytest

from slm_jax.utils.garbage import collecting_garbage_on_request


class _Node:
    """An object that can be a part of a reference cycle."""

    def __init__(self):
        self.itself = self


def test_garbage_is_collected_on_request_only():
    gc.collect()
    with collecting_garbage_on_request() as collect:
        reference = weakref.ref(_Node())
        kept = [[] for _ in range(100_000)]  # more than enough objects for automatic collections of all generations
        assert len(kept) == 100_000
        assert reference() is not None
        collect()
        assert reference() is None
        node = _Node()  # alive at a collection, dropped after it
        reference = weakref.ref(node)
        collect()
        assert reference() is node
        del node
        collect()
        assert reference() is None
    assert gc.isenabled()
    assert not gc.get_freeze_count()
    with pytest.raises(KeyError), collecting_garbage_on_request():
        raise KeyError
    assert gc.isenabled()
