"""The head of the page, and the sections about samples, data, config, environment and cost."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from slm_jax.config.schema import Config
from slm_jax.data.corpus.splitting import SourceCounts
from slm_jax.report import markup
from slm_jax.report.axes import format_compact, format_duration, format_number, format_percent
from slm_jax.report.escaping import SafeHtml, escape_text
from slm_jax.report.run_data import ReportData, RunData
from slm_jax.run.metrics import Row
from slm_jax.run.samples import Sample
from slm_jax.utils.formatting import plural

_MAX_SAMPLES = 12  # steps whose samples are shown
_MAX_CALLS = 20  # entries of environment.json that are listed
_OVERFITTING = 1.01  # a final validation loss above the best one by this factor is noted


def page_head(data: ReportData) -> SafeHtml:
    """Return the name, the state and the most important values of a run, and notes about it."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    kind = "Curriculum" if data.is_curriculum else "Run"
    title = SafeHtml(f"<h1>{escape_text(data.name)}</h1>")
    state = markup.paragraph(f"{kind} {data.state}. Report written {now}.", "muted")
    return markup.concatenate([title, state, markup.tiles(_key_values(data)), markup.note(list(notes(data)))])


def _key_values(data: ReportData) -> Iterator[tuple[str, str, str]]:
    scores = data.scores
    columns = data.columns
    last = data.last
    if scores:
        yield "Bits per byte", f"{scores['val_bits_per_byte']:.3f}", f"validation, step {int(scores['step']):,}"
        perplexity = format_number(scores["val_perplexity"], 3)
        is_dpo = last.config.train.objective == "dpo"
        of_loss = f"per pair; chosen responses: perplexity {perplexity}" if is_dpo else f"perplexity {perplexity}"
        yield "Validation loss", f"{scores['val_loss']:.3f}", of_loss
        yield "Accuracy", format_percent(scores["val_accuracy"]), f"of held-out {'pairs' if is_dpo else 'tokens'}"
    if last.vocab_size:
        model = last.config.model
        shape = f"width {model.dim}, depth {model.depth}, vocabulary {last.vocab_size:,}"
        yield "Parameters", format_compact(last.num_parameters), shape
    if not len(columns):
        return
    tokens = columns.end["tokens"]
    epoch = sum(manifest["train"]["tokens"] for manifest in last.manifests)
    epochs = "" if data.is_curriculum or not epoch else f"{tokens / epoch:.2f} epochs"
    yield "Tokens predicted", format_compact(tokens), epochs
    yield "Training time", format_duration(columns.end["seconds"]), "including validation and samples"
    yield "Model FLOPs", f"{data.flops:.2e}", "of training, estimated"
    speed = float(np.nanmedian(columns["tokens_per_second"]))
    mfu = float(np.nanmedian(columns["mfu"]))
    yield "Tokens per second", format_number(round(speed)), f"median; MFU {format_percent(mfu)}"


def notes(data: ReportData) -> Iterator[str]:
    """Yield what a reader should know before relying on the numbers."""
    for stage in data.stages:
        prefix = f"{stage.stage}: " if stage.stage else ""
        for note in _stage_notes(stage):
            yield f"{prefix}{note}"
    if not data.is_finished:
        state = data.state[0].upper() + data.state[1:]
        times = data.columns["time"]
        last = ""
        if len(times) and math.isfinite(times[-1]):
            last = f" The last metrics are from {markup.format_utc(times[-1])}."
        yield f"{state}.{last}"


def steps_text(steps: Sequence[int]) -> str:
    """Return a list of steps in words; digits are not grouped, because "499, 1,000" reads like one number."""
    *others, last = map(str, steps)
    return f"steps {', '.join(others)} and {last}" if others else f"step {steps[0]:,}"


