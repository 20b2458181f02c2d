"""Programs that run once: compiled fast rather than made to run fast."""

from collections.abc import Callable
from typing import Any

import jax


def run_once(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, compiled: on CPU without LLVM's optimizations, in half the time."""
    options: Any = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function).lower(*args).compile(compiler_options=options)(*args)
