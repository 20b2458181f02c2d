"""Runs of several processes: initialization, agreement between the processes, and a common end.

Every process runs the same command and holds its own devices; JAX's distributed runtime joins them into one mesh. The
first process decides, prepares and writes; all see the same file system. JAX is imported only where there are several
processes, or where it is in use already.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from slm_jax.utils.errors import UserError, user_message
from slm_jax.utils.progress import show_log

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROCESS_LOST = 75
"""Exit status after another process was lost (EX_TEMPFAIL: the same command may succeed)."""

_EXIT_DELAY = 5  # seconds
_HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process counts as lost
_BARRIER_TIMEOUT = 7 * 24 * 3600  # seconds: the first process may prepare a large corpus meanwhile
_PROCESS_LOST_MESSAGE = b"""
error: another process of this run has ended or cannot be reached, so this one ends too. Run the same command again on
every host: the run resumes from its last checkpoint
"""

_barrier_numbers = itertools.count()  # each barrier needs a name of its own, the same in every process


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Connect to the other processes of this run, if there are any. Call it before JAX is used.

    Without arguments the processes are those that a cluster has started (Slurm, Open MPI, Kubernetes, a TPU slice of
    several hosts); outside of a cluster nothing happens.

    Args:
        coordinator: HOST:PORT of the first process.
        processes: Number of processes; 1 runs this process alone in any environment.
        process: Number of this process, from 0.

    Raises:
        UserError: If only some of the arguments are given, or if the processes cannot connect.
    """
    if processes == 1:
        return
    given = [x is not None for x in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise UserError("--coordinator HOST:PORT, --processes N and --process I (0 to N-1) belong together")
    if not (all(given) or _is_in_cluster()):
        return
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator {coordinator}: should be HOST:PORT, such as 10.0.0.1:9876")
    import jax

    # Lets a SIGTERM to one process stop all of them after the same step, see `stop_requested`.
    jax.config.update("jax_enable_preemption_service", True)
    show_log()
    logger.info("waiting for the other processes…")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        remedy = "" if all(given) else ". If there is only this process: --processes 1"
        raise UserError(f"the processes of this run cannot connect: {error}{remedy}") from None
    if _is_alone_on_its_host():
        # Under Slurm and Open MPI JAX assumes several processes on a host and makes one GPU visible to each.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")
    _explain_abort()
    if is_first():
        logger.info("%d processes, %d devices", process_count(), jax.device_count())
    else:
        logging.getLogger("slm_jax").setLevel(logging.WARNING)


def _is_in_cluster() -> bool:
    """Return whether the environment belongs to one of several processes that JAX can detect."""
    env = os.environ
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("OMPI_COMM_WORLD_SIZE") or "1"
    if tasks.isdigit() and int(tasks) > 1:
        return True
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:  # an indexed job
        return True
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return True
    # The environment of a TPU virtual machine does not distinguish a single host from a slice of several: JAX asks the
    # metadata server. Notebook services always have one host.
    if "COLAB_RELEASE_TAG" in env or "KAGGLE_KERNEL_RUN_TYPE" in env:
        return False
    has_tpu = any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    return has_tpu and importlib.util.find_spec("libtpu") is not None


def _is_alone_on_its_host() -> bool:
    """Return whether Slurm or Open MPI started one process on each host without assigning devices to it."""
    env = os.environ
    if "JAX_LOCAL_DEVICE_IDS" in env:
        return False
    tasks = env.get("SLURM_STEP_NUM_TASKS")
    if tasks is None:
        return env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return tasks == env.get("SLURM_STEP_NUM_NODES")


def _explain_abort() -> None:
    """Print an explanation when JAX aborts this process because another one is lost; no Python code runs then."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: os.write(2, _PROCESS_LOST_MESSAGE) and None)
    _explain_abort.handler = handler  # type: ignore[attr-defined]  # C holds no reference that keeps it alive
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def process_count() -> int:
    """Return the number of processes of this run."""
    if "jax" not in sys.modules:
        return 1
    import jax

    return jax.process_count()


def is_first() -> bool:
    """Return whether this process is the first one, which decides and writes."""
    if process_count() == 1:
        return True
    import jax

    return jax.process_index() == 0


def broadcast_from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first process and return its result in all.

    Args:
        make: Function whose result JSON can represent.

    Raises:
        UserError: In all processes, if `make` raises it in the first.
    """
    if process_count() == 1:
        return make()
    message: Any = {}
    if is_first():
        try:
            message = {"value": make()}
        except UserError as error:
            message = {"error": str(error)}
    _barrier()
    message = json.loads(_broadcast(json.dumps(message)))
    if "error" in message:
        raise UserError(message["error"])
    return message["value"]


def first_process_first(make: Callable[[], T]) -> T:
    """Call `make` in every process, in the first one before the others, which then find the files that it prepared.

    Raises:
        UserError: In all processes, if `make` raises it in the first.
    """
    if process_count() == 1:
        return make()
    results: list[T] = []
    broadcast_from_first(lambda: results.append(make()))
    return results[0] if results else make()


def require_same_options(options: dict[str, Any]) -> None:
    """Check that every process was given the same options.

    Raises:
        UserError: In every process if one has other options than the first; names them in the processes that differ.
    """
    if process_count() == 1:
        return
    from jax.experimental import multihost_utils

    own = json.loads(json.dumps(options))
    first = broadcast_from_first(lambda: own)
    different = [
        f"{name}: {first[name]!r} in the first process, {own[name]!r} in this one"
        for name in own
        if own[name] != first[name]
    ]
    if multihost_utils.process_allgather(bool(different)).any():
        details = f" ({'; '.join(different)})" if different else ""
        raise UserError(f"a process was given other options than the first one{details}: give the same command to all")


def minimum(value: int) -> int:
    """Return the smallest value of all processes, a number of bytes rounded down to KiB."""
    if process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    # In KiB, because device arrays hold 32-bit integers.
    return 1024 * int(multihost_utils.process_allgather(min(value >> 10, 2**31 - 1)).min())


def stop_requested(step: int) -> bool:
    """Return whether a process has received SIGTERM; becomes true after the same step in all processes."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """Exit the process at once on an error in the block, if there are several processes.

    An orderly shutdown would wait for the other processes, which wait for this one in a collective operation. The
    missing heartbeat ends them.
    """
    try:
        yield
    except Exception as error:
        if process_count() == 1:
            raise
        message = user_message(error)
        if message is not None:
            status = 2
        elif _is_lost_process(error):
            status = PROCESS_LOST
        else:
            status = 1
        if status == 1:
            print("".join(traceback.format_exception(error)), file=sys.stderr)
        else:
            print(f"error: {message or error}", file=sys.stderr)
        if status == PROCESS_LOST:
            os.write(2, _PROCESS_LOST_MESSAGE)
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first():
            # The others lose their coordinator with this process: let them report the same error first.
            time.sleep(_EXIT_DELAY)
        os._exit(status)


def _is_lost_process(error: Exception) -> bool:
    """Return whether an error was caused by a process that was lost during a collective operation."""
    import jax

    signs = ("gloo", "socket closed", "connection", "coordination", "unavailable", "heartbeat", "nccl")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error).lower() for sign in signs)


def _barrier() -> None:
    """Wait until all processes have arrived."""
    import orbax.checkpoint as ocp

    barrier = ocp.multihost.get_barrier_sync_fn()
    barrier(key=f"slm_jax {next(_barrier_numbers)}", timeout_ms=1000 * _BARRIER_TIMEOUT)


def _broadcast(text: str) -> str:
    """Return the first process's text in all processes."""
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    padded = np.zeros(size, np.uint8)
    padded[: data.size] = data[:size]
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode()
