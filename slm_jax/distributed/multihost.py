"""The processes of a run: their number, the number of this one, and a common stop.

Every process runs the same command and holds its own devices; JAX's distributed runtime joins them into one mesh
(`lifecycle`). The first process decides, prepares and writes (`agreement`); all see the same file system. JAX is
imported only where there are several processes.
"""

import itertools
import sys
from typing import Any

_stop_calls = itertools.count()


def process_count() -> int:
    """Return the number of processes of this run."""
    return _state().num_processes if "jax" in sys.modules else 1


def process_index() -> int:
    """Return the number of this process, from 0."""
    return _state().process_id if "jax" in sys.modules else 0


def is_first() -> bool:
    """Return whether this process is the first one, which decides and writes."""
    return process_index() == 0


def part() -> tuple[int, int]:
    """Return the part of work that this process takes where they share it: (index, number of parts)."""
    return process_index(), process_count()


def log_prefix() -> str:
    """Return the text before each warning of this process: empty for the first one, which logs progress as well."""
    return "" if is_first() else f"process {process_index()}: "


def _state() -> Any:
    """Return the state of `jax.distributed`, which knows the processes before any device is opened."""
    from jax._src import distributed

    return distributed.global_state


def stop_requested() -> bool:
    """Return whether a process has received SIGTERM; becomes true with the same call in all processes."""
    from jax.experimental import multihost_utils

    # Not the training step, which begins again with each stage of a curriculum: the call at which all stop is the one
    # after the highest number that any of them has reached.
    return multihost_utils.reached_preemption_sync_point(next(_stop_calls))
