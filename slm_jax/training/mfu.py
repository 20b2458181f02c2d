"""Model FLOPs utilization (MFU): the share of the device's matrix throughput that a training step uses for model FLOPs.

    python -m slm_jax.mfu [--config NAME|PATH] [--section.field value …] [--steps N] [--json]

MFU is relative to the vendor's peak (performance/devices.py) and to the measured peak, the fastest matrix product
measured on this device (performance/roofline.py), which takes the place of the vendor's on an unknown device, such as a
CPU. performance/flops.py defines which FLOPs count.
"""

import json
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.config.schema import Config
from slm_jax.data.load import load_tokenizer
from slm_jax.distributed import sharding
from slm_jax.distributed.platform import Platform
from slm_jax.model import ops
from slm_jax.model.abstract import abstract_model
from slm_jax.model.precision import compute_dtype
from slm_jax.performance import devices, flops
from slm_jax.performance.roofline import (
    CONVENTION,
    MeasuredPeak,
    format_flop_rate,
    independent_devices,
    measure_peak,
    step_shapes,
)
from slm_jax.training import memory
from slm_jax.training.steps import make_steps
from slm_jax.training.train_step import TrainState
from slm_jax.utils.errors import UserError

_WARMUP_STEPS = 2  # not timed
_TRACED_STEPS = 3


class FlopCounts(NamedTuple):
    """FLOPs of one training step over the global batch.

    Attributes:
        formula: Model FLOPs, causal: what MFU counts.
        formula_square: Model FLOPs with the masked half of attention.
        products: Products in the gradient of the naive program; equal to `formula_square`.
        xla: XLA's count of the same program, which includes element-wise operations; None if XLA has none.
        written: Products of the real step before XLA optimizes it, recomputation and optimizer included.
        optimizer: The part of `written` that is the optimizer's: the orthogonalization of Muon and NorMuon.
        uncounted: Kernels of the real step whose products are not in `written`.
    """

    formula: float
    formula_square: float
    products: float
    xla: float | None
    written: float
    optimizer: float
    uncounted: tuple[str, ...]


def count(config: Config, vocab_size: int) -> FlopCounts:
    """Count the FLOPs of a training step, by formula, from the traced program and by XLA; nothing is computed."""
    batch_size = config.train.batch_size
    length = config.train.sequence_length
    tokens = batch_size * length
    graph, params = abstract_model(_naive_config(config), vocab_size)
    batch = {name: jax.ShapeDtypeStruct((batch_size, length), jnp.int32) for name in ("input_ids", "labels")}

    def naive_gradient(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graph, params)
            x_BxTxD = model.hidden(batch["input_ids"])
            return ops.naive_cross_entropy(x_BxTxD, model.head_weight(), batch["labels"], model.dtype).loss

        return jax.grad(loss)(params)

    steps = make_steps(config, vocab_size)
    written = flops.traced_flops(steps.train, jax.eval_shape(steps.init), batch)
    return FlopCounts(
        formula=tokens * flops.train_flops_per_token(config.model, vocab_size, length),
        formula_square=tokens * flops.train_flops_per_token(config.model, vocab_size, length, causal=False),
        products=flops.traced_flops(naive_gradient, params, batch).flops,
        xla=flops.xla_flops(naive_gradient, params, batch),
        written=written.flops,
        optimizer=flops.optimizer_flops(config.model, config.optimizer.name),
        uncounted=written.uncounted,
    )


def _naive_config(config: Config) -> Config:
    """Return the config of the naive program, whose products are those of the formula.

    The full square of attention, layers unrolled, no recomputation, no padding of the vocabulary, no dropout.
    """
    naive = {"attention": "naive", "scan_layers": False, "remat": "none", "vocab_multiple": 1, "dropout": 0.0}
    return config.model_copy(update={"model": config.model.model_copy(update=naive)})