def _stage_notes(stage: RunData) -> Iterator[str]:
    resumed = [call["step"] for call in stage.calls if isinstance(call.get("step"), int) and call["step"] > 0]
    if resumed:
        yield f"Resumed after {steps_text(resumed)}."
    skipped = stage.columns["skipped"]
    if np.isfinite(skipped).any() and np.nanmax(skipped) > 0:
        scales = stage.columns["loss_scale"]
        overflows = ""
        if np.isfinite(scales).any():
            overflows = f" (overflows of float16 among them; the loss scale is {scales[np.isfinite(scales)][-1]:g})"
        yield (
            f"{int(np.nanmax(skipped)):,} batches were skipped because of a non-finite or spiking loss or "
            f"gradient{overflows}."
        )
    validations: list[Row] = stage.columns.validations
    if not validations:
        return
    best = min(validations, key=lambda row: row["val_loss"])
    last = validations[-1]
    if last["val_loss"] > _OVERFITTING * best["val_loss"]:
        yield (
            f"Validation loss was lowest at step {best['step']:,} ({best['val_loss']:.3f}); at step {last['step']:,} "
            f"it is {last['val_loss']:.3f}."
        )


def samples_section(data: ReportData) -> SafeHtml:
    """Return the texts generated during training, the newest first and open."""
    samples = [(stage.stage, sample) for stage in data.stages for sample in stage.samples]
    if not samples:
        return SafeHtml("")
    count = min(len(samples), _MAX_SAMPLES)
    shown = sorted({round(i) for i in np.linspace(0, len(samples) - 1, count)}, reverse=True)
    parts = []
    for index in shown:
        stage, sample = samples[index]
        title = f"{stage}, step {sample.step:,}" if stage else f"Step {sample.step:,}"
        is_newest = index == len(samples) - 1
        parts.append(markup.collapsible(title, _sample_texts(sample), is_newest, "sample-step"))
    blocks = [markup.card(markup.concatenate(parts))]
    omitted = len(samples) - len(shown)
    if omitted:
        blocks.append(markup.paragraph(f"{omitted} more are in samples.md.", "small muted"))
    return markup.concatenate(blocks)


def _sample_texts(sample: Sample) -> SafeHtml:
    texts = []
    for text in sample.texts:
        if text:
            texts.append(f'<div class="sample"><pre tabindex="0" dir="auto">{escape_text(text)}</pre></div>')
        else:
            texts.append('<div class="sample muted">(empty: the model generated &lt;EOS&gt; immediately)</div>')
    return SafeHtml("".join(texts))


def data_section(data: ReportData) -> SafeHtml:
    """Return the sizes of the training and held-out text by source, and what was removed from them."""
    rows = []
    remarks = []
    for stage in data.stages:
        total_weight = sum(manifest["weight"] for manifest in stage.manifests)
        for manifest in stage.manifests:
            name = f"{stage.stage}: {manifest['name']}" if stage.stage else manifest["name"]
            cells = [name, format_percent(manifest["weight"] / total_weight)]
            for split in (manifest["train"], manifest["validation"]):
                cells += [f"{split['documents']:,}", f"{split['tokens']:,}", f"{split['bytes'] / 1e6:,.2f}"]
            rows.append(cells)
            counts = SourceCounts.from_json(manifest["counts"])
            if "turns" in manifest["train"]:
                remarks.append(f"{name}: {_conversations(manifest['train'])} to train on, ")
                remarks[-1] += f"{_conversations(manifest['validation'])} held out."
            if counts.cut:
                remarks.append(
                    f"{name}: there are too few documents to hold out whole ones: the beginning of "
                    f"{plural(counts.cut, 'document')} is held out, and {plural(counts.gaps, 'character')} after it "
                    "are not used."
                )
            if counts.duplicates:
                remarks.append(f"{name}: removed {plural(counts.duplicates, 'duplicate')}.")
            if counts.invalid:
                remarks.append(f"{name}: {counts.invalid_text()}.")
            excluded = manifest.get("excluded", {})
            if excluded.get("train"):
                count = plural(excluded["train"], "document")
                remarks.append(f"{name}: left {count} out of training, held out elsewhere.")
            if excluded.get("validation"):
                count = plural(excluded["validation"], "held-out document")
                remarks.append(
                    f"{name}: left {count} out of validation: the initial weights were trained on this text."
                )
            if excluded.get("all_seen"):
                remarks.append(f"{name}: the initial weights were trained on all held-out documents.")
            if manifest["train"]["prompts"]:
                remarks.append(f"{name}: prompts are not predicted; the sizes in MB are those of the responses.")
        remarks += _overlap_remark(stage)
    if not rows:
        return SafeHtml("")
    header = ["source", "share of batches", "documents", "tokens", "MB of text"]
    header += ["held-out documents", "held-out tokens", "held-out MB"]
    table = markup.table(header, rows, range(1, 8), "Data")
    return markup.concatenate([table, *(markup.paragraph(remark, "small") for remark in remarks)])


