"""Cross-field validation of the config; that of the model is in model_checks.py.

Each problem comes with values that would work.
"""

import difflib
import math
from collections.abc import Iterator

from slm_jax.config.model_checks import model_problems
from slm_jax.config.optimizer_section import MIN_MOMENTUM, OptimizerConfig
from slm_jax.config.problem import Problem, any_of, multiples
from slm_jax.config.sections import LoraConfig, Sections, TrainConfig
from slm_jax.config.source_names import SOURCES, hub_name_problems, is_source, mix_problems
from slm_jax.utils.formatting import plural


def cross_checks(config: Sections) -> Iterator[Problem]:
    """Yield all problems that involve several options, or that pydantic's bounds cannot express."""
    yield from model_problems(config.model)
    yield from _init_problems(config)
    yield from _lora_problems(config)
    yield from _optimizer_problems(config)
    yield from _objective_problems(config)
    yield from _mesh_problems(config)
    yield from _batch_problems(config)
    yield from _data_problems(config)
    yield from _output_problems(config)


def _init_problems(config: Sections) -> Iterator[Problem]:
    init = config.init
    if init.from_hf and init.from_run:
        yield (
            ("init.from_hf", "init.from_run"),
            "init.from_run and init.from_hf are both given, but a run starts from one of them: leave the other out",
        )
    if init.optimizer == "keep" and not init.from_run:
        yield (
            ("init.optimizer", "init.from_run"),
            "init.optimizer is keep, but there is no run whose optimizer state could be kept: give --init.from_run, "
            "or leave init.optimizer at fresh",
        )


def _lora_problems(config: Sections) -> Iterator[Problem]:
    lora = config.lora
    if not lora.rank:
        if lora.from_peft:
            text = "lora.from_peft has no effect with lora.rank 0: give rank, alpha and targets of its adapters"
            yield ("lora.rank", "lora.from_peft"), text
            return
        for name, default in LoraConfig().model_dump().items():
            if getattr(lora, name) != default:
                yield (
                    ("lora.rank", f"lora.{name}"),
                    f"lora.{name} has no effect with lora.rank 0: give a rank, such as --lora.rank 8, or leave it out",
                )
        return
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        names = ", ".join(LoraConfig().targets)
        yield ("lora.targets",), f"lora.targets {list(lora.targets)}: name at least one of {names}, each once"
    if "gate" in lora.targets and config.model.mlp != "swiglu":
        others = " ".join(target for target in lora.targets if target != "gate")
        text = f"lora.targets names gate, which model.mlp {config.model.mlp} does not have: use --lora.targets {others}"
        yield ("lora.targets", "model.mlp"), text
    if config.init.optimizer == "keep":
        yield (
            ("lora.rank", "init.optimizer"),
            "init.optimizer is keep, but with lora.rank only new adapters are trained, for which no run has an "
            "optimizer state: use init.optimizer fresh",
        )


def _optimizer_problems(config: Sections) -> Iterator[Problem]:
    """Yield options of the optimizer without effect."""
    optimizer = config.optimizer
    defaults = OptimizerConfig()
    if optimizer.name == "adamw":
        for name in ("orthogonalization", "momentum", "momentum_warmup_steps", "momentum_cooldown_steps"):
            if getattr(optimizer, name) != getattr(defaults, name):
                text = f"optimizer.{name} has no effect with optimizer.name adamw: leave it out, or use muon or normuon"
                yield (f"optimizer.{name}", "optimizer.name"), text
    elif optimizer.momentum <= MIN_MOMENTUM:
        for name in ("momentum_warmup_steps", "momentum_cooldown_steps"):
            if getattr(optimizer, name):
                text = (
                    f"optimizer.{name} changes the momentum from or to {MIN_MOMENTUM}, but optimizer.momentum is "
                    f"{optimizer.momentum:g}: use a larger one, or leave {name} out"
                )
                yield (f"optimizer.{name}", "optimizer.momentum"), text
    if optimizer.cautious_decay and not optimizer.weight_decay:
        text = "optimizer.cautious_decay has no effect with optimizer.weight_decay 0: leave it out"
        yield ("optimizer.cautious_decay", "optimizer.weight_decay"), text
    if config.lora.rank:
        for name in ("embedding_lr_scale", "head_lr_scale", "vector_lr_scale"):
            if getattr(optimizer, name) != 1:
                text = f"optimizer.{name} has no effect with lora.rank, which trains matrices only: leave it out"
                yield (f"optimizer.{name}", "lora.rank"), text
    elif config.model.tie_weights and optimizer.head_lr_scale != 1:
        text = (
            "optimizer.head_lr_scale has no effect with model.tie_weights, where the head is the embedding: use "
            "optimizer.embedding_lr_scale, or --model.tie_weights False"
        )
        yield ("optimizer.head_lr_scale", "model.tie_weights"), text


