"""The baseline of MFU: the vendor's peak, or the fastest matrix product measured on the device."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.config.schema import Config
from slm_jax.distributed.platform import Platform
from slm_jax.model import ops
from slm_jax.model.precision import compute_dtype
from slm_jax.performance import devices, flops

MatmulShape = tuple[int, int, int]
"""[m, k]·[k, n] as (m, k, n)."""

CONVENTION = "causal half of attention counted"
"""The FLOPs of attention that MFU counts, in words."""


class MeasuredPeak(NamedTuple):
    """The fastest matrix product measured on a device.

    Attributes:
        flops: FLOP/s of the fastest call.
        median: Median FLOP/s of the calls of that shape; lower than `flops` if the machine is used by other programs.
        shape: Shape of the product.
    """

    flops: float
    median: float
    shape: MatmulShape


def measure_peak(dtype: jnp.dtype, shapes: Sequence[MatmulShape] = (), seconds: float = 0.5) -> MeasuredPeak:
    """Measure the fastest matrix product of one device, JAX's first.

    Large square products are measured, and on CPU the given shapes too: there no shape is best for all (tall products
    can be twice as fast as square ones), and a peak below the step's own products would give an MFU above 100 %.

    Args:
        dtype: Dtype of the operands; products are accumulated in float32.
        shapes: Further shapes to measure on CPU.
        seconds: Stop once there was no better result for this time; at most four times as long in all, because a
            machine that other programs use is rarely idle.
    """
    if Platform.default().name == "cpu":
        chained = 1
        candidates = [(512, 512, 512), (1024, 1024, 1024), *shapes]
    else:  # several products per call, so that the overhead of a call does not count
        chained = 8
        candidates = [(4096, 4096, 4096), (8192, 8192, 8192)]
    runs = {shape: _compile_product(shape, dtype, chained) for shape in dict.fromkeys(candidates)}
    times: dict[MatmulShape, list[float]] = {shape: [] for shape in runs}
    start = improved = time.perf_counter()
    best_rate = 0.0
    rounds = 0
    while rounds < 3 or time.perf_counter() < min(improved + seconds, start + 4 * seconds):
        rounds += 1
        for shape, run in runs.items():  # alternate, so that a busy moment affects all shapes
            call_start = time.perf_counter()
            run()
            now = time.perf_counter()
            times[shape].append(now - call_start)
            rate = float(np.prod(shape)) / times[shape][-1]
            if rate > 1.01 * best_rate:
                best_rate = rate
                improved = now
    rates = {
        shape: [2 * chained * float(np.prod(shape)) / t for t in shape_times] for shape, shape_times in times.items()
    }
    fastest = max(rates, key=lambda shape: max(rates[shape]))
    return MeasuredPeak(max(rates[fastest]), statistics.median(rates[fastest]), fastest)


def _compile_product(shape: MatmulShape, dtype: jnp.dtype, chained: int) -> Callable[[], Any]:
    """Return a compiled call of `chained` products of one shape; shapes that are chained are square."""
    m, k, n = shape
    # Random operands: zeros and ones draw less power, at which a GPU clocks higher than on a real step. From NumPy,
    # because JAX would compile a generator for each shape. The second is scaled to keep the scale of the first.
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.standard_normal((m, k), np.float32), dtype)
    b = jnp.asarray(rng.standard_normal((k, n), np.float32) / k**0.5, dtype)

    @jax.jit
    def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
        for _ in range(chained):
            x = ops.einsum("ij,jk->ik", x, y, dtype).astype(dtype)
        return x

    multiply(a, b).block_until_ready()  # compile
    return lambda: multiply(a, b).block_until_ready()


def step_shapes(config: Config, vocab_size: int) -> list[MatmulShape]:
    """Return the products of a training step, forward and for the weights' gradients, of at most about 4 GFLOP each."""
    tokens = config.train.batch_size * config.train.sequence_length // config.train.grad_accum_steps
    shapes: list[MatmulShape] = []
    for inputs, outputs in dict.fromkeys([*flops.block_matrices(config.model), (config.model.dim, vocab_size)]):
        rows = min(tokens, max(64, int(2e9 / (inputs * outputs))))
        shapes += [(rows, inputs, outputs), (inputs, rows, outputs)]
    return shapes


class MfuBaseline(NamedTuple):
    """The speed that an MFU is relative to.

    Attributes:
        flops: FLOP/s of all devices of the run.
        text: One phrase that describes it.
    """

    flops: float
    text: str


def mfu_baseline(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> MfuBaseline:
    """Return the vendor's peak in the config's compute dtype, or the measured peak of an unknown device."""
    dtype = compute_dtype(config.train.dtype, Platform.of_mesh(mesh))
    device = devices.find(mesh.devices.flat[0].device_kind)
    vendor_peak = device.peak(dtype) if device is not None else None
    if vendor_peak is not None:
        total = mesh.size * vendor_peak
        return MfuBaseline(total, f"{format_flop_rate(total)} (vendor's {dtype} peak), {CONVENTION}")
    # The three largest shapes and a short time, because a run waits for it; `python -m slm_jax.mfu` measures all.
    shapes = sorted(step_shapes(config, vocab_size), key=np.prod)[-3:]
    total = independent_devices(mesh) * measure_peak(dtype, shapes, seconds=0.1).flops
    text = f"{format_flop_rate(total)} (fastest {dtype} matmul measured on this device), {CONVENTION}"
    return MfuBaseline(total, text)


def independent_devices(mesh: jax.sharding.Mesh) -> int:
    """Return by how much the mesh exceeds one device's peak; the CPU devices of a process share its cores."""
    mesh_devices = mesh.devices.flat
    if mesh_devices[0].platform != "cpu":
        return mesh.size
    return len({device.process_index for device in mesh_devices})


def format_flop_rate(rate: float) -> str:
    """Return a rate in TFLOP/s with about three significant digits."""
    if rate > 1e14:
        decimals = 0
    elif rate > 1e13:
        decimals = 1
    else:
        decimals = 3
    return f"{rate / 1e12:,.{decimals}f} TFLOP/s"
