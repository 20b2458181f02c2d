"""What an MFU is a share of: the vendor's peak, or the fastest matrix product that the device was seen to make."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.config.schema import Config
from slm_jax.model import ops
from slm_jax.performance import devices, flops

Shape = tuple[int, int, int]
"""[m, k]·[k, n] as (m, k, n)."""

CONVENTION = "causal half of attention counted"


class MeasuredPeak(NamedTuple):
    """The fastest matrix product that a device was seen to make."""

    flops: float  # FLOP/s, the best of all
    median: float  # FLOP/s, the median of the calls of that shape: below `flops` by what else the machine does
    shape: Shape


def measure_peak(dtype: jnp.dtype, shapes: Sequence[Shape] = (), seconds: float = 0.5) -> MeasuredPeak:
    """FLOP/s of one device on products in dtype accumulated in float32: the best, once none better came for `seconds`
    (at most four times as long, for a machine that others use is rarely free).

    Large squares, and on CPU the given shapes too: there no size is best for all (tall ones can be twice as fast as
    squares), and a roof below what the step's own products reach would show more than 100 %.
    """
    if jax.default_backend() == "cpu":
        candidates = [(512, 512, 512), (1024, 1024, 1024), *shapes]
        runs = {shape: _product(shape, dtype, chained=1) for shape in dict.fromkeys(candidates)}
        chained = 1
    else:  # many in one call, to show the product's speed and not the cost of a call
        chained = 8
        runs = {(n, n, n): _product((n, n, n), dtype, chained) for n in (4096, 8192)}
    times: dict[Shape, list[float]] = {shape: [] for shape in runs}
    start = gained = time.perf_counter()
    fastest, rounds = 0.0, 0
    while rounds < 3 or time.perf_counter() < min(gained + seconds, start + 4 * seconds):
        rounds += 1
        for shape, run in runs.items():  # in turn, so that a busy moment hits all shapes
            before = time.perf_counter()
            run()
            times[shape].append((now := time.perf_counter()) - before)
            rate = float(np.prod(shape)) / times[shape][-1]
            if rate > 1.01 * fastest:
                fastest, gained = rate, now
    rates = {shape: [2 * chained * float(np.prod(shape)) / t for t in found] for shape, found in times.items()}
    best = max(rates, key=lambda shape: max(rates[shape]))
    return MeasuredPeak(max(rates[best]), statistics.median(rates[best]), best)


def _product(shape: Shape, dtype: jnp.dtype, chained: int) -> Callable[[], Any]:
    """A compiled call of `chained` products of one shape; chained ones are square."""
    m, k, n = shape
    # Random, not constant: zeros and ones draw less power, and a GPU then clocks higher than on a real step. Of NumPy's
    # numbers, since JAX would compile a generator for each shape; divided by what keeps the scale of a.
    random = np.random.default_rng(0)
    a, b = (
        jnp.asarray(random.standard_normal(shape, np.float32) / scale, dtype)
        for shape, scale in (((m, k), 1.0), ((k, n), k**0.5))
    )

    @jax.jit
    def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
        for _ in range(chained):
            x = ops.einsum("ij,jk->ik", x, y, dtype).astype(dtype)
        return x

    multiply(a, b).block_until_ready()  # compile
    return lambda: multiply(a, b).block_until_ready()


def step_shapes(config: Config, vocab_size: int) -> list[Shape]:
    """The products of a training step, forward and for the weights' gradients, cut to at most about 4 GFLOP each."""
    tokens = config.train.batch_size * config.train.sequence_length // config.train.grad_accum_steps
    shapes: list[Shape] = []
    for i, o in dict.fromkeys([*flops.block_matrices(config.model), (config.model.dim, vocab_size)]):
        rows = min(tokens, max(64, int(2e9 / (i * o))))
        shapes += [(rows, i, o), (i, rows, o)]
    return shapes


class MfuBaseline(NamedTuple):
    """What an MFU is a share of."""

    flops: float  # FLOP/s of all devices of the run
    text: str  # one phrase: what it is


def mfu_baseline(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> MfuBaseline:
    """The vendor's peak in the config's compute dtype where the device is known, else the measured roof."""
    dtype, kind = ops.compute_dtype(config.train.dtype), mesh.devices.flat[0].device_kind
    device = devices.find(kind)
    if device is not None and (peak := device.peak(dtype)) is not None:
        total = mesh.size * peak
        return MfuBaseline(total, f"{format_flop_rate(total)} (vendor's {dtype} peak), {CONVENTION}")
    # Few shapes and not long, for a run waits for it: `python -m slm_jax.mfu` looks at all.
    shapes = sorted(step_shapes(config, vocab_size), key=np.prod)[-3:]
    total = units(mesh) * measure_peak(dtype, shapes, seconds=0.1).flops
    return MfuBaseline(total, f"{format_flop_rate(total)} (fastest {dtype} product measured here), {CONVENTION}")


def units(mesh: jax.sharding.Mesh) -> int:
    """How many roofs a mesh has: one a device; CPU devices of one process are the same cores."""
    found = mesh.devices.flat
    return mesh.size if found[0].platform != "cpu" else len({device.process_index for device in found})


def format_flop_rate(rate: float) -> str:
    """In TFLOP/s, to about three digits."""
    return f"{rate / 1e12:,.{0 if rate > 1e14 else 1 if rate > 1e13 else 3}f} TFLOP/s"
