"""The compute dtype that the hardware multiplies fast, and the precision to request of a product."""

import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from slm_jax.distributed.platform import Platform

# CDNA 1 to 4, RDNA 3 and 4; not Vega (gfx900, gfx906, gfx90c), nor RDNA 1 and 2 (gfx10).
_AMD_WITH_BFLOAT16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


def compute_dtype(choice: Literal["auto", "float32", "bfloat16"], platform: Platform | None = None) -> jnp.dtype:
    """Return the dtype of the matrix products' operands.

    Parameters, optimizer state, norms, softmax and the loss are float32 in any case.

    Args:
        choice: The value of `train.dtype`; "auto" is bfloat16 if the hardware has units for it, else float32.
        platform: The hardware; None: JAX's first device.
    """
    if choice != "auto":
        return jnp.dtype(choice)
    return jnp.dtype(jnp.bfloat16 if _has_bfloat16_units(platform or Platform.default()) else jnp.float32)


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Return the `precision` argument of a product of operands in dtype.

    HIGHEST for float32, for which GPUs would otherwise use TF32 and TPUs bfloat16.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def describe_precision(choice: Literal["auto", "float32", "bfloat16"], platform: Platform | None = None) -> str:
    """Return one phrase on the precision of products and parameters, and the reason; arguments as `compute_dtype`."""
    dtype = compute_dtype(choice, platform)
    if choice != "auto":
        reason = "train.dtype"
    elif dtype == jnp.bfloat16:
        reason = "this hardware has bfloat16 units"
    else:
        reason = "this hardware has no bfloat16 units"
    return f"{dtype} products ({reason}), float32 parameters"


@functools.cache
def _has_bfloat16_units(platform: Platform) -> bool:
    if platform.name == "tpu":
        return True
    if platform.name == "gpu":  # NVIDIA since Ampere (compute capability 8.0)
        capability = platform.capability
        return capability.startswith(_AMD_WITH_BFLOAT16) or (capability[:1].isdigit() and float(capability) >= 8.0)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
