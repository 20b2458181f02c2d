"""The kind of device that a program is compiled for, by which operations choose their implementation.

It comes from the devices of the mesh, or from the device that holds a model: never from JAX's default backend, so that
a program that is compiled ahead of time for a device of another machine is the one that runs there.
"""

from dataclasses import dataclass
from typing import Any

import jax

_GPU_NAMES = ("cuda", "rocm")  # as the plugins call what JAX calls "gpu"


@dataclass(frozen=True)
class Platform:
    """A kind of device; hashable, so that it can be a static argument.

    Attributes:
        name: "cpu", "gpu" or "tpu".
        capability: Of GPUs, NVIDIA's compute capability, "9.0", or AMD's architecture, "gfx942"; "" of others.
    """

    name: str
    capability: str = ""

    @classmethod
    def of_device(cls, device: Any) -> "Platform":
        """Return the platform of a JAX device, present or described by a topology."""
        name = "gpu" if device.platform in _GPU_NAMES else device.platform
        capability = str(getattr(device, "compute_capability", "")) if name == "gpu" else ""
        return cls(name, capability)

    @classmethod
    def of_mesh(cls, mesh: jax.sharding.Mesh) -> "Platform":
        """Return the platform of a mesh's devices, which are all of one kind."""
        return cls.of_device(mesh.devices.flat[0])

    @classmethod
    def default(cls) -> "Platform":
        """Return the platform of JAX's first device, on which arrays are created unless a sharding says otherwise."""
        return cls.of_device(jax.devices()[0])
