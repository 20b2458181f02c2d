"""`environment.json` of a run: versions and devices of each call of `train`.

They are recorded in the run, since its report may be written on another machine. Nothing in the file names the machine
or its user.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

import slm_jax
from slm_jax.run.directory import Run
from slm_jax.utils.files import replace_text

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def record(run: Run, step: int, mesh: jax.sharding.Mesh, **details: str) -> None:
    """Append this call to `environment.json`, {"calls": [...]}, oldest first. Only the first process writes.

    Args:
        run: The run.
        step: The number of steps taken before this call.
        mesh: The devices.
        **details: Further text values, such as the baseline of the MFU.
    """
    if jax.process_index() == 0:
        calls = [*read_calls(run), {"step": step, **describe(mesh), **details}]
        replace_text(run.environment, json.dumps({"calls": calls}, indent=1) + "\n")


def read_calls(run: Run) -> list[dict[str, Any]]:
    """Return the calls in `environment.json`; none if it is missing or damaged, since nothing depends on it."""
    try:
        calls = json.loads(run.environment.read_text(encoding="utf-8"))["calls"]
        return [call for call in calls if isinstance(call, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def describe(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Return versions, machine and devices of this process as JSON values."""
    first = mesh.devices.flat[0]
    return {
        "time": time.time(),
        "slm_jax": slm_jax.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "device": first.device_kind,
        "platform": first.platform,
        "devices": mesh.size,
        "mesh": {str(axis): int(size) for axis, size in mesh.shape.items()},
        "processes": jax.process_count(),
    }


def commit() -> str:
    """Return the commit of the source tree, with "+" if files differ from it; "" without a source tree."""
    root = Path(slm_jax.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def processor() -> str:
    """Return the name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _memory_gb() -> float | None:
    """Return the memory of the machine in units of 10^9 bytes."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None
