"""Several processes, one run: how they find each other, agree, and end together.

Each process runs the same command and holds its own devices; JAX's distributed runtime makes one mesh of them all. The
first process decides, prepares and writes; the others see the same file system. JAX is imported only where there are
several, or where it is in use already.
"""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from slm_jax.utils.errors import UserError, user_message

T = TypeVar("T")

_WAITS = itertools.count()  # each wait has a name of its own, the same in every process

PROCESS_LOST = 75  # exit status: another process went away (EX_TEMPFAIL: the same command may succeed)
_PATIENCE = 5  # seconds
_HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost
_LOST = b"""
error: another process of this run ended or is out of reach, so this one ends too. Give the same command again on every
host: the run goes on after its last checkpoint
"""


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Find the other processes of this run, if there are any; before JAX is used. Raises UserError.

    coordinator: HOST:PORT of the first process, with the number of processes and this one's number. Without it they
    are those of the cluster, where there is one (Slurm, Open MPI, Kubernetes, a TPU slice of several hosts); processes
    1 joins nobody.
    """
    if processes == 1:
        return
    given = [x is not None for x in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise UserError("--coordinator HOST:PORT, --processes N and --process I (0 to N-1) belong together")
    if not (all(given) or _in_a_cluster()):
        return
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator {coordinator}: should be HOST:PORT, such as 10.0.0.1:9876")
    import jax

    jax.config.update("jax_enable_preemption_service", True)
    print("waiting for the other processes…", file=sys.stderr)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=_HEARTBEAT, shutdown_timeout_seconds=_HEARTBEAT
        )
    except (ValueError, RuntimeError) as error:
        alone = "" if all(given) else ". If this is the only one: --processes 1"
        raise UserError(f"the processes of this run do not find each other: {error}{alone}") from None
    if _is_alone_on_its_host():
        # JAX takes a process of Slurm or Open MPI for one of several on its host, and lets it see one GPU.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")
    _explain_loss()
    if is_first():
        print(f"{process_count()} processes, {jax.device_count()} devices", file=sys.stderr)


def _in_a_cluster() -> bool:
    """Whether the environment is that of one of several processes, which JAX then finds by itself."""
    e = os.environ
    tasks = e.get("SLURM_STEP_NUM_TASKS") or e.get("OMPI_COMM_WORLD_SIZE") or "1"
    indexed_job = "KUBERNETES_SERVICE_HOST" in e and "JOB_COMPLETION_INDEX" in e
    slices = "," in e.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in e
    # A TPU virtual machine does not say in its environment whether there are others: JAX asks its metadata server.
    alone = "COLAB_RELEASE_TAG" in e or "KAGGLE_KERNEL_RUN_TYPE" in e
    tpu = not alone and any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")) and _has_libtpu()
    return (tasks.isdigit() and int(tasks) > 1) or indexed_job or slices or tpu


def _is_alone_on_its_host() -> bool:
    """Whether Slurm or Open MPI started one process on each host, and nobody has chosen its devices."""
    e = os.environ
    tasks, nodes = e.get("SLURM_STEP_NUM_TASKS"), e.get("SLURM_STEP_NUM_NODES")
    alone = e.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" if tasks is None else tasks == nodes
    return alone and "JAX_LOCAL_DEVICE_IDS" not in e


def _has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


def _explain_loss() -> None:
    """Say what it means when JAX ends this process because another one is gone: it aborts, past all Python code."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: os.write(2, _LOST) and None)
    _explain_loss.kept = handler  # type: ignore[attr-defined]  # C does not keep it alive
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def process_count() -> int:
    """Processes of this run."""
    if "jax" not in sys.modules:
        return 1
    import jax

    return jax.process_count()


def is_first() -> bool:
    """Whether this process is the one that decides and writes."""
    if process_count() == 1:
        return True
    import jax

    return jax.process_index() == 0


def broadcast_from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process (of JSON's types), in all of them. Its UserError is raised in all."""
    if process_count() == 1:
        return make()
    found: Any = {}
    if is_first():
        try:
            found = {"value": make()}
        except UserError as error:
            found = {"error": str(error)}
    _wait()
    found = json.loads(_broadcast(json.dumps(found)))
    if "error" in found:
        raise UserError(found["error"])
    return found["value"]


def first_process_first(make: Callable[[], T]) -> T:
    """What `make` gives in each process, called in the first one before the others: it prepares files, they find them.
    Its UserError in the first is raised in all."""
    if process_count() == 1:
        return make()
    kept: list[T] = []
    broadcast_from_first(lambda: kept.append(make()))
    return kept[0] if kept else make()


def require_same_options(options: dict[str, Any]) -> None:
    """Raise UserError in every process, with the names here, if one has other options than the first."""
    if process_count() == 1:
        return
    from jax.experimental import multihost_utils

    mine = json.loads(json.dumps(options))
    first = broadcast_from_first(lambda: mine)
    differ = [f"{name}: {first[name]!r} there, {mine[name]!r} here" for name in mine if mine[name] != first[name]]
    if multihost_utils.process_allgather(bool(differ)).any():
        found = f" ({'; '.join(differ)})" if differ else ""
        raise UserError(f"a process was given other options than the first one{found}: give all the same command")


def minimum(value: int) -> int:
    """The smallest of the values of all processes."""
    if process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    # In kibibytes: a device array holds 32-bit integers.
    return 1024 * int(multihost_utils.process_allgather(min(value >> 10, 2**31 - 1)).min())


def stop_requested(step: int) -> bool:
    """Whether a SIGTERM to any process ends all of them after this step, the same one in each."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """On an error of this process alone, end it at once: to part in order it would wait for the others, and they for
    it. Its silence ends them."""
    try:
        yield
    except Exception as error:
        if process_count() == 1:
            raise
        told = user_message(error)
        status = 2 if told else PROCESS_LOST if _is_loss(error) else 1
        print("".join(traceback.format_exception(error)) if status == 1 else f"error: {told or error}", file=sys.stderr)
        if status == PROCESS_LOST:
            os.write(2, _LOST)
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first():  # with it the others lose their meeting point: first they may tell the same mistake themselves
            time.sleep(_PATIENCE)
        os._exit(status)


def _is_loss(error: Exception) -> bool:
    """Whether an error came of another process that went away in the middle of a sum over all."""
    import jax

    signs = ("gloo", "socket closed", "connection", "coordination", "unavailable", "heartbeat", "nccl")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error).lower() for sign in signs)


def _wait() -> None:
    """Until all processes are here, for days if need be (a corpus is made meanwhile)."""
    import orbax.checkpoint as ocp

    ocp.multihost.get_barrier_sync_fn()(key=f"slm_jax {next(_WAITS)}", timeout_ms=7 * 24 * 3600 * 1000)


def _broadcast(text: str) -> str:
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    whole = np.zeros(size, np.uint8)
    whole[: data.size] = data[:size]
    return bytes(multihost_utils.broadcast_one_to_all(whole)).decode()
