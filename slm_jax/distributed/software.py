"""The program that a process runs: sources, versions and numerical settings, which all processes must share.

Processes that run different programs do not fail: each computes its part of every step, and the result is a mixture.
"""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import slm_jax
import tokenizer
from slm_jax.distributed import agreement

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "numpy",
    "libtpu",
    "jax-cuda12-pjrt",
    "jax-cuda13-pjrt",
)
_JAX_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)
# Parts of the names of XLA flags that may differ: they do not change what is computed.
_OWN_FLAGS = ("device_count", "dump", "dir", "path", "thread", "file")


def require_same_software() -> None:
    """Refuse to train with processes that run different programs.

    Raises:
        UserError: In every process; names the process that differs from the first, and what differs.
    """
    agreement.require_same(
        "the software", software, "install the same versions and sources, with the same settings, on every host"
    )


def software() -> dict[str, Any]:
    """Return the versions of packages, the hash of each source file and the numerical settings of this process."""
    import jax

    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    for package in (slm_jax, tokenizer):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            name = f"{root.name}/{path.relative_to(root).as_posix()}"
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    found |= {name: jax.config.values.get(name) for name in _JAX_SETTINGS}
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        flags = os.environ.get(variable, "").split()
        found[variable] = sorted({flag for flag in flags if not any(own in flag for own in _OWN_FLAGS)})
    return found
