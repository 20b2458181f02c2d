"""The compilers of accelerators as optional packages, and the environment in which they run without a chip.

This module imports no JAX: `use_compiler` has to set the environment before JAX is imported.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import install_command

Kind = Literal["tpu", "gpu"]

_MODULES = {"tpu": ("libtpu",), "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
_VENDORS = {"tpu": "Google's TPU compiler (libtpu)", "gpu": "NVIDIA's GPU compiler (jax-cuda12-plugin)"}
_ENVIRONMENT = {
    # No device is started: the programs are compiled for a description, and small arrays stay on the CPU.
    "JAX_PLATFORMS": "cpu",
    # libtpu would ask Google Cloud's metadata server for the topology of this machine.
    "TPU_SKIP_MDS_QUERY": "1",
    # libtpu locks /tmp/libtpu_lockfile so that one process owns the chips; a planner owns none.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_QUIET = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "2"}


def is_installed(kind: Kind) -> bool:
    """Return whether the compiler for a kind of device is installed."""
    return any(importlib.util.find_spec(module) is not None for module in _MODULES[kind])


def compiler_command(kind: Kind) -> str:
    """Return the command that installs the compiler for a kind of device, in the version of the installed JAX."""
    return install_command(f"plan-{kind}")


def use_compiler(kind: Kind, device: str) -> None:
    """Set up this process for compiling without a chip; call it before JAX is imported.

    Args:
        kind: The kind of device.
        device: Its name, for the message.

    Raises:
        UserError: If the compiler is not installed; names the command that installs it.
    """
    if not is_installed(kind):
        raise UserError(f"--device {device} needs {_VENDORS[kind]}, which is not installed: {compiler_command(kind)}")
    os.environ.update(_ENVIRONMENT)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if "jax" in sys.modules:  # read the environment when it was imported
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    if kind == "gpu":
        _add_ptxas_to_path()
    with without_native_messages():
        importlib.import_module("jax")


@contextlib.contextmanager
def without_native_messages() -> Iterator[None]:
    """Discard what libraries write to the standard error stream while they are loaded: that there is no driver.

    The messages are not Python's and come before any setting of theirs is read. Errors are raised as exceptions.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def _add_ptxas_to_path() -> None:
    """Put the assembler of NVIDIA's Python package on PATH, where XLA looks for it; it may be elsewhere on PATH."""
    for package in ("nvidia.cuda_nvcc", "nvidia.cu13"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for location in spec.submodule_search_locations or () if spec else ():
            folder = Path(location) / "bin"
            if (folder / "ptxas").exists():
                os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
                return