def _objective_problems(config: Sections) -> Iterator[Problem]:
    train, data = config.train, config.data
    if train.objective != "dpo":
        if train.dpo_beta != TrainConfig().dpo_beta:
            text = f"train.dpo_beta has no effect with train.objective {train.objective}: leave it out, or use dpo"
            yield ("train.objective", "train.dpo_beta"), text
        return
    for name, value in (("z_loss", train.z_loss), ("ul_alpha", train.ul_alpha)):
        if value:
            text = f"train.{name} adds to the next-token loss, which train.objective dpo does not have: leave it out"
            yield ("train.objective", f"train.{name}"), text
    if data.mode != "padded":
        text = f"train.objective dpo compares whole responses, but data.mode is {data.mode}: use --data.mode padded"
        yield ("train.objective", "data.mode"), text
    if data.mix:
        text = "train.objective dpo takes the pairs of one source: use data.source or data.files in place of data.mix"
        yield ("train.objective", "data.mix"), text
    if data.loss_on == "all":
        text = "data.loss_on all has no effect with train.objective dpo, whose loss is on the responses: leave it out"
        yield ("train.objective", "data.loss_on"), text
    if data.format not in ("auto", "chat", "preferences"):
        text = f"train.objective dpo needs pairs, and data.format {data.format} reads none: leave it out"
        yield ("train.objective", "data.format"), text
    if not (data.mix or data.files) and data.source in SOURCES and data.source != "files":
        text = (
            f"train.objective dpo needs pairs, rows with columns chosen and rejected, and data.source {data.source} "
            "has none: name files, or hf:OWNER/NAME"
        )
        yield ("train.objective", "data.source"), text


def _mesh_problems(config: Sections) -> Iterator[Problem]:
    model = config.model
    mesh = config.mesh
    for name, heads in (("model.heads", model.heads), ("model.kv_heads", model.kv_heads)):
        if heads % mesh.tensor:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            yield (
                (name, "mesh.tensor"),
                f"{name} {heads} is not divisible by mesh.tensor {mesh.tensor}: use mesh.tensor {any_of(divisors)}, "
                f"or {any_of(multiples(heads, mesh.tensor))} heads",
            )
    if model.dim % mesh.fsdp:
        yield (
            ("model.dim", "mesh.fsdp"),
            f"model.dim {model.dim} is not divisible by mesh.fsdp {mesh.fsdp}: "
            f"use dim {any_of(multiples(model.dim, mesh.fsdp))}",
        )


