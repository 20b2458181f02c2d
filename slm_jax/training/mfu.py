"""Model FLOPs utilisation: what share of the device's matrix speed the training step turns into model FLOPs.

    python -m slm_jax.mfu [--config NAME|PATH] [--section.field value …] [--steps N] [--json]

Denominators: the vendor's peak (devices.py), and the roof, the fastest matrix product that this device was seen to
make (roof.py). On an unknown device, a CPU for one, the roof stands in for the peak. What is counted: flops.py.
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
from slm_jax.model import ops
from slm_jax.model.params import abstract_model
from slm_jax.performance import devices, flops
from slm_jax.performance.roofline import CONVENTION, MeasuredPeak, format_flop_rate, measure_peak, step_shapes, units
from slm_jax.training import memory
from slm_jax.training.train_step import TrainState, make_steps
from slm_jax.utils.errors import UserError


class Counts(NamedTuple):
    """FLOPs of one training step over the whole batch."""

    formula: float  # what MFU counts: model FLOPs, causal
    formula_square: float  # the same with the masked half of attention
    products: float  # of the naive program's gradient, whole square: equal to formula_square
    xla: float | None  # XLA's count of the same program, which adds element-wise operations
    written: float  # products of the real step as written: with what is recomputed, and the optimizer
    optimizer: float  # of these, the optimizer's (Newton-Schulz)
    uncounted: tuple[str, ...]  # in the real step: kernels whose inside is not counted in `written`


def count(config: Config, vocab_size: int) -> Counts:
    """FLOPs of a step of the config's model, three ways. Nothing is computed, no array is made."""
    tokens = config.train.batch_size * config.train.sequence_length
    graph, params = abstract_model(_plain(config), vocab_size)
    shape = (config.train.batch_size, config.train.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("input_ids", "labels")}

    def gradient(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:  # of whole logits
            model = nnx.merge(graph, params)
            x_BxTxD = model.hidden(batch["input_ids"])
            return ops.naive_cross_entropy(x_BxTxD, model.head_weight(), batch["labels"], model.dtype).loss

        return jax.grad(loss)(params)

    products, xla = flops.traced_flops(gradient, params, batch).flops, flops.xla_flops(gradient, params, batch)
    steps = make_steps(config, vocab_size)
    written = flops.traced_flops(steps.train, jax.eval_shape(steps.init), batch)
    return Counts(
        tokens * flops.train_flops_per_token(config.model, vocab_size, shape[1]),
        tokens * flops.train_flops_per_token(config.model, vocab_size, shape[1], causal=False),
        products,
        xla,
        written.flops,
        flops.optimizer_flops(config.model, config.optimizer.name),
        written.uncounted,
    )


def _plain(config: Config) -> Config:
    """The config of the naive program: the whole square of attention, each layer written out, nothing computed twice,
    no padding, no dropout."""
    plain = {"attention": "naive", "scan_layers": False, "remat": "none", "vocab_multiple": 1, "dropout": 0.0}
    return config.model_copy(update={"model": config.model.model_copy(update=plain)})


class StepTimes(NamedTuple):
    """Training steps as they ran."""

    seconds: list[float]  # of each step, from the end of the one before
    parts: int  # that a batch was computed in, one after the other
    compile_seconds: float
    program_bytes: int  # a device's memory for the compiled step: state, batch, temporary
    peak_bytes: int | None  # the most that the process ever held on a device, where the backend says it


def time_steps(config: Config, vocab_size: int, steps: int, mesh: jax.sharding.Mesh, trace: str = "") -> StepTimes:
    """Time `steps` steps of the real train step on random ids, after two that are not counted. Raises UserError.

    As in the training loop, the microbatch is what fits (`memory.compile_to_fit`), and a step is dispatched before the
    one before it is waited for. trace: a folder for a profile of three more steps.
    """
    try:
        return _time_steps(config, vocab_size, steps, mesh, trace)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise UserError(
            f"the device ran out of memory at {config.train.batch_size} x {config.train.sequence_length} tokens: "
            f"lower --train.memory_gb, or give a smaller --train.microbatch than auto finds"
        ) from None


def _time_steps(config: Config, vocab_size: int, steps: int, mesh: jax.sharding.Mesh, trace: str) -> StepTimes:
    shape = (config.train.batch_size, config.train.sequence_length + 1)
    ids = np.random.default_rng(config.train.seed).integers(0, vocab_size, shape, np.int32)
    batch = sharding.shard_batch(mesh, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
    start = time.perf_counter()
    fitted = memory.compile_to_fit(config, vocab_size, mesh, batch)
    state: TrainState = fitted.steps.init()
    compile_seconds, compiled = time.perf_counter() - start, fitted.train
    ends, pending, warmup = [], None, 2
    for _ in range(warmup + steps):
        state, metrics = compiled(state, batch)
        if pending is not None:
            jax.block_until_ready(pending)
            ends.append(time.perf_counter())
        pending = metrics
    jax.block_until_ready(pending)
    ends.append(time.perf_counter())
    if trace:
        with jax.profiler.trace(trace):
            for _ in range(3):
                state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)
    stats = mesh.devices.flat[0].memory_stats() or {}
    seconds = np.diff(ends)[warmup - 1 :].tolist()
    return StepTimes(
        seconds, fitted.config.train.grad_accum_steps, compile_seconds, fitted.needed, stats.get("peak_bytes_in_use")
    )


class Report(NamedTuple):
    """Everything that the command shows, for one config on the devices at hand."""

    device: str  # as JAX names it
    devices: int
    source: str  # where the vendor's figures are from; empty: the device is in no table
    vendor: dict[str, float | None]  # FLOP/s of one device by dtype
    roofs: dict[str, MeasuredPeak]  # measured, of one device by dtype
    dtype: str  # of the step's products
    optimizer: str
    parameters: int
    batch: tuple[int, int, int]  # sequences, tokens of each, parts
    counts: Counts
    times: StepTimes
    roof: float  # FLOP/s of all devices in `dtype`, measured
    peak: float | None  # FLOP/s of all devices in `dtype`, the vendor's

    @property
    def seconds(self) -> float:
        """The median step."""
        return statistics.median(self.times.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.batch[0] * self.batch[1] / self.seconds

    @property
    def mfu_roof(self) -> float:
        """Model FLOPs per second as a share of the measured roof."""
        return self.counts.formula / self.seconds / self.roof

    @property
    def mfu_peak(self) -> float | None:
        """Model FLOPs per second as a share of the vendor's peak."""
        return self.counts.formula / self.seconds / self.peak if self.peak else None


def measure(config: Config, vocab_size: int, steps: int, trace: str = "") -> Report:
    """Count and time the config's training step on the devices at hand. Raises UserError."""
    mesh = sharding.make_mesh(config)
    kind, dtype = mesh.devices.flat[0].device_kind, ops.compute_dtype(config.train.dtype)
    device, shapes = devices.find(kind), step_shapes(config, vocab_size)
    dtypes = [jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)]
    roofs = {each.name: measure_peak(each, shapes) for each in dtypes}
    times = time_steps(config, vocab_size, steps, mesh, trace)
    again = measure_peak(dtype, shapes)  # a machine that others use may have been busy the first time
    roofs[dtype.name] = max(roofs[dtype.name], again)
    peak = device.peak(dtype) if device else None
    return Report(
        kind,
        mesh.size,
        device.source if device else "",
        {each.name: device.peak(each) if device else None for each in dtypes},
        roofs,
        dtype.name,
        config.optimizer.name,
        flops.parameters(config.model, vocab_size),
        (config.train.batch_size, config.train.sequence_length, times.parts),
        count(config, vocab_size),
        times,
        units(mesh) * roofs[dtype.name].flops,
        mesh.size * peak if peak else None,
    )


def as_json(report: Report) -> str:
    """One JSON object; FLOPs and FLOP/s are plain numbers, times seconds."""
    tree: dict[str, Any] = report._asdict()
    tree["roofs"] = {name: roof._asdict() for name, roof in report.roofs.items()}
    tree["counts"], tree["times"] = report.counts._asdict(), report.times._asdict()
    for name in ("seconds", "tokens_per_second", "mfu_roof", "mfu_peak"):
        tree[name] = getattr(report, name)
    return json.dumps({**tree, "convention": CONVENTION})


_SCALES = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def as_text(report: Report) -> str:
    """The report in words and numbers."""
    r, c = report, report.counts
    lines = [f"{r.devices} x {r.device}: {r.source or 'in no table of devices, so the measured roof stands in'}"]
    lines.append("matrix products, one device   best here   (median)    vendor's peak")
    for name, roof in r.roofs.items():
        vendor = r.vendor[name]
        share = f"{format_flop_rate(vendor)}, {roof.flops / vendor:.0%} reached" if vendor else "none known"
        lines.append(f"  {name:8} {format_flop_rate(roof.flops):>22}   ({format_flop_rate(roof.median)})    {share}")
    sequences, length, parts = r.batch
    lines.append(
        f"model: {r.parameters / 1e6:,.2f} M parameters, {sequences} x {length} tokens a step"
        + (f" in {parts} parts" if parts > 1 else "")
        + f", {r.dtype} products, {r.optimizer}"
    )
    scale, unit = next((pair for pair in _SCALES if c.formula >= pair[0]), _SCALES[-1])
    lines.append(f"{unit} of a step")
    rows = [
        (c.formula, f"formula, {CONVENTION}: what MFU counts"),
        (c.formula_square, "formula, the whole square of attention"),
        (
            c.products,
            f"products of the naive program: {c.products / c.formula_square:.4f} of the formula's whole square",
        ),
    ]
    if c.xla:
        ratio = f"{c.xla / c.formula_square:.4f} of it; element-wise work is in it"
        rows.append((c.xla, f"XLA's count of the naive program: {ratio}"))
    extra = f"{c.written / c.formula:.3f} of what MFU counts"
    extra += f", {c.optimizer / scale:,.2f} {unit} of it Newton-Schulz" if c.optimizer else ""
    extra += f"; not counted inside {', '.join(c.uncounted)}" if c.uncounted else ""
    rows.append((c.written, f"products of the real step as written: {extra}"))
    rows.append((r.roof * r.seconds, "measured roof x median step: what the products could have been"))
    lines += [f"  {value / scale:>10,.2f}  {text}" for value, text in rows]
    low, high = np.percentile(r.times.seconds, [10, 90])
    lines.append(
        f"step: median {_seconds(r.seconds)}, 80 % of {len(r.times.seconds)} within {_seconds(low)} and "
        f"{_seconds(high)}, {r.tokens_per_second:,.0f} tokens/s; compiled in {r.times.compile_seconds:.1f} s, "
        f"{r.times.program_bytes / 1e9:.3g} GB a device"
        + (f" (most in use {r.times.peak_bytes / 1e9:.3g} GB)" if r.times.peak_bytes else "")
    )
    shares = [f"{r.mfu_roof:.1%} of the measured roof"]
    if r.mfu_peak is not None:
        shares.insert(0, f"{r.mfu_peak:.1%} of the vendor's peak")
    lines.append(
        f"MFU: {format_flop_rate(c.formula / r.seconds)} of model FLOPs, {' and '.join(shares)} ({CONVENTION}; with "
        f"the whole square {c.formula_square / c.formula:.3f} times that)"
    )
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def vocabulary(config: Config) -> int:
    """Entries of the config's tokenizer; of one yet to be learned, those asked for. Raises UserError."""
    path = config.tokenizer.path
    return load_tokenizer(path).vocab_size if path else config.tokenizer.vocab_size