def _conversations(split: dict[str, Any]) -> str:
    return f"{plural(split['documents'], 'conversation')} with {plural(split['turns'], 'turn')} of the assistant"


def _overlap_remark(stage: RunData) -> Iterator[str]:
    """Yield how much held-out text is also training text."""
    prefix = f"{stage.stage}: " if stage.stage else ""
    if stage.overlap is not None:
        summary = stage.overlap.summary()
        yield f"{prefix}{summary if prefix else summary[0].upper() + summary[1:]}."
    elif stage.manifests:
        yield (
            f"{prefix}How much held-out text is also training text was not measured: python -m slm_jax.data inspect "
            f"{stage.run.path} does."
        )


def config_section(data: ReportData) -> SafeHtml:
    """Return the options that differ from the defaults, and all options in a collapsible table."""
    if data.is_curriculum:
        return config_differences([(stage.stage, stage.config) for stage in data.stages], Config())
    values = data.last.config.flat()
    defaults = Config().flat()
    changed = [name for name in values if values[name] != defaults[name]]
    parts = [markup.paragraph(f"{len(changed)} of {len(values)} options differ from the defaults.", "muted")]
    if changed:
        rows = [(name, toml_value(values[name]), toml_value(defaults[name])) for name in changed]
        parts.append(markup.table(["option", "value", "default"], rows, (), "Options that differ from the defaults"))
    all_rows = []
    for section_name, section in data.last.config:
        for field, info in type(section).model_fields.items():
            name = f"{section_name}.{field}"
            value = _marked(values[name]) if name in changed else toml_value(values[name])
            all_rows.append((name, value, toml_value(defaults[name]), info.description or ""))
    table = markup.table(["option", "value", "default", "description"], all_rows, (), "All options")
    return markup.concatenate([*parts, markup.collapsible(f"All {len(all_rows)} options", table)])


def config_differences(configs: list[tuple[str, Config]], defaults: Config | None = None) -> SafeHtml:
    """Return the options in which configs differ, with a column per config.

    Args:
        configs: Names and configs.
        defaults: If given, show the options that differ from these, and mark the values that do.
    """
    flat = [config.flat() for _, config in configs]
    base = defaults.flat() if defaults else None
    rows = []
    for name, first in flat[0].items():
        values = [options[name] for options in flat]
        reference = base.get(name, first) if base else first
        if all(value == reference for value in values):
            continue
        cells: list[object] = [name]
        for value in values:
            cells.append(_marked(value) if base and value != reference else toml_value(value))
        if base:
            cells.append(toml_value(reference))
        rows.append(cells)
    if not rows:
        return markup.paragraph("No options differ.", "muted")
    header = ["option", *(name for name, _ in configs)]
    if base:
        header.append("default")
    return markup.table(header, rows, (), "Options that differ")


def _marked(value: Any) -> SafeHtml:
    """Return a value with the mark of one that is not the default."""
    return SafeHtml(f'<span class="changed">{escape_text(toml_value(value))}</span>')


