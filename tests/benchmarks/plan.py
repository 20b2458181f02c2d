"""Memory and expected speed of the presets, without their devices: python tests/benchmarks/plan.py [NAME …]

Compiles the training step of each preset for simulated CPU devices, as many as the preset is for, and prints the memory
that XLA plans per device: the training state, the batch, and temporary memory (activations, gradients, intermediate
results of the optimizer), for the largest microbatch that fits into 0.9 of the device's memory. Nothing is computed, no
array is created.

The plan is that of XLA's CPU compiler, with attention in blocks. State and batch are the same on every backend;
temporary memory on an accelerator will differ, because its compiler fuses more and its kernels save less. A separate
column counts the activations that the backward pass needs. Tokens per second are an assumed MFU (in the column before)
times the vendor's peak, divided by the FLOPs of a token; they are not measured.

    python tests/benchmarks/plan.py                    # every row of the table, 20 s to a minute each
    python tests/benchmarks/plan.py gpu_1b h100_8      # these presets
    python tests/benchmarks/plan.py --scaling          # memory and losses on 1 to 8 simulated devices
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]
sys.path.insert(0, str(Path(__file__).parents[2]))

from slm_jax.config.schema import Config  # noqa: E402
from slm_jax.performance import devices, flops  # noqa: E402  # after the path is set
from slm_jax.utils.errors import UserError  # noqa: E402


class Plan(NamedTuple):
    """A preset on devices.

    Attributes:
        preset: Name of the preset.
        device: Name of the device, as in performance/devices.py.
        count: Number of devices.
        mfu: Assumed MFU; published values for models of 1 B and more are 0.35 to 0.55.
        fields: Options that differ from the preset.
    """

    preset: str
    device: str
    count: int
    mfu: float
    fields: dict[str, Any] | None = None


L4, A100, H100, H200 = "NVIDIA L4", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200"
# For each preset the GPU with the least memory that it is for; SPEEDS has all of them.
PLANS = (
    Plan("colab_t4", "Tesla T4", 1, 0.5),
    Plan("colab_tpu", "TPU v5e", 1, 0.3),
    Plan("gpu_30m", L4, 1, 0.35),
    Plan("gpu_125m", L4, 1, 0.4),
    Plan("gpu_350m", L4, 1, 0.4),
    Plan("gpu_1b", A100, 1, 0.45),
    Plan("tpu_v5e_8", "TPU v5e", 8, 0.4),
    Plan("h100_8", H100, 8, 0.4),
    Plan("h100_8", "TPU v5e", 64, 0.4, {"mesh.fsdp": 64, "model.remat": "dots"}),
    Plan("h100_8", "TPU v5e", 64, 0.4, {"mesh.data": 8, "mesh.fsdp": 8, "model.remat": "dots"}),
)
# Small models leave fast devices idle between kernels.
SPEEDS = {
    "gpu_30m": {L4: 0.35, A100: 0.3, H100: 0.25, H200: 0.25},
    "gpu_125m": {L4: 0.4, A100: 0.4, H100: 0.35, H200: 0.35},
    "gpu_350m": {L4: 0.4, A100: 0.4, H100: 0.4, H200: 0.4},
    "gpu_1b": {A100: 0.45, H100: 0.4, H200: 0.45},
}
_HEAD = "preset|devices|mesh|parameters|state|temporary|activations|sum|of|sequences|microbatches|MFU|tokens/s".split(
    "|"
)
_MESHES = ({}, *({axis: size} for size in (2, 4, 8) for axis in ("data", "fsdp", "tensor")), {"fsdp": 4, "tensor": 2})


def main() -> None:
    """Run each plan in a process of its own, with the number of simulated devices that it needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="only these presets")
    parser.add_argument("--speeds", action="store_true", help="expected tokens/s on one GPU instead (compiles nothing)")
    parser.add_argument("--scaling", action="store_true", help="print the table of 1 to 8 devices instead")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.speeds:
        speeds()
    elif options.scaling:
        _simulate(8)
        scaling()
    elif options.one is not None:
        _simulate(PLANS[options.one].count)
        try:
            print(row(PLANS[options.one]))
        except UserError as error:
            print(f"{PLANS[options.one]}: {error}")
    else:
        print(_line(_HEAD) + "\n|" + "---|" * len(_HEAD), flush=True)
        for number, plan in enumerate(PLANS):
            if not options.presets or plan.preset in options.presets:
                subprocess.run([sys.executable, __file__, "--one", str(number)], check=False)


