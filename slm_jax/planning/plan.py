"""The plan of a config on described devices: what its training step needs and can reach, before it is run there."""

import json
from typing import Any, NamedTuple

from slm_jax.config.schema import Config
from slm_jax.distributed import sharding
from slm_jax.distributed.platform import Platform
from slm_jax.model import ops
from slm_jax.model.precision import compute_dtype, describe_precision
from slm_jax.performance import flops
from slm_jax.planning import search
from slm_jax.planning.collectives import KINDS
from slm_jax.planning.program import Program, compile_program
from slm_jax.planning.targets import Target, describe_devices
from slm_jax.training import mfu
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import memory_size, plural
from slm_jax.utils.waiting import interruptible, waiting

_USABLE_SHARE = 0.9  # of the memory that JAX allocates, as in training (training/memory.py)
# First guess of a step's memory: bytes per token, layer and channel; per token and entry of the vocabulary; and, for
# state and gradients, per parameter.
_CHANNEL_BYTES, _LOGIT_BYTES, _PARAMETER_BYTES = 40, 6, 20


class Plan(NamedTuple):
    """Figures of one device, unless stated otherwise.

    Attributes:
        target: The kind of device.
        devices: Number of devices.
        mesh: The devices and how the work is split over them, as text.
        precision: Dtype of the matrix products.
        attention: Implementation of attention, as text.
        config: The config with the microbatch that was compiled.
        parameters: Number of parameters of the model.
        program: The compiled step.
        limit: Bytes that a step may take.
        model_flops: Model FLOPs of a step (performance/flops.py).
        peak: The vendor's FLOP/s for the dtype of the products.
        programs: Rows and memory of all programs that were compiled.
    """

    target: Target
    devices: int
    mesh: str
    precision: str
    attention: str
    config: Config
    parameters: int
    program: Program
    limit: int
    model_flops: float
    peak: float
    programs: tuple[tuple[int, int], ...]

    @property
    def fits(self) -> bool:
        """True if the step fits into the memory."""
        return self.program.needed_bytes <= self.limit

    @property
    def compute_seconds(self) -> float:
        """Time of the model FLOPs at the vendor's peak."""
        return self.model_flops / self.peak

    @property
    def memory_seconds(self) -> float:
        """Time of the traffic with memory at the vendor's bandwidth."""
        return self.program.traffic_bytes / (self.target.specification.bandwidth * 1e9)

    @property
    def bound_seconds(self) -> float:
        """Least time of a step by the roofline model: the larger of the two."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound_mfu(self) -> float:
        """Largest MFU by the roofline model."""
        return self.compute_seconds / self.bound_seconds

    @property
    def bound_tokens_per_second(self) -> float:
        """Largest throughput of one device by the roofline model."""
        return self.tokens * self.program.grad_accum_steps / self.bound_seconds

    @property
    def tokens(self) -> int:
        """Tokens that a device computes at once."""
        return self.program.rows * _row_length(self.config)


def _row_length(config: Config) -> int:
    """Return the tokens of a row of a batch: with DPO it holds two sequences."""
    return config.train.sequence_length * (2 if config.train.objective == "dpo" else 1)


def default_devices(config: Config) -> int:
    """Return the number of devices that the mesh of a config names."""
    return max(config.mesh.data, 1) * config.mesh.fsdp * config.mesh.tensor


def make_plan(config: Config, target: Target, count: int = 0, rows: int = 0) -> Plan:
    """Compile the training step of a config for described devices.

    Args:
        config: The config.
        target: The kind of device.
        count: Number of devices; 0: those of the mesh.
        rows: Sequences of one device, which are then the whole batch; 0: the largest microbatch that fits, of the
            config's batch, or its `train.microbatch`.

    Raises:
        UserError: If devices, batch and model do not divide, or nothing fits.
    """
    vocab_size = mfu.vocabulary(config)
    devices = describe_devices(target, count or default_devices(config))
    platform = Platform.of_device(devices[0])
    dtype = compute_dtype(config.train.dtype, platform)
    peak = target.specification.peak(dtype)
    if peak is None:
        raise UserError(f"--train.dtype {dtype}: {target.name} has no units for it")
    if rows:
        mesh = sharding.make_mesh(_with_batch(config, rows * len(devices) // config.mesh.tensor), devices)
        config = _with_batch(config, rows * mesh.shape["data"] * mesh.shape["fsdp"])
    mesh = sharding.make_mesh(config, devices)
    batch_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    limit = int(_USABLE_SHARE * target.allocatable)
    if config.train.memory_gb:
        limit = min(limit, int(config.train.memory_gb * 1e9))

    def compile_rows(rows: int) -> Program:
        text = f"compiling for {sharding.describe(mesh)}, {plural(rows, 'sequence')} of a device at once"
        with waiting(text):
            return interruptible(lambda: compile_program(config, vocab_size, target, devices, rows))

    if rows or config.train.microbatch != "auto":
        rows = rows or int(config.train.microbatch) // batch_devices
        program = compile_rows(rows)
        programs = [program]
    else:
        candidates = search.candidate_rows(config.train.batch_size // config.train.accumulation // batch_devices)
        guess = _guess_rows(config, vocab_size, limit, mesh.size)
        first = max((rows for rows in candidates if rows <= guess), default=candidates[0])
        program, programs = search.largest_that_fits(compile_rows, candidates, limit, first)
    length = config.train.sequence_length
    tokens = config.train.batch_size * _row_length(config) / mesh.size
    width = config.model.head_width
    return Plan(
        target=target,
        devices=mesh.size,
        mesh=sharding.describe(mesh),
        precision=describe_precision(config, platform),
        attention=ops.describe_attention(config.model.attention, dtype, length, width, platform),
        config=config,
        parameters=flops.parameters(config.model, vocab_size),
        program=program,
        limit=limit,
        model_flops=tokens * flops.token_flops(config.model, vocab_size, length, config.lora).at(),
        peak=peak,
        programs=tuple((each.rows, each.needed_bytes) for each in programs),
    )


def _guess_rows(config: Config, vocab_size: int, limit: int, devices: int) -> float:
    """Return about how many sequences fit at once, for the first program of a search."""
    model = config.model
    fixed = _PARAMETER_BYTES * flops.parameters(model, vocab_size) / devices
    token = _CHANNEL_BYTES * model.depth * model.dim + _LOGIT_BYTES * vocab_size
    return max(limit - fixed, 0.1 * limit) / (token * config.train.sequence_length)


def _with_batch(config: Config, batch_size: int) -> Config:
    """Return the config with another batch, computed at once."""
    train = config.train.model_copy(update={"batch_size": batch_size, "microbatch": "auto", "accumulation": 1})
    return config.model_copy(update={"train": train})


def as_json(plan: Plan) -> str:
    """Return the plan as one JSON object.

    Bytes, FLOPs and seconds are plain numbers, of one device; null what the compiler does not report, or what is not
    known of a program that it refused.
    """
    program = plan.program
    fields: dict[str, Any] = {
        "device": plan.target.name,
        "devices": plan.devices,
        "rows": program.rows,
        "sequence_length": plan.config.train.sequence_length,
        "tokens": plan.tokens,
        "state_bytes": program.state_bytes,
        "temp_bytes": program.temp_bytes,
        "model_flops": plan.model_flops,
        "bytes_accessed": program.bytes_accessed,
        "parameters": plan.parameters,
        "layers": plan.config.model.depth,
        "width": plan.config.model.dim,
        "compile_seconds": program.compile_seconds,
        "compiler_flops": program.compiler_flops,
        "traffic_bytes": program.traffic_bytes,
        "grad_accum_steps": program.grad_accum_steps,
        "needed_bytes": program.needed_bytes,
        "limit_bytes": plan.limit,
        "fits": plan.fits,
        "bound_seconds": plan.bound_seconds,
        "bound_mfu": plan.bound_mfu,
        "bound_tokens_per_second": plan.bound_tokens_per_second,
        "attention": plan.attention,
        "dtype": plan.precision,
        "kernels": program.kernels,
        "collectives": [
            {"kind": each.kind, "dtype": each.dtype, "dims": each.dims, "count": each.times, "bytes": each.bytes}
            for each in program.collectives
        ],
        "programs": [{"rows": rows, "needed_bytes": needed} for rows, needed in plan.programs],
    }
    if not program.hlo:  # the compiler refused it
        unknown = ("traffic_bytes", "bound_seconds", "bound_mfu", "bound_tokens_per_second", "kernels", "collectives")
        fields |= dict.fromkeys(unknown)
    return json.dumps(fields)


def as_text(plan: Plan) -> str:
    """Return the plan as text of several lines."""
    lines = [*_model_lines(plan), *_memory_lines(plan)]
    if plan.program.hlo:
        lines += [*_speed_lines(plan), *_collective_lines(plan)]
    else:
        lines.append("speed: unknown, because the compiler refuses a program that does not fit")
    return "\n".join([*lines, f"compiled in {plan.program.compile_seconds:.0f} s"])


def _model_lines(plan: Plan) -> list[str]:
    model = plan.config.model
    return [
        f"{plan.mesh}: compiled, not run",
        f"model: {plan.parameters / 1e6:.1f} M parameters, {model.depth} layers of width {model.dim}; "
        f"{plan.precision}; {plan.attention}",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    program = plan.program
    length = plan.config.train.sequence_length
    channels = plan.tokens * plan.config.model.depth * plan.config.model.dim
    fits = "fits" if plan.fits else "DOES NOT FIT"
    steps = plural(program.grad_accum_steps, "microbatch").replace("microbatchs", "microbatches")
    return [
        f"microbatch: {program.rows} x {length} tokens of each device at once, {steps} in a step",
        f"memory of a device: state {_gigabytes(program.state_bytes)}, temporary {_gigabytes(program.temp_bytes)} "
        f"({program.temp_bytes / channels:.1f} bytes per token, layer and channel), together "
        f"{_gigabytes(program.needed_bytes)}: {fits} in {_gigabytes(plan.limit)}",
        *(f"  {rows} at once: {memory_size(needed)}" for rows, needed in plan.programs if rows != program.rows),
    ]


def _speed_lines(plan: Plan) -> list[str]:
    program = plan.program
    specification = plan.target.specification
    counted = "not reported by this compiler"
    if program.compiler_flops is not None and program.bytes_accessed is not None:
        counted = (
            f"{program.compiler_flops / 1e12:.3g} TFLOP, {program.bytes_accessed / 1e9:.1f} GB accessed (the body "
        )
        counted += "of a loop once, without kernels' FLOPs, with on-chip memory)"
    bound = "compute" if plan.compute_seconds >= plan.memory_seconds else "memory bandwidth"
    return [
        f"a step, of each device: {plan.model_flops / 1e12:.3g} T model FLOPs, {1e3 * plan.compute_seconds:,.1f} ms at "
        f"{plan.peak / 1e12:.0f} TFLOP/s",
        f"  {program.traffic_bytes / 1e9:,.1f} GB read and written, estimated from the program: "
        f"{1e3 * plan.memory_seconds:,.1f} ms at {specification.bandwidth:,.0f} GB/s",
        f"  compiler's count: {counted}",
        f"roofline: bound by {bound}, MFU at most {plan.bound_mfu:.0%}, at most "
        f"{plan.bound_tokens_per_second:,.0f} tokens/s of a device",
    ]


def _collective_lines(plan: Plan) -> list[str]:
    lines = []
    for kind in KINDS:
        ours = [each for each in plan.program.collectives if each.kind == kind]
        if ours:
            largest = max(ours, key=lambda each: each.bytes)
            count = sum(each.times for each in ours)
            total = sum(each.total_bytes for each in ours)
            size = f"{largest.dtype}{list(largest.dims)} ({memory_size(largest.bytes)})"
            lines.append(f"  {kind}: {count:,} of {total / 1e9:.2f} GB together, the largest {size}")
    return ["collectives of a step:", *lines] if lines else []


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
