"""Attributes that are made on first use, once, also by several threads at a time."""

from __future__ import annotations

import os
from functools import cached_property
from threading import RLock
from typing import TYPE_CHECKING, TypeVar

_T_co = TypeVar("_T_co", covariant=True)
# One lock for all, which its thread may take again, because making one attribute may make others. What runs under it
# takes no lock of the tokenizer, so threads that hold such a one may wait for it.
_LOCK = RLock()
if hasattr(os, "register_at_fork"):  # a thread that holds the lock does not exist in a forked child
    os.register_at_fork(after_in_child=_LOCK._at_fork_reinit)  # type: ignore[attr-defined]


class made_once(cached_property[_T_co]):  # noqa: N801  # a decorator, named like the one that it extends
    """A `cached_property` of objects that threads share: one thread makes the value while the others wait for it.

    Python's own has no lock from 3.12 on. A value that exists is read without the lock.
    """

    if not TYPE_CHECKING:  # its types are those of `cached_property`

        def __get__(self, instance, owner=None):
            with _LOCK:
                return super().__get__(instance, owner)