class StepTimes(NamedTuple):
    """Timing of training steps.

    Attributes:
        seconds: Duration of each step, from the end of the step before.
        grad_accum_steps: Microbatches that a batch was computed in.
        compile_seconds: Time to compile the step.
        program_bytes: Memory of one device for the compiled step: state, batch and temporary arrays.
        peak_bytes: The largest amount of memory that the process ever held on a device; None if unknown.
    """

    seconds: list[float]
    grad_accum_steps: int
    compile_seconds: float
    program_bytes: int
    peak_bytes: int | None


def time_steps(config: Config, vocab_size: int, steps: int, mesh: jax.sharding.Mesh, trace: str = "") -> StepTimes:
    """Time the real training step on random ids, after two steps that are not timed.

    As in the training loop, the microbatch is the largest that fits (`memory.compile_to_fit`), and a step is dispatched
    before the result of the previous one is awaited.

    Args:
        config: The run's config.
        vocab_size: Entries of the tokenizer's vocabulary.
        steps: Steps to time.
        mesh: The devices.
        trace: Folder for a profile of three more steps; "": no profile.

    Raises:
        UserError: If the device runs out of memory.
    """
    try:
        return _time_steps(config, vocab_size, steps, mesh, trace)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise UserError(
            f"the device ran out of memory at {config.train.batch_size} x {config.train.sequence_length} tokens: "
            f"lower --train.memory_gb, or set a smaller --train.microbatch than auto chooses"
        ) from None