def _simulate(count: int) -> None:
    """Simulate this number of CPU devices; call it before JAX starts."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"


def configured(plan: Plan) -> Config:
    """Return the config of a preset in the precision that the device multiplies fastest."""
    device = devices.find(plan.device)
    assert device is not None
    dtype = "bfloat16" if device.bfloat16 else "float32"
    return Config.load(plan.preset, **{"train.dtype": dtype, **(plan.fields or {})})


def activation_bytes(config: Config, vocab_size: int) -> float:
    """Return the bytes that JAX saves for the backward pass of one more sequence, before a compiler optimizes it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from slm_jax.model.params import abstract_model
    from slm_jax.training.train_step import loss_sums

    graph, params = abstract_model(config, vocab_size)

    def backward(params: Any, batch: Any) -> Any:
        """Return the backward pass, a pytree whose leaves are the saved arrays."""
        return jax.vjp(lambda params: loss_sums(nnx.merge(graph, params), batch).loss, params)[1]

    def size(rows: int) -> float:
        shape = jax.ShapeDtypeStruct((rows, config.train.sequence_length), jnp.int32)
        saved = jax.eval_shape(backward, params, {"input_ids": shape, "labels": shape})
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))

    return size(2) - size(1)


def tokens_per_second(config: Config, vocab_size: int, device: str, count: int, mfu: float) -> float:
    """Return the throughput at a given MFU relative to the vendor's peak."""
    known = devices.find(device)
    assert known is not None
    peak = known.bfloat16 if config.train.dtype == "bfloat16" else known.float32
    assert peak is not None
    return mfu * peak * count / flops.train_flops_per_token(config.model, vocab_size, config.train.sequence_length)


def short(device: str) -> str:
    """Return the short name of a device."""
    return re.sub(r"NVIDIA |Tesla |-SXM4.*| 80GB.*", "", device)


def _like_a_kernel(attention: Any) -> Any:
    """Return attention that saves queries, keys and values for the backward pass, like accelerator kernels."""
    import jax

    def attend(q: Any, k: Any, v: Any, *options: Any) -> Any:
        return jax.checkpoint(lambda q, k, v: attention(q, k, v, *options))(q, k, v)

    return attend


def speeds() -> None:
    """Print expected tokens per second and hours of the presets for one GPU."""
    from slm_jax.training import mfu as measured

    print(_line(("preset", "GPU", "MFU", "tokens/s", "hours")) + "\n|" + "---|" * 5)
    for preset, table in SPEEDS.items():
        config = configured(Plan(preset, L4, 1, 0.0))
        tokens = config.train.steps * config.train.batch_size * config.train.sequence_length
        for device, mfu in table.items():
            speed = tokens_per_second(config, measured.vocabulary(config), device, 1, mfu)
            print(_line((preset, short(device), f"{mfu:.0%}", f"{speed:,.0f}", f"{tokens / speed / 3600:,.1f}")))


def row(plan: Plan) -> str:
    """Return a row of the table."""
    import jax
    import jax.numpy as jnp

    from slm_jax.distributed import sharding
    from slm_jax.distributed.partitioning import BATCH_AXES
    from slm_jax.model import ops
    from slm_jax.training import memory, mfu

    device = devices.find(plan.device)
    assert device is not None
    config = configured(plan)
    vocab_size = mfu.vocabulary(config)
    mesh = sharding.make_mesh(config)
    ops.attention = _like_a_kernel(ops.attention)
    # The memory of the planned device in place of this machine's. By default JAX allocates three quarters of a GPU's.
    available = device.memory * (1.0 if plan.device.startswith("TPU") else 0.75)
    limit = int(0.9 * available * 1e9)
    memory.memory_limit = lambda *_: limit
    shape = (config.train.batch_size, config.train.sequence_length)
    batch_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    by_batch = jax.NamedSharding(mesh, jax.P(BATCH_AXES))
    batch: Any = {k: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_batch) for k in ("input_ids", "labels")}
    per_sequence = activation_bytes(config, vocab_size)
    parameters = flops.parameters(config.model, vocab_size)
    # First guess: a step takes the state, the gradients twice (20 bytes per parameter) and the activations.
    free = max(limit - 20 * parameters / mesh.shape["fsdp"], 0.1 * limit)
    guess = int(shape[0] / batch_devices * per_sequence / free)
    fitted = memory.compile_to_fit(config, vocab_size, mesh, batch, min_grad_accum_steps=max(1, guess))
    analysis = fitted.train.memory_analysis()
    grad_accum_steps = fitted.config.train.grad_accum_steps
    sequences = shape[0] // grad_accum_steps // batch_devices  # of one device, at once
    state = analysis.argument_size_in_bytes
    speed = tokens_per_second(config, vocab_size, plan.device, plan.count, plan.mfu)
    split = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one"
    fields = (
        plan.preset,
        f"{plan.count} x {short(plan.device)}",
        split,
        f"{parameters / 1e6:,.0f} M",
        f"{state / 1e9:.2f} GB",
        f"{analysis.temp_size_in_bytes / 1e9:.2f} GB",
        f"{sequences * per_sequence / 1e9:.2f} GB",
        f"{fitted.needed / 1e9:.1f} GB",
        f"{device.memory:.0f} GB",
        f"{sequences} x {shape[1]}",
        str(grad_accum_steps),
        f"{plan.mfu:.0%}",
        f"{speed:,.0f}",
    )
    return _line(fields)


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
    main()
