"""Devices: one mesh, and where batches and state live on it.

`jit` with shardings is what `pmap` became: the step is written for the global batch, XLA splits it over the mesh.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slm_jax.config import Config
from slm_jax.config_checks import batch_devices_problem
from slm_jax.errors import UserError


def make_mesh(config: Config) -> Mesh:
    """The mesh with axis "data" over `mesh.data` devices (0: all). Raises UserError if batch or devices do not fit."""
    available = jax.device_count()
    wanted = config.mesh.data or available
    if wanted > available:
        raise UserError(f"mesh.data asks for {wanted} devices, but there are {available} ({jax.default_backend()})")
    batch, parts = config.train.batch_size, config.train.parts
    if (batch // parts) % wanted:
        raise UserError(batch_devices_problem(batch, parts, wanted))
    return jax.make_mesh((wanted,), ("data",), devices=jax.devices()[:wanted], axis_types=(AxisType.Auto,))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The batch on the devices, its rows split over "data"."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def describe(mesh: Mesh) -> str:
    """The devices in words."""
    device = mesh.devices.flat[0]
    return f"{mesh.size} x {device.device_kind}" if device.platform != "cpu" else f"{mesh.size} x CPU"


def abstract(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes and dtypes of a tree, each with the sharding it is to have."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
