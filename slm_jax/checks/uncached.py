"""Programs that run once: compiled for a short compile time rather than a short run time."""

from collections.abc import Callable
from typing import Any

import jax

from slm_jax.distributed.platform import Platform


def run_uncached(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, compiled; on CPUs without LLVM's optimizations, which halves the total time."""
    options: Any = {"xla_backend_optimization_level": 0} if Platform.default().name == "cpu" else None
    return jax.jit(function).lower(*args).compile(compiler_options=options)(*args)
