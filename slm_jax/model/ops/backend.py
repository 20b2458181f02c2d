"""What the hardware multiplies well, asked in one place."""

import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp


def compute_dtype(choice: Literal["auto", "float32", "bfloat16"]) -> jnp.dtype:
    """The dtype of matrix products: the choice, or for "auto" bfloat16 where the hardware has units for it.

    Parameters, optimizer state, norms, softmax and the loss are float32 whatever this says.
    """
    if choice != "auto":
        return jnp.dtype(choice)
    return jnp.dtype(jnp.bfloat16 if _multiplies_bfloat16() else jnp.float32)


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """What `precision` to ask of a product: float32 means float32, where GPUs would take TF32 and TPUs bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def describe_precision(choice: Literal["auto", "float32", "bfloat16"]) -> str:
    """One phrase for the start of a run: what is computed in which precision, and why."""
    dtype = compute_dtype(choice)
    if choice != "auto":
        why = "asked for"
    else:
        why = "this hardware multiplies it" if dtype == jnp.bfloat16 else "no bfloat16 units here"
    return f"{dtype} products ({why}), float32 parameters"


@functools.cache
def _multiplies_bfloat16() -> bool:
    backend = jax.default_backend()
    if backend == "tpu":
        return True
    if backend == "gpu":  # NVIDIA from Ampere (8.0) on, AMD's CDNA
        capability = str(getattr(jax.devices()[0], "compute_capability", "0"))
        return capability.startswith("gfx9") or (capability[:1].isdigit() and float(capability) >= 8.0)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