def _time_steps(config: Config, vocab_size: int, steps: int, mesh: jax.sharding.Mesh, trace: str) -> StepTimes:
    shape = (config.train.batch_size, config.train.sequence_length + 1)
    ids = np.random.default_rng(config.train.seed).integers(0, vocab_size, shape, np.int32)
    batch = sharding.shard_batch(mesh, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
    start = time.perf_counter()
    fitted = memory.compile_to_fit(config, vocab_size, mesh, batch)
    state: TrainState = fitted.steps.init()
    compile_seconds = time.perf_counter() - start
    ends = []
    pending = None
    # One more step than is timed: the end of a step is seen when the next one has been dispatched, and a GPU may queue
    # only a part of a step, so that a last step without successor would seem short.
    for _ in range(_WARMUP_STEPS + steps + 1):
        state, metrics = fitted.train(state, batch)
        if pending is not None:
            jax.block_until_ready(pending)
            ends.append(time.perf_counter())
        pending = metrics
    jax.block_until_ready(pending)
    if trace:
        with jax.profiler.trace(trace):
            for _ in range(_TRACED_STEPS):
                state, metrics = fitted.train(state, batch)
            jax.block_until_ready(metrics)
    stats = mesh.devices.flat[0].memory_stats() or {}
    return StepTimes(
        seconds=np.diff(ends)[_WARMUP_STEPS - 1 :].tolist(),
        grad_accum_steps=fitted.config.train.grad_accum_steps,
        compile_seconds=compile_seconds,
        program_bytes=fitted.needed,
        peak_bytes=stats.get("peak_bytes_in_use"),
    )


class Report(NamedTuple):
    """MFU of one config on the devices of this machine.

    Attributes:
        device: Name of the device, as JAX reports it.
        devices: Number of devices.
        source: Publication of the vendor's figures; "" for an unknown device.
        vendor_peaks: The vendor's FLOP/s of one device, by dtype.
        measured_peaks: Measured peak of one device, by dtype.
        dtype: Dtype of the step's products.
        optimizer: Name of the optimizer.
        parameters: Number of parameters.
        batch: (sequences, tokens of a sequence).
        counts: FLOPs of a step.
        times: Timing of the steps.
        measured_peak: Measured FLOP/s of all devices in `dtype`.
        vendor_peak: The vendor's FLOP/s of all devices in `dtype`.
    """

    device: str
    devices: int
    source: str
    vendor_peaks: dict[str, float | None]
    measured_peaks: dict[str, MeasuredPeak]
    dtype: str
    optimizer: str
    parameters: int
    batch: tuple[int, int]
    counts: FlopCounts
    times: StepTimes
    measured_peak: float
    vendor_peak: float | None

    @property
    def seconds(self) -> float:
        """Median duration of a step."""
        return statistics.median(self.times.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all devices."""
        return self.batch[0] * self.batch[1] / self.seconds

    @property
    def mfu_of_measured_peak(self) -> float:
        """Model FLOPs per second relative to the measured peak."""
        return self.counts.formula / self.seconds / self.measured_peak

    @property
    def mfu_of_vendor_peak(self) -> float | None:
        """Model FLOPs per second relative to the vendor's peak, None if that is unknown."""
        return self.counts.formula / self.seconds / self.vendor_peak if self.vendor_peak else None


def measure(config: Config, vocab_size: int, steps: int, trace: str = "") -> Report:
    """Count and time the config's training step on the devices of this machine.

    Args:
        config: The run's config.
        vocab_size: Entries of the tokenizer's vocabulary.
        steps: Steps to time.
        trace: Folder for a profile; "": no profile.

    Raises:
        UserError: If the mesh or the memory does not suffice.
    """
    mesh = sharding.make_mesh(config)
    kind = mesh.devices.flat[0].device_kind
    device = devices.find(kind)
    dtype = compute_dtype(config.train.dtype, Platform.of_mesh(mesh))
    dtypes = [jnp.dtype(jnp.float32), jnp.dtype(jnp.float16 if dtype == jnp.float16 else jnp.bfloat16)]
    shapes = step_shapes(config, vocab_size)
    measured_peaks = {measured.name: measure_peak(measured, shapes) for measured in dtypes}
    times = time_steps(config, vocab_size, steps, mesh, trace)
    # Measured again: other programs may have used the machine the first time.
    measured_peaks[dtype.name] = max(measured_peaks[dtype.name], measure_peak(dtype, shapes))
    vendor_peak = device.peak(dtype) if device else None
    return Report(
        device=kind,
        devices=mesh.size,
        source=device.source if device else "",
        vendor_peaks={known.name: device.peak(known) if device else None for known in dtypes},
        measured_peaks=measured_peaks,
        dtype=dtype.name,
        optimizer=config.optimizer.name,
        parameters=flops.parameters(config.model, vocab_size),
        batch=(config.train.batch_size, config.train.sequence_length),
        counts=count(config, vocab_size),
        times=times,
        measured_peak=independent_devices(mesh) * measured_peaks[dtype.name].flops,
        vendor_peak=mesh.size * vendor_peak if vendor_peak else None,
    )


def as_json(report: Report) -> str:
    """Return the report as one JSON object; FLOPs and FLOP/s are plain numbers, times are in seconds."""
    times = report.times._asdict()
    grad_accum_steps = times.pop("grad_accum_steps")
    return json.dumps(
        {
            "device": report.device,
            "devices": report.devices,
            "source": report.source,
            "vendor": report.vendor_peaks,
            "roofs": {name: peak._asdict() for name, peak in report.measured_peaks.items()},
            "dtype": report.dtype,
            "optimizer": report.optimizer,
            "parameters": report.parameters,
            "batch": [*report.batch, grad_accum_steps],
            "counts": report.counts._asdict(),
            "times": times | {"parts": grad_accum_steps},
            "roof": report.measured_peak,
            "peak": report.vendor_peak,
            "seconds": report.seconds,
            "tokens_per_second": report.tokens_per_second,
            "mfu_roof": report.mfu_of_measured_peak,
            "mfu_peak": report.mfu_of_vendor_peak,
            "convention": CONVENTION,
        }
    )


_FLOP_UNITS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def as_text(report: Report) -> str:
    """Return the report as text of several lines."""
    return "\n".join(
        [*_device_lines(report), _model_line(report), *_flop_lines(report), _time_line(report), _mfu_line(report)]
    )


def _device_lines(report: Report) -> list[str]:
    source = report.source or "an unknown device, so MFU is relative to the measured peak"
    lines = [
        f"{report.devices} x {report.device}: {source}",
        "matrix products, one device   measured    (median)    vendor's peak",
    ]
    for name, peak in report.measured_peaks.items():
        vendor_peak = report.vendor_peaks[name]
        vendor = "unknown"
        if vendor_peak:
            vendor = f"{format_flop_rate(vendor_peak)}, {peak.flops / vendor_peak:.0%} reached"
        lines.append(f"  {name:8} {format_flop_rate(peak.flops):>22}   ({format_flop_rate(peak.median)})    {vendor}")
    return lines


def _model_line(report: Report) -> str:
    sequences, length = report.batch
    steps = report.times.grad_accum_steps
    microbatches = f" in {steps} microbatches" if steps > 1 else ""
    return (
        f"model: {report.parameters / 1e6:,.2f} M parameters, {sequences} x {length} tokens per step{microbatches}, "
        f"{report.dtype} products, {report.optimizer}"
    )


def _flop_lines(report: Report) -> list[str]:
    counts = report.counts
    scale, unit = next((pair for pair in _FLOP_UNITS if counts.formula >= pair[0]), _FLOP_UNITS[-1])
    naive_ratio = counts.products / counts.formula_square
    rows = [
        (counts.formula, f"formula, {CONVENTION}: what MFU counts"),
        (counts.formula_square, "formula, full square of attention"),
        (counts.products, f"products of the naive program: {naive_ratio:.4f} of the formula's full square"),
    ]
    if counts.xla:
        ratio = counts.xla / counts.formula_square
        rows.append((counts.xla, f"XLA's count of the naive program: {ratio:.4f}, with element-wise operations"))
    details = f"{counts.written / counts.formula:.3f} of what MFU counts"
    if counts.optimizer:
        details += f", of which {counts.optimizer / scale:,.2f} {unit} orthogonalization"
    if counts.uncounted:
        details += f"; without the products inside {', '.join(counts.uncounted)}"
    rows.append((counts.written, f"products of the real step as traced: {details}"))
    rows.append((report.measured_peak * report.seconds, "measured peak x median step: the upper bound"))
    return [f"{unit} of a step", *(f"  {value / scale:>10,.2f}  {text}" for value, text in rows)]


def _time_line(report: Report) -> str:
    times = report.times
    low, high = np.percentile(times.seconds, [10, 90])
    peak = f" (peak use {times.peak_bytes / 1e9:.3g} GB)" if times.peak_bytes else ""
    return (
        f"step: median {_duration(report.seconds)}, 80 % of {len(times.seconds)} within {_duration(low)} and "
        f"{_duration(high)}, {report.tokens_per_second:,.0f} tokens/s; compiled in {times.compile_seconds:.1f} s, "
        f"{times.program_bytes / 1e9:.3g} GB per device{peak}"
    )


def _mfu_line(report: Report) -> str:
    counts = report.counts
    shares = [f"{report.mfu_of_measured_peak:.1%} of the measured peak"]
    if report.mfu_of_vendor_peak is not None:
        shares.insert(0, f"{report.mfu_of_vendor_peak:.1%} of the vendor's peak")
    return (
        f"MFU: {format_flop_rate(counts.formula / report.seconds)} of model FLOPs, {' and '.join(shares)} "
        f"({CONVENTION}; {counts.formula_square / counts.formula:.3f} times that with the full square)"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def vocabulary(config: Config) -> int:
    """Return the vocabulary size of the config's tokenizer; the requested size if it is yet to be learned.

    Raises:
        UserError: If `tokenizer.path` cannot be read.
    """
    path = config.tokenizer.path
    return load_tokenizer(path).vocab_size if path else config.tokenizer.vocab_size
