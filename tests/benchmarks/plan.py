"""Whether a preset fits its devices, and how fast it should be, without them: python tests/benchmarks/plan.py [NAME …]

Compiles the preset's training step for as many simulated CPU devices as the machine has, and prints per device what
XLA plans: the training state, the batch, and temporary memory (activations, gradients, what an optimizer step makes),
of the largest part of the batch that fits into 0.9 of the device's memory. Nothing is computed, no array is made.

The plan is that of XLA's CPU compiler, with this project's attention in blocks: the state and the batch are what every
backend has; temporary memory on an accelerator will differ, for its compiler fuses more, and its kernels keep less.
Beside it stands a count of the activations that the backward pass needs. Tokens per second are an assumption of MFU
(the column says which) times the vendor's peak over the FLOPs of a token: a promise of no one.

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
    """A preset on devices."""

    preset: str
    device: str  # as in devices.py
    count: int
    mfu: float  # assumed; published for models of 1 B and more: 0.35 to 0.55 (README, Measured)
    fields: dict[str, Any] | None = None  # others than the preset's


L4, A100, H100, H200 = "NVIDIA L4", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200"
# Of the GPUs that a preset is for the one with the least memory; SPEEDS has them all.
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
_HEAD = "preset|devices|mesh|parameters|state|temporary|kept|sum|of|sequences|parts|MFU|tokens/s".split("|")
_MESHES = ({}, *({axis: size} for size in (2, 4, 8) for axis in ("data", "fsdp", "tensor")), {"fsdp": 4, "tensor": 2})


def main() -> None:
    """The command line: each plan in a process of its own, with as many simulated devices as it wants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="only these presets")
    parser.add_argument("--speeds", action="store_true", help="expected tokens/s on one GPU instead (no compiling)")
    parser.add_argument("--scaling", action="store_true", help="the table of 1 to 8 devices instead")
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
    """Before JAX starts: so many CPU devices."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"


def configured(plan: Plan) -> Config:
    """The preset, in the precision that the device multiplies, on all its devices."""
    device = devices.find(plan.device)
    assert device is not None
    dtype = "bfloat16" if device.bfloat16 else "float32"
    return Config.load(plan.preset, **{"train.dtype": dtype, **(plan.fields or {})})


def kept(config: Config, vocab_size: int) -> float:
    """Bytes that JAX's differentiation keeps of each sequence for the backward pass, whatever the backend: what two
    sequences make it keep more than one."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from slm_jax.model.params import abstract_model
    from slm_jax.training.train_step import loss_sums

    graph, params = abstract_model(config, vocab_size)

    def backward(params: Any, batch: Any) -> Any:
        """The backward pass, whose leaves are what it needs."""
        return jax.vjp(lambda params: loss_sums(nnx.merge(graph, params), batch).loss, params)[1]

    def size(rows: int) -> float:
        shape = jax.ShapeDtypeStruct((rows, config.train.sequence_length), jnp.int32)
        found = jax.eval_shape(backward, params, {"input_ids": shape, "labels": shape})
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))

    return size(2) - size(1)


def tokens_per_second(config: Config, vocab_size: int, device: str, count: int, mfu: float) -> float:
    """What an MFU of the vendor's peak comes to: nothing but arithmetic."""
    found = devices.find(device)
    assert found is not None
    peak = found.bfloat16 if config.train.dtype == "bfloat16" else found.float32
    assert peak is not None
    return mfu * peak * count / flops.train_flops_per_token(config.model, vocab_size, config.train.sequence_length)


def short(device: str) -> str:
    """A device's name as one says it."""
    return re.sub(r"NVIDIA |Tesla |-SXM4.*| 80GB.*", "", device)


def _like_a_kernel(attention: Any) -> Any:
    """Attention that keeps queries, keys and values for the backward pass, as the accelerators' kernels do, and no
    weights, which the CPU's keeps."""
    import jax

    def attend(q: Any, k: Any, v: Any, *how: Any) -> Any:
        return jax.checkpoint(lambda q, k, v: attention(q, k, v, *how))(q, k, v)

    return attend


