"""Garbage collections at chosen moments."""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def collecting_garbage_on_request() -> Iterator[Callable[[], object]]:
    """Suspend automatic garbage collections, which interrupt a program at any time; restore the setting afterward.

    Yields:
        A function that collects garbage among the objects made since its last call, which takes milliseconds; all
        objects of JAX and Flax take a tenth of a second. What is in no reference cycle is freed at once in any case.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield functools.partial(gc.collect, 1)
    finally:
        if enabled:
            gc.enable()