def _batch_problems(config: Sections) -> Iterator[Problem]:
    """Yield problems of splitting the batch into microbatches and over devices."""
    train = config.train
    if train.microbatch == "auto":
        names = ("train.batch_size", "train.accumulation")
        divisor = train.accumulation
        option = f"train.accumulation {train.accumulation}"
    else:
        names = ("train.batch_size", "train.microbatch")
        divisor = train.microbatch
        option = f"train.microbatch {train.microbatch}"
        if train.microbatch < 1:
            yield ("train.microbatch",), f"train.microbatch = {train.microbatch}: should be at least 1, or auto"
            return
        if train.accumulation > 1 and train.accumulation * train.microbatch != train.batch_size:
            yield (
                (*names, "train.accumulation"),
                f"train.microbatch {train.microbatch} x train.accumulation {train.accumulation} is not "
                f"train.batch_size {train.batch_size}: leave one of the two out, or --train.microbatch auto (the "
                "config.toml of a run has one)",
            )
            return
    if train.batch_size % divisor:
        sizes = any_of(multiples(train.batch_size, divisor))
        yield names, f"train.batch_size {train.batch_size} is not divisible by {option}: use batch_size {sizes}"
        return
    devices = max(config.mesh.data, 1) * config.mesh.fsdp
    if (train.batch_size // train.grad_accum_steps) % devices:
        yield (*names, "mesh.data", "mesh.fsdp"), batch_devices_problem(train, devices)


def batch_devices_problem(train: TrainConfig, devices: int) -> str:
    """Return the message for a batch or microbatch that cannot be split evenly over the devices.

    Args:
        train: Options of the batch.
        devices: Number of devices that the batch is split over.
    """
    if train.microbatch != "auto" and train.batch_size % devices == 0:
        fitting = [n for n in range(devices, train.batch_size + 1, devices) if train.batch_size % n == 0]
        nearest = min(fitting, key=lambda n: abs(n - int(train.microbatch)))
        return f"train.microbatch {train.microbatch} is not divisible by {devices} devices: use {nearest} or auto"
    microbatches = train.accumulation if train.microbatch == "auto" else 1
    factor = f" x {microbatches} microbatches" if microbatches > 1 else ""
    remedy = any_of(multiples(train.batch_size, devices * microbatches))
    if train.microbatch != "auto":
        remedy += " and train.microbatch auto"
    rows = train.batch_size // microbatches if train.microbatch == "auto" else int(train.microbatch)
    fewer = plural(math.gcd(rows, devices), "device")  # a divisor of the mesh, so that it can be made
    problem = f"train.batch_size {train.batch_size} is not divisible by {devices} devices{factor}"
    return f"{problem}: use {remedy}, or {fewer}"


def _data_problems(config: Sections) -> Iterator[Problem]:
    data = config.data
    if not is_source(data.source):
        near = difflib.get_close_matches(data.source, SOURCES, n=1, cutoff=0.5)
        hint = f", perhaps you meant {near[0]}" if near else ""
        yield (
            ("data.source",),
            f"data.source {data.source!r} is not known{hint}: use one of {', '.join(SOURCES)}, or hf:OWNER/NAME",
        )
    for text in hub_name_problems("data.source", [data.source]):
        yield ("data.source",), text
    for text in mix_problems(data.mix):
        yield ("data.mix",), text
    if data.mix and (data.files or data.source != "python-docs"):
        yield (
            ("data.mix", "data.files", "data.source"),
            "data.mix names the sources itself: leave out data.files and data.source",
        )
    elif data.source != "files" and data.files:
        yield (
            ("data.source", "data.files"),
            f"data.source is {data.source}, but data.files names files: leave one out, or use --data.source files",
        )
    if data.source == "files" and not data.files:
        yield ("data.source", "data.files"), "data.source is files, but data.files is empty: --data.files 'my/*.txt'"
    if data.format not in ("auto", "text"):
        if data.template:
            text = f"data.format {data.format} makes conversations, data.template prompts of plain text: leave one out"
            yield ("data.format", "data.template"), text
        if data.text_field and data.format in ("alpaca", "dolly", "preferences"):
            text = f"data.format {data.format} has columns of its own: leave out data.text_field"
            yield ("data.format", "data.text_field"), text
        if data.source == "python-docs" and not (data.mix or data.files):
            text = (
                f"data.format {data.format} makes conversations, but data.source python-docs is plain text: name files"
            )
            yield ("data.format", "data.source"), text
    if data.source == "python-chat" and not (data.mix or data.files):
        given = [name for name in ("template", "text_field", "response_field") if getattr(data, name)]
        given += ["format"] if data.format not in ("auto", "chat") else []
        if given:
            text = f"data.source python-chat generates conversations: leave out data.{' and data.'.join(given)}"
            yield ("data.source", *(f"data.{name}" for name in given)), text
    if "\n" in data.separator or data.separator != data.separator.strip():
        yield (
            ("data.separator",),
            f"data.separator {data.separator!r} can never match a whole line: remove outer spaces and line ends",
        )


def _output_problems(config: Sections) -> Iterator[Problem]:
    """Yield problems of what the run writes, its own config among it."""
    for name, value in config.flat().items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not _is_unicode(text):
                yield (name,), f"{name}: {text!r} is not valid Unicode, so the config could not be saved: rename it"
    folder = config.checkpoint.folder
    if "://" in folder and not folder.startswith("gs://"):
        yield (
            ("checkpoint.folder",),
            f"checkpoint.folder {folder!r}: should be a folder, or a bucket gs://BUCKET/FOLDER",
        )
    if config.log.profile and profiled_steps(config.log.profile) is None:
        yield (
            ("log.profile",),
            f"log.profile {config.log.profile!r}: should be FIRST:LAST, two steps from 1, such as 100:105",
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a file name that is not valid UTF-8 has surrogates
        return False
    return True


def profiled_steps(text: str) -> tuple[int, int] | None:
    """Return the first and the last step of `log.profile`, None if the text is no range of steps."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        return None
    return int(first), int(last)