def toml_value(value: Any) -> str:
    """Return the value of an option as in TOML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def environment_section(data: ReportData) -> SafeHtml:
    """Return device and versions of the latest training call, the cost of training, and the list of calls."""
    calls = [(stage, call) for stage in data.stages for call in stage.calls]
    cards = [markup.card(markup.properties(_cost(data)), "Cost")]
    if calls:
        title = "Environment of the latest call" if len(calls) > 1 else "Environment"
        cards.insert(0, markup.card(markup.properties(_call_properties(calls[-1][1])), title))
    blocks = [SafeHtml(f'<div class="pair">{markup.concatenate(cards)}</div>')]
    if len(calls) > 1:
        rows = [_call_row(stage, call) for stage, call in calls[-_MAX_CALLS:]]
        table = markup.table(["started", "after step", "device", "jax", "commit"], rows, {1}, "Training calls")
        blocks.append(markup.collapsible(f"{len(calls)} training calls", table))
    if not calls:
        blocks.append(markup.paragraph("Versions and device were not recorded (no environment.json).", "small muted"))
    return markup.concatenate(blocks)


def _call_properties(call: dict[str, Any]) -> Iterator[tuple[str, object]]:
    device = f"{call.get('devices', 1)} x {call.get('device', '')}"
    mesh = ", ".join(f"{axis} {size}" for axis, size in (call.get("mesh") or {}).items() if size != 1)
    yield "Device", f"{device} ({mesh})" if mesh else device
    if call.get("processes", 1) != 1:
        yield "Processes", call["processes"]
    yield "Precision", call.get("precision")
    yield "Attention", call.get("attention")
    yield "MFU baseline", call.get("mfu_of")
    memory = f", {call['memory_gb']:g} GB" if isinstance(call.get("memory_gb"), int | float) else ""
    yield "Processor", f"{call.get('processor', '')} ({call.get('cores', '?')} cores{memory})"
    yield "System", call.get("system")
    yield "Python", call.get("python")
    version = [str(call.get("slm_jax", "")), str(call.get("commit", ""))]
    yield "slm_jax", " ".join(part for part in version if part)
    yield "Packages", ", ".join(f"{name} {version}" for name, version in (call.get("packages") or {}).items())
    if isinstance(call.get("time"), int | float):
        yield "Started", markup.format_utc(call["time"])


def _call_row(stage: RunData, call: dict[str, Any]) -> tuple[object, ...]:
    started = markup.format_utc(call["time"]) if isinstance(call.get("time"), int | float) else ""
    step = f"{stage.stage} {call.get('step', '')}".strip()
    device = f"{call.get('devices', '')} x {call.get('device', '')}"
    return started, step, device, (call.get("packages") or {}).get("jax", ""), call.get("commit", "")


def _cost(data: ReportData) -> Iterator[tuple[str, object]]:
    columns = data.columns
    last = data.last
    if not len(columns):
        yield "Steps", "none yet"
        return
    seconds = columns.end["seconds"]
    yield "Training time", f"{format_duration(seconds)} (steps, validation and samples, without compilation)"
    times = columns["time"][np.isfinite(columns["time"])]
    if times.size:
        elapsed = format_duration(float(times[-1] - times[0]))
        yield "Wall time", f"{elapsed} from the first to the last step, since {markup.format_utc(float(times[0]))}"
    yield "Model FLOPs", f"{data.flops:.3e}"
    formula = "6 per matrix parameter, 12 per layer, channel and attended key"
    yield "FLOPs per token", f"{last.flops_per_token:.3e} ({formula})"
    if seconds > 0:
        speed = format_compact(columns["input_tokens"].sum() / seconds)
        yield "Average speed", f"{speed} tokens/s, {data.flops / seconds / 1e12:.3g} TFLOP/s"
    train = last.config.train
    text = f"{np.nanmedian(columns['bytes']) / 1e3:.1f} kB of text (median)"
    yield "Batch", f"{train.batch_size} sequences of {train.sequence_length} tokens, {text}"
