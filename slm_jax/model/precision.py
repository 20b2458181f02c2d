"""The precision of a model's computation: the dtype of each kind of value, chosen for the hardware in one place.

Parameters, optimizer state, and everything inside norms, softmax and the loss are float32 in any case, and so are
the gradients that the optimizer gets (those of the blocks' matrices are rounded before where activations are bfloat16,
see `block.cast_weights`).
Two things depend on hardware and options:

compute       the operands of matrix products, which are accumulated in float32 (`train.dtype`)
activation    the residual stream, and what operations pass to each other: outputs of linear layers, norms, rotations,
              attention and SwiGLU (`train.residual_dtype`)

GPUs and TPUs are limited by memory traffic between the products, so that activations are kept in the compute dtype. A
CPU computes bfloat16 elementwise work slowly, so that there they are float32.

An operation computes in float32 and returns the dtype of its input: the dtype of the residual stream, set where the
embedding is looked up, is that of everything after it.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from slm_jax.config.schema import Config
from slm_jax.distributed.platform import Platform

DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
"""Values of `train.dtype`."""

ResidualChoice = Literal["auto", "float32", "compute"]
"""Values of `train.residual_dtype`."""

_FLOAT32 = jnp.dtype("float32")

# CDNA 1 to 4, RDNA 3 and 4; not Vega (gfx900, gfx906, gfx90c), nor RDNA 1 and 2 (gfx10).
_AMD_WITH_BFLOAT16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


@dataclass(frozen=True)
class Policy:
    """The dtypes that a model computes in; hashable, so that it can be a static argument of a compiled function.

    Attributes:
        compute: Dtype of the matrix products' operands.
        activation: Dtype of the residual stream and of the results of all operations but the logits.
        platform: The hardware that the model runs on, by which operations choose their implementation.
    """

    compute: jnp.dtype = _FLOAT32
    activation: jnp.dtype = _FLOAT32
    platform: Platform = field(default_factory=Platform.default)

    @classmethod
    def choose(cls, config: Config, platform: Platform | None = None) -> "Policy":
        """Return the policy of a config on some hardware.

        Args:
            config: Its options `train.dtype` and `train.residual_dtype`.
            platform: The hardware; None: JAX's first device.
        """
        platform = platform or Platform.default()
        compute = compute_dtype(config.train.dtype, platform)
        return cls(compute, _activation_dtype(config.train.residual_dtype, compute, platform), platform)


def compute_dtype(choice: DtypeChoice, platform: Platform | None = None) -> jnp.dtype:
    """Return the dtype of the matrix products' operands.

    Args:
        choice: The value of `train.dtype`; "auto" is bfloat16 if the hardware multiplies it faster than float32,
            float16 if it does so only with that, else float32.
        platform: The hardware; None: JAX's first device.
    """
    if choice != "auto":
        return jnp.dtype(choice)
    platform = platform or Platform.default()
    if _prefers_bfloat16(platform):
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(jnp.float16) if _has_only_float16_units(platform) else _FLOAT32


def _activation_dtype(choice: ResidualChoice, compute: jnp.dtype, platform: Platform) -> jnp.dtype:
    """Return the dtype of the residual stream; "auto" is float32 on CPUs, the compute dtype on GPUs and TPUs."""
    if choice == "auto":
        choice = "float32" if platform.name == "cpu" else "compute"
    return compute if choice == "compute" else _FLOAT32


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Return the `precision` argument of a product of operands in dtype.

    HIGHEST for float32, for which GPUs would otherwise use TF32 and TPUs bfloat16.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def describe_precision(config: Config, platform: Platform | None = None) -> str:
    """Return one phrase on the dtypes of a config, with the reason for that of the products; arguments as `choose`."""
    policy = Policy.choose(config, platform)
    if config.train.dtype != "auto":
        reason = "train.dtype"
    elif policy.compute == jnp.bfloat16:
        reason = "this hardware has bfloat16 units"
    elif policy.compute == jnp.float16:
        reason = "this hardware has float16 units and no bfloat16 units; training scales the loss"
    else:
        reason = "this hardware does not multiply bfloat16 faster"
    what = "products" if policy.activation == _FLOAT32 else "products and activations"
    return f"{policy.compute} {what} ({reason}), float32 parameters"


def _has_only_float16_units(platform: Platform) -> bool:
    """Return whether it is an NVIDIA GPU of compute capability 7: Volta (V100) or Turing (T4)."""
    return platform.name == "gpu" and platform.capability.startswith("7.")


@functools.cache
def _prefers_bfloat16(platform: Platform) -> bool:
    if platform.name == "tpu":
        return True
    if platform.name == "gpu":  # NVIDIA since Ampere (compute capability 8.0)
        capability = platform.capability
        return capability.startswith(_AMD_WITH_BFLOAT16) or (capability[:1].isdigit() and float(capability) >= 8.0)
    try:
        return processor_prefers_bfloat16(Path("/proc/cpuinfo").read_text())
    except OSError:
        return False


def processor_prefers_bfloat16(cpuinfo: str) -> bool:
    """Return whether a processor multiplies bfloat16 faster than float32.

    Those with AMX do, and those of AMD with AVX512-BF16 (Zen 4). With AVX512-BF16 on an Intel Xeon without AMX, a
    training step took 1.3 to 1.4 times as long as in float32 (tests/benchmarks/train_step.py, rows "ours, bf16" and
    "ours, fp32").

    Args:
        cpuinfo: Content of /proc/cpuinfo.
    """
    return "amx_bf16" in cpuinfo or ("avx512_bf16" in cpuinfo and "AuthenticAMD" in cpuinfo)
