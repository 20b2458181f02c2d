"""Memory and losses of one model on meshes of 1 to 8 simulated devices: python tests/benchmarks/scaling.py

Five steps with the same batches on each mesh. The memory is that of XLA's CPU compiler.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]
sys.path.insert(0, str(Path(__file__).parents[2]))

from slm_jax.config.schema import Config  # noqa: E402  # after the path is set

_MESHES = ({}, *({axis: size} for size in (2, 4, 8) for axis in ("data", "fsdp", "tensor")), {"fsdp": 4, "tensor": 2})


def simulate(count: int) -> None:
    """Simulate this number of CPU devices; call it before JAX starts."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"


def _line(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def scaling() -> None:
    """Compare memory and losses of five steps of one model on meshes of 1 to 8 devices, with the same batches."""
    import numpy as np

    from slm_jax.distributed import sharding
    from slm_jax.training import memory

    # The quickstart's sizes with a number of heads that 8 devices divide; float32, so that losses can be compared.
    fields: dict[str, Any] = {
        "model.dim": 256,
        "model.heads": 8,
        "model.mlp_dim": 768,
        "train.dtype": "float32",
        "train.steps": 5,
    }
    fields |= {"train.batch_size": 16, "train.microbatch": 16, "train.sequence_length": 256}
    first: list[float] = []
    print(_line(("mesh", "state", "temporary", "loss of step 5", "largest difference of a loss")) + "\n|" + "---|" * 5)
    for sizes in _MESHES:
        mesh_fields = {"mesh.data": 1, **{f"mesh.{axis}": size for axis, size in sizes.items()}}
        config = Config.load("quickstart", **{**fields, **mesh_fields})
        mesh = sharding.make_mesh(config)
        ids = np.random.default_rng(0).zipf(1.3, (16, 257)).astype(np.int32) % 2048
        batch = sharding.shard_batch(mesh, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        fitted = memory.compile_to_fit(config, 2048, mesh, batch)
        temporary = fitted.train.memory_analysis().temp_size_in_bytes
        state = fitted.steps.init()
        losses = []
        for _ in range(5):
            state, metrics = fitted.train(state, batch)
            losses.append(float(metrics["loss"]))
        first = first or losses
        name = " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"
        state_size = f"{sharding.bytes_per_device(state) / 1e6:.1f} MB"
        difference = float(np.abs(np.array(losses) - first).max())
        cells = (name, state_size, f"{temporary / 1e6:.1f} MB", f"{losses[-1]:.6f}", f"{difference:.1e}")
        print(_line(cells), flush=True)


if __name__ == "__main__":
    simulate(8)
    scaling()
