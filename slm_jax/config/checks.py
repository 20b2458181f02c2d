"""What fields of a config must be to each other: found all at once, each with what would do instead."""

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm_jax.config.schema import Config, ModelConfig, TrainConfig

# Names of sources; `hf:owner/name[:config][:split]` is any data set of the Hugging Face hub.
SOURCES: tuple[str, ...] = ("python-docs", "python-qa", "files", "tinystories", "wikitext", "wikitext-2", "openwebtext")
SOURCES += ("fineweb-edu", "cosmopedia", "wikipedia", "alpaca", "dolly")


def is_source(name: str) -> bool:
    """Whether data.source may be this: a name, one with `:CONFIG` behind it (wikipedia:he), or a hub id."""
    return name.startswith("hf:") or name.partition(":")[0] in SOURCES


def cross_checks(c: "Config") -> Iterator[tuple[tuple[str, ...], str]]:
    """Problems that involve several fields: (the fields, what is wrong and what to do)."""
    m = c.model
    if m.dim % m.heads:
        near = [h for h in range(1, m.dim + 1) if m.dim % h == 0 and (m.dim // h) % 2 == 0]
        near.sort(key=lambda h: abs(h - m.heads))
        yield (
            ("model.dim", "model.heads"),
            f"model.dim {m.dim} is not divisible by model.heads {m.heads} into heads of even width: use "
            + (f"{either(near[:2])} heads, or " if near else "")
            + f"dim {either(multiples(m.dim, 2 * m.heads))}",
        )
    elif (m.dim // m.heads) % 2:
        yield (
            ("model.dim", "model.heads"),
            f"model.dim / model.heads = {m.dim // m.heads} is odd, but rotary positions pair the channels of a head: "
            f"use dim {either(multiples(m.dim, 2 * m.heads))}",
        )
    if m.kv_heads and m.heads % m.kv_heads:
        valid = [k for k in range(1, m.heads + 1) if m.heads % k == 0]
        yield (
            ("model.heads", "model.kv_heads"),
            f"model.heads {m.heads} is not divisible by model.kv_heads {m.kv_heads}: use one of {valid}",
        )
    if c.init.from_hf and c.init.from_run:
        yield (
            ("init.from_hf", "init.from_run"),
            "init.from_run and init.from_hf are both given, but a run begins with one of them: leave the other out",
        )
    if c.init.optimizer == "carry" and not c.init.from_run:
        yield (
            ("init.optimizer", "init.from_run"),
            "init.optimizer is carry, but there is no run to carry it from: give --init.from_run, or leave it fresh",
        )
    yield from _mesh_checks(c)
    yield from _batch_checks(c)
    yield from _data_checks(c)
    if "://" in c.checkpoint.folder and not c.checkpoint.folder.startswith("gs://"):
        yield (
            ("checkpoint.folder",),
            f"checkpoint.folder {c.checkpoint.folder!r}: should be a folder, or of a bucket gs://BUCKET/FOLDER",
        )
    if c.log.profile and profiled_steps(c.log.profile) is None:
        yield (
            ("log.profile",),
            f"log.profile {c.log.profile!r}: should be FIRST:LAST, two steps from 1, such as 100:105",
        )


def profiled_steps(text: str) -> tuple[int, int] | None:
    """The first and the last step of `log.profile`; None if they are not that."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        return None
    return int(first), int(last)


def _data_checks(c: "Config") -> Iterator[tuple[tuple[str, ...], str]]:
    if not is_source(c.data.source):
        likely = difflib.get_close_matches(c.data.source, SOURCES, n=1, cutoff=0.5)
        yield (
            ("data.source",),
            f"data.source {c.data.source!r} is not known"
            + (f", perhaps you meant {likely[0]}" if likely else "")
            + f": it is one of {', '.join(SOURCES)}, or hf:OWNER/NAME",
        )
    if c.data.mix and (c.data.files or c.data.source != "python-docs"):
        yield (
            ("data.mix", "data.files", "data.source"),
            "data.mix names the sources itself: leave out data.files and data.source",
        )
    elif c.data.source != "files" and c.data.files:
        yield (
            ("data.source", "data.files"),
            f"data.source is {c.data.source}, but data.files names files: leave one out, or --data.source files",
        )
    if "\n" in c.data.separator or c.data.separator != c.data.separator.strip():
        yield (
            ("data.separator",),
            f"data.separator {c.data.separator!r} can never be all of a line: leave out outer spaces and line ends",
        )
    for name, value in c.flat().items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not _is_unicode(text):
                yield (name,), f"{name}: {text!r} is not valid Unicode, so the config could not be saved: rename it"
    if c.data.source == "files" and not c.data.files:
        yield ("data.source", "data.files"), "data.source is files, but data.files names none: --data.files 'my/*.txt'"


def _mesh_checks(c: "Config") -> Iterator[tuple[tuple[str, ...], str]]:
    m, tensor = c.model, c.mesh.tensor
    for name, heads in (("model.heads", m.heads), ("model.kv_heads", m.kv_heads)):
        if heads % tensor:
            fitting = [n for n in range(1, heads + 1) if heads % n == 0]
            yield (
                (name, "mesh.tensor"),
                f"{name} {heads} do not divide over mesh.tensor {tensor}: use mesh.tensor {either(fitting)}, "
                f"or {either(multiples(heads, tensor))} heads",
            )
    if m.dim % (fsdp := c.mesh.fsdp):
        valid = either(multiples(m.dim, fsdp))
        yield ("model.dim", "mesh.fsdp"), f"model.dim {m.dim} does not divide over mesh.fsdp {fsdp}: use dim {valid}"


def _batch_checks(c: "Config") -> Iterator[tuple[tuple[str, ...], str]]:
    """Problems of the batch's division into parts and over devices."""
    t = c.train
    batch, micro = "train.batch_size", "train.microbatch"
    if t.microbatch == "auto":
        names, problem = ("train.batch_size", "train.accumulation"), f"train.accumulation {t.accumulation}"
        divisor = t.accumulation
    else:
        names, problem, divisor = (batch, micro), f"train.microbatch {t.microbatch}", t.microbatch
        if t.microbatch < 1:
            yield (micro,), f"train.microbatch = {t.microbatch}: should be at least 1, or auto"
            return
        if t.accumulation > 1 and t.accumulation * t.microbatch != t.batch_size:
            yield (
                (*names, "train.accumulation"),
                f"train.microbatch {t.microbatch} x train.accumulation {t.accumulation} is not train.batch_size "
                f"{t.batch_size}: leave one of the two out, or --train.microbatch auto (a run's config.toml has one)",
            )
            return
    if t.batch_size % divisor:
        yield (
            names,
            f"train.batch_size {t.batch_size} is not divisible by {problem}: "
            f"use batch_size {either(multiples(t.batch_size, divisor))}",
        )
    elif (t.batch_size // t.grad_accum_steps) % (rows := max(c.mesh.data, 1) * c.mesh.fsdp):
        yield (*names, "mesh.data", "mesh.fsdp"), batch_devices_problem(t, rows)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def batch_devices_problem(t: "TrainConfig", devices: int) -> str:
    """The sentence for a batch, or the part of one that is computed at once, that does not divide over the devices."""
    if t.microbatch != "auto" and t.batch_size % devices == 0:
        fitting = [m for m in range(devices, t.batch_size + 1, devices) if t.batch_size % m == 0]
        fitting.sort(key=lambda m: abs(m - int(t.microbatch)))
        return f"train.microbatch {t.microbatch} is not divisible by {devices} devices: use {fitting[0]} or auto"
    parts = 1 if t.microbatch != "auto" else t.accumulation
    valid = either(multiples(t.batch_size, devices * parts))
    found = f" x {parts} accumulated parts" if parts > 1 else ""
    also = " and train.microbatch auto" if t.microbatch != "auto" else ""
    return f"train.batch_size {t.batch_size} is not divisible by {devices} devices{found}: use {valid}{also}"


def multiples(value: int, step: int) -> list[int]:
    """The multiples of step around value, positive ones only."""
    below = value // step * step
    return [n for n in (below, below + step) if n > 0]


def either(values: Sequence[int]) -> str:
    return " or ".join(str(v) for v in values)


# What the parameters and their meaning depend on; dropout, window, rotary base, attention and remat may differ.
_SHAPING = ("dim", "depth", "heads", "kv_heads", "mlp_dim", "mlp_multiple", "tie_weights", "qk_norm", "vocab_multiple")


def misfits(config: "Config", theirs: "Config") -> Iterator[str]:
    """Why a run of one config cannot begin with the weights of one of another."""
    for name in _SHAPING:
        here, there = _resolved(config.model, name), _resolved(theirs.model, name)
        if here != there:
            yield f"model.{name}: {there!r} there, {here!r} here"
    if config.init.optimizer == "carry" and config.optimizer.name != theirs.optimizer.name:
        yield (
            f"optimizer.name: {theirs.optimizer.name!r} there, {config.optimizer.name!r} here; moments can be carried "
            "to the same optimizer only (init.optimizer fresh begins new ones)"
        )


def _resolved(model: "ModelConfig", name: str) -> Any:
    return model.kv_heads or model.heads if name == "kv_heads" else getattr(model, name)
