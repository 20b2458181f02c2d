"""Runs of several processes: how they connect at the start, and end together on an error."""

import contextlib
import ctypes
import importlib.util
import logging
import os
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from slm_jax.distributed.multihost import is_first, log_prefix, process_count
from slm_jax.utils.errors import UserError, user_message
from slm_jax.utils.progress import show_log
from tokenizer.streams import discard_unwritable_output, print_last, write_last

logger = logging.getLogger(__name__)

PROCESS_LOST = 75
"""Exit status after another process was lost (EX_TEMPFAIL: the same command may succeed)."""

_EXIT_DELAY = 5  # seconds
_HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process counts as lost
_JOIN_TIMEOUT = 300  # seconds that processes wait for each other at the start; a cluster may start them one by one
_NOT_JOINED_MESSAGE = b"""
error: not all processes of this run have joined in time, so this one ends. Run the same command on every host, each
with a --process of its own, and check that all of them reach the --coordinator
"""
_PROCESS_LOST_MESSAGE = b"""
error: another process of this run has ended or cannot be reached, so this one ends too. Run the same command again on
every host: the run resumes from its last checkpoint
"""


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
    logger.info("waiting for the other processes, %d minutes at most…", _JOIN_TIMEOUT // 60)
    _explain_abort(_NOT_JOINED_MESSAGE)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=_JOIN_TIMEOUT,
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
    _explain_abort(_PROCESS_LOST_MESSAGE)
    show_log(log_prefix())
    logger.info("%d processes", process_count())


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


def _explain_abort(message: bytes) -> None:
    """Print an explanation when JAX aborts this process because of another one; no Python exception is raised then."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: write_last(message))
    _explain_abort.handler = handler  # type: ignore[attr-defined]  # C holds no reference that keeps it alive
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


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
            print_last(log_prefix() + "".join(traceback.format_exception(error)))
        else:
            print_last(f"{log_prefix()}error: {message or error}")
        if status == PROCESS_LOST:
            write_last(_PROCESS_LOST_MESSAGE)
        discard_unwritable_output()
        if is_first():
            # The others lose their coordinator with this process: let them report the same error first.
            time.sleep(_EXIT_DELAY)
        os._exit(status)


def _is_lost_process(error: Exception) -> bool:
    """Return whether an error was caused by a process that was lost during a collective operation."""
    import jax

    signs = ("gloo", "socket closed", "connection", "coordination", "unavailable", "heartbeat", "nccl")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error).lower() for sign in signs)
