"""Devices that programs can be compiled for without having one, as their compilers need them described.

TPUs are described by the topology that libtpu knows by name. NVIDIA GPUs are described by the properties that CUDA
reports of them (`cudaGetDeviceProperties`) in a `GpuTargetConfigProto` of XLA. Sources: the limits of each compute
capability are in table "Technical Specifications per Compute Capability" of NVIDIA's CUDA C++ Programming Guide; number
of multiprocessors, L2 cache, boost clock and bandwidth in the data sheets and architecture whitepapers of the cards;
memory as CUDA reports it, which is less than the nominal size, in the device descriptions of the OpenXLA project
(H100, H200, A100), of NVIDIA's sample deviceQuery (T4) and of PyTorch's error messages (L4: 22.03 GiB).

Peak FLOP/s and bandwidth, for the roofline, are those of `performance/devices.py`.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_jax.config.problem import any_of
from slm_jax.planning.compilers import Kind, without_native_messages
from slm_jax.utils.errors import UserError

if TYPE_CHECKING:
    from slm_jax.performance.devices import Device

_GIB = 1 << 30
_DEFAULT_GPU_FRACTION = 0.75  # of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


@dataclass(frozen=True)
class Gpu:
    """Properties of an NVIDIA GPU as CUDA reports them.

    Attributes:
        capability: Compute capability.
        multiprocessors: Number of streaming multiprocessors (SM).
        cores: CUDA cores of an SM.
        clock_ghz: Boost clock.
        l2_bytes: L2 cache.
        bandwidth: Memory bandwidth, bytes per second.
        sm_shared_bytes: Shared memory of an SM.
        block_shared_bytes: Largest shared memory of a block (opt-in).
        sm_threads: Largest number of resident threads of an SM.
    """

    capability: tuple[int, int]
    multiprocessors: int
    cores: int
    clock_ghz: float
    l2_bytes: int
    bandwidth: int
    sm_shared_bytes: int
    block_shared_bytes: int
    sm_threads: int


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
        name: Name on the command line.
        kind: Which compiler compiles for it.
        device_kind: Name that JAX reports, an entry of `performance/devices.py`.
        memory: Bytes that JAX can allocate on a device.
        gpu: Properties of a GPU; None for a TPU.
        axes: Of a TPU, the number of axes of its network.
    """

    name: str
    kind: Kind
    device_kind: str
    memory: int
    gpu: Gpu | None = None
    axes: int = 0

    @property
    def label(self) -> str:
        """The name in texts."""
        return self.name.upper() if self.kind == "gpu" else f"TPU {self.name}"

    @property
    def specification(self) -> "Device":
        """The vendor's peak and bandwidth."""
        from slm_jax.performance import devices  # imports JAX, for which the environment has to be set first

        known = devices.find(self.device_kind)
        assert known is not None
        return known

    @property
    def allocatable(self) -> int:
        """Bytes of memory that JAX allocates: all of a TPU's, three quarters of a GPU's unless told otherwise."""
        if self.kind == "tpu":
            return self.memory
        fraction = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or _DEFAULT_GPU_FRACTION
        return int(float(fraction) * self.memory)


def _hopper(bandwidth: int) -> Gpu:
    return Gpu((9, 0), 132, 128, 1.98, 50 << 20, bandwidth, 228 << 10, 227 << 10, 2048)


_H100 = _hopper(3_352_320_000_000)
_H200 = _hopper(4_800_000_000_000)
_A100 = Gpu((8, 0), 108, 64, 1.41, 40 << 20, 1_555_200_000_000, 164 << 10, 163 << 10, 2048)
_L4 = Gpu((8, 9), 58, 128, 2.04, 48 << 20, 300_000_000_000, 100 << 10, 99 << 10, 1536)
_T4 = Gpu((7, 5), 40, 64, 1.59, 4 << 20, 320_064_000_000, 64 << 10, 64 << 10, 1024)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("h100", "gpu", "NVIDIA H100 80GB HBM3", 84_942_979_072, _H100),
        Target("h200", "gpu", "NVIDIA H200", 151_397_597_184, _H200),
        Target("a100", "gpu", "NVIDIA A100-SXM4-40GB", 42_331_013_120, _A100),
        Target("l4", "gpu", "NVIDIA L4", int(22.03 * _GIB), _L4),
        Target("t4", "gpu", "Tesla T4", 15_843_721_216, _T4),
        # What libtpu leaves to programs, as its error messages state it.
        Target("v5e", "tpu", "TPU v5 lite", int(15.75 * _GIB), axes=2),
        Target("v6e", "tpu", "TPU v6 lite", int(31.25 * _GIB), axes=2),
        Target("v5p", "tpu", "TPU v5", int(95.74 * _GIB), axes=3),
    )
}

# Slices that Google Cloud offers: chips along each axis of the network.
_SLICES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_SLICES_3D = {
    1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
}  # fmt: skip
_GPUS_OF_A_HOST = 8


def describe_devices(target: Target, count: int) -> Sequence[Any]:
    """Return compile-only JAX devices.

    Args:
        target: The kind of device.
        count: Number of devices.

    Raises:
        UserError: If there is no slice or set of hosts with this number of devices.
    """
    if target.kind == "tpu":
        slices = _SLICES_2D if target.axes == 2 else _SLICES_3D
        if count not in slices:
            raise UserError(f"--devices {count}: {target.name} has slices of {any_of(sorted(slices))} chips")
        bounds = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
        return _topology("tpu", f"{target.name}:{'x'.join(map(str, slices[count]))}", **bounds)
    hosts = math.ceil(count / _GPUS_OF_A_HOST)
    if count % hosts:
        raise UserError(
            f"--devices {count}: should be at most {_GPUS_OF_A_HOST} GPUs, or a multiple of it for several hosts"
        )
    topology = f"1x{hosts}x{count // hosts}"  # slices, hosts, GPUs of a host
    return _topology("cuda", target.name, target_config=gpu_description(target), topology=topology)


def _topology(platform: str, name: str, **options: Any) -> Sequence[Any]:
    """Return the compile-only devices of a topology."""
    import jax
    from jax.experimental import topologies

    with without_native_messages():
        jax.devices()  # loads all plugins that are installed
        return topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices


def gpu_description(target: Target) -> str:
    """Return XLA's `GpuTargetConfigProto` of a GPU in text form."""
    gpu = target.gpu
    assert gpu is not None
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": gpu.sm_shared_bytes,
        "threads_per_core_limit": gpu.sm_threads,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.cores,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": target.memory,
        "shared_memory_per_block_optin": gpu.block_shared_bytes,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    major, minor = gpu.capability
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"  cuda_compute_capability {{ major: {major} minor: {minor} }}",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",  # the oldest that cuDNN's attention is compiled with
            f'device_description_str: "{target.device_kind}"',
        ]
    )