def speeds() -> None:
    """Tokens per second and hours of the presets for one GPU, by arithmetic alone."""
    from slm_jax.training import mfu as measured

    print(_line(("preset", "GPU", "MFU", "tokens/s", "hours")) + "\n|" + "---|" * 5)
    for preset, table in SPEEDS.items():
        config = configured(Plan(preset, L4, 1, 0.0))
        tokens = config.train.steps * config.train.batch_size * config.train.sequence_length
        for device, mfu in table.items():
            speed = tokens_per_second(config, measured.vocabulary(config), device, 1, mfu)
            print(_line((preset, short(device), f"{mfu:.0%}", f"{speed:,.0f}", f"{tokens / speed / 3600:,.1f}")))


def row(plan: Plan) -> str:
    """A line of the table."""
    import jax
    import jax.numpy as jnp

    from slm_jax.distributed import sharding
    from slm_jax.model import ops
    from slm_jax.training import memory, mfu

    device = devices.find(plan.device)
    assert device is not None
    config = configured(plan)
    vocab_size, mesh = mfu.vocabulary(config), sharding.make_mesh(config)
    ops.attention = _like_a_kernel(ops.attention)
    # The simulated device's memory, and not this machine's; of a GPU's JAX takes three quarters, unless told otherwise.
    limit = int(0.9 * (1.0 if plan.device.startswith("TPU") else 0.75) * device.memory * 1e9)
    memory.memory_limit = lambda *_: limit
    shape, rows_split = (config.train.batch_size, config.train.sequence_length), mesh.shape["data"] * mesh.shape["fsdp"]
    spread = jax.NamedSharding(mesh, jax.P(sharding.ROWS))
    batch: Any = {k: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=spread) for k in ("input_ids", "labels")}
    each, parameters = kept(config, vocab_size), flops.parameters(config.model, vocab_size)
    # As many parts as would do if a step took the state, the gradients twice and what is kept: a first guess.
    room = max(limit - 20 * parameters / mesh.shape["fsdp"], 0.1 * limit)
    guess = int(shape[0] / rows_split * each / room)
    fitted = memory.compile_to_fit(config, vocab_size, mesh, batch, min_grad_accum_steps=max(1, guess))
    analysis = fitted.train.memory_analysis()
    parts = fitted.config.train.grad_accum_steps
    rows = shape[0] // parts // rows_split  # of one device, at once
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
        f"{rows * each / 1e9:.2f} GB",
        f"{fitted.needed / 1e9:.1f} GB",
        f"{device.memory:.0f} GB",
        f"{rows} x {shape[1]}",
        str(parts),
        f"{plan.mfu:.0%}",
        f"{speed:,.0f}",
    )
    return _line(fields)


def _line(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def scaling() -> None:
    """Five steps of one model, of the same batches, on meshes of 1 to 8 devices: what each holds, and the losses."""
    import numpy as np

    from slm_jax.distributed import sharding
    from slm_jax.training import memory

    # The quickstart's sizes, but for a number of heads that 8 devices can share; float32, so that losses compare.
    wanted = {"model.dim": 256, "model.heads": 8, "model.mlp_dim": 768, "train.dtype": "float32", "train.steps": 5}
    wanted |= {"train.batch_size": 16, "train.microbatch": 16, "train.sequence_length": 256}
    first: list[float] = []
    print(_line(("mesh", "state", "temporary", "loss of step 5", "largest difference of a loss")) + "\n|" + "---|" * 5)
    for sizes in _MESHES:
        asked = {"mesh.data": 1, **{f"mesh.{axis}": size for axis, size in sizes.items()}}
        config = Config.load("quickstart", **{**wanted, **asked})
        mesh = sharding.make_mesh(config)
        ids = np.random.default_rng(0).zipf(1.3, (16, 257)).astype(np.int32) % 2048
        batch = sharding.shard_batch(mesh, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        fitted = memory.compile_to_fit(config, 2048, mesh, batch)
        plan, state, losses = fitted.train.memory_analysis(), fitted.steps.init(), []
        for _ in range(5):
            state, metrics = fitted.train(state, batch)
            losses.append(float(metrics["loss"]))
        first = first or losses
        name = " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"
        held, temporary = sharding.bytes_per_device(state), plan.temp_size_in_bytes
        difference = float(np.abs(np.array(losses) - first).max())
        fields = (f"{held / 1e6:.1f} MB", f"{temporary / 1e6:.1f} MB", f"{losses[-1]:.6f}", f"{difference:.1e}")
        print(_line((name, *fields)), flush=True)


if __name__ == "__main__":
    main()
