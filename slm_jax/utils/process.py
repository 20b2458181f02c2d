"""What a command sets for its own process, before the first array exists. Never called on import."""

import ctypes
import functools
import hashlib
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from slm_jax.utils.files import user_cache_folder

# No sums by atomic additions, no choice between algorithms by how fast they ran (it implies
# xla_gpu_exclude_nondeterministic_ops, openxla/xla#12520). Read when JAX starts its devices.
DETERMINISTIC = "--xla_gpu_deterministic_ops"


def tune_process(deterministic: bool = False) -> None:
    """For command-line programs: keep big buffers, and compiled programs between runs.

    deterministic: GPU programs have only operations that give the same bits each time.
    """
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}=true"
    _keep_freed_memory()
    _keep_compiled_programs()


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory: it would hand every big buffer back at each step, to page-fault it in again
    (1.2 times the speed of a CPU step)."""
    if platform.libc_ver()[0] != "glibc":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 << 20), (arena_max, 1)):
        mallopt(option, value)


def _keep_compiled_programs() -> None:
    """JAX's persistent compilation cache, in the user's cache folder unless JAX_COMPILATION_CACHE_DIR names one."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(user_cache_folder() / "xla" / _processor())
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    warnings.showwarning = functools.partial(_show_warning, Path(folder), warnings.showwarning)


def _show_warning(folder: Path, show: Callable[..., Any], message: Warning | str, *where: Any, **more: Any) -> None:
    """Remove the program that JAX could not read: a process was killed while it wrote it, and JAX, which finds the file
    there, would leave it as it is, to warn of it and compile anew at every start."""
    damaged = re.match(r"Error reading persistent compilation cache entry for '(\w+)'", str(message))
    if damaged is None:
        show(message, *where, **more)
        return
    print(f"a kept program ({damaged[1]}) is damaged: it is compiled again", file=sys.stderr)
    for path in folder.glob(f"{damaged[1]}-*"):
        path.unlink(missing_ok=True)


def _processor() -> str:
    """A name for this kind of processor: programs compiled for another one may not run here (a shared home folder)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(features.encode()).hexdigest()[:8]
