"""Settings of a command's own process. Nothing here is called on import, or by the library."""

import contextlib
import ctypes
import gc
import hashlib
import logging
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from slm_jax.utils.files import user_cache_folder
from slm_jax.utils.progress import write_line

# XLA flag: no sums by atomic additions, no choice between algorithms by measured speed (it implies
# xla_gpu_exclude_nondeterministic_ops, openxla/xla#12520). Read when JAX starts its devices.
DETERMINISTIC = "--xla_gpu_deterministic_ops"


def tune_process(deterministic: bool = False) -> None:
    """Set up the process of a command before its first array: keep large buffers and compiled programs.

    Compiled programs are kept in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR.

    Args:
        deterministic: Compile GPU programs from deterministic operations only.
    """
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}=true"
    _keep_freed_memory()
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(user_cache_folder() / "xla" / _processor_hash())
    _keep_compiled_programs(folder)
    _remove_damaged_programs(Path(folder))


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import modules without garbage collections, and exempt from later ones what they define.

    Nothing of it is garbage, but JAX, Flax and Orbax make so many objects that collections take a quarter of their
    import, and as long again when the process exits.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory.

    By default it returns every large buffer to the system at each step, and its pages fault when it is allocated again:
    CPU steps are 1.2 times as fast without.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # Parameters of mallopt in <malloc.h>.
    trim_threshold = -1
    top_pad = -2
    mmap_max = -4
    arena_max = -8
    # A trim threshold of -1 means never; 2**31 - 1, the largest int, would return the memory of steps above 2 GiB.
    for option, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 256 << 20), (arena_max, 1)):
        mallopt(option, value)


def _keep_compiled_programs(folder: str) -> None:
    """Enable JAX's persistent compilation cache for all programs."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _remove_damaged_programs(folder: Path) -> None:
    """Remove a cached program that JAX warns it cannot read, after a kill while it was being written.

    JAX never replaces an existing file: it would warn and compile again at every start. Warnings are sent through
    `logging`, where a filter recognizes that one; the others are printed as before.
    """
    log = logging.getLogger("py.warnings")
    if not log.handlers:
        log.addHandler(_WarningsHandler())
        log.propagate = False
    log.addFilter(_DamagedProgramFilter(folder))
    logging.captureWarnings(True)


class _WarningsHandler(logging.Handler):
    """Print warnings on the current `sys.stderr`, as Python does without `logging.captureWarnings`."""

    def emit(self, record: logging.LogRecord) -> None:
        write_line(record.getMessage().removesuffix("\n"))


class _DamagedProgramFilter(logging.Filter):
    """Replace JAX's warning about a damaged program by a short message, and remove the program."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def filter(self, record: logging.LogRecord) -> bool:
        damaged = re.search(r"Error reading persistent compilation cache entry for '(\w+)'", record.getMessage())
        if damaged is None:
            return True
        write_line(f"a cached program ({damaged[1]}) is damaged: it is compiled again")
        for path in self._folder.glob(f"{damaged[1]}-*"):
            path.unlink(missing_ok=True)
        return False


def _processor_hash() -> str:
    """Return a hash of the processor's features: in a shared home folder, programs for another one may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(features.encode()).hexdigest()[:8]
