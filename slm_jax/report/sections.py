"""The parts of a run's report other than charts, scores and tokenizer."""

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from slm_jax.config.schema import Config
from slm_jax.data.corpus.splitting import SourceCounts
from slm_jax.report import escape, markup
from slm_jax.report.axes import compact, figure, percent, span
from slm_jax.report.escape import Safe
from slm_jax.report.run_data import Facts, Sample, Subject

SAMPLES = 12  # steps whose samples are shown
CALLS = 20  # of environment.json that are listed


def head(subject: Subject) -> Safe:
    """The name, the state, and the figures that matter most."""
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    what = "curriculum" if subject.is_curriculum else "run"
    about = Safe(
        f"<h1>{escape.text(subject.name)}</h1>"
        f"{markup.paragraph(f'{what}, {subject.state}. This report is of {made}.', 'muted')}"
    )
    return markup.joined([about, markup.tiles(_figures(subject)), *_notes(subject)])


def _figures(subject: Subject) -> Iterator[tuple[str, str, str]]:
    scores, columns, last = subject.scores, subject.columns, subject.last
    if scores:
        at = f"validation, step {int(scores['step']):,}"
        yield "Bits per byte", f"{scores['val_bits_per_byte']:.3f}", at
        yield "Validation loss", f"{scores['val_loss']:.3f}", f"perplexity {figure(scores['val_perplexity'], 3)}"
        yield "Accuracy", percent(scores["val_accuracy"]), "of held-out tokens"
    if last.vocab_size:
        model = last.config.model
        yield "Parameters", compact(last.parameters), f"{model.dim} wide, {model.depth} deep, {last.vocab_size:,} ids"
    if not len(columns):
        return
    seen = columns.end["tokens"]
    train = sum(manifest["train"]["tokens"] for manifest in last.manifests)
    epochs = "" if subject.is_curriculum or not train else f"{seen / train:.2f} times the training text"
    yield "Tokens predicted", compact(seen), epochs
    yield "Training time", span(columns.end["seconds"]), "validation and samples included"
    yield "Model FLOPs", f"{subject.flops:.2e}", "estimated, training"
    speed, mfu = np.nanmedian(columns["tokens_per_second"]), np.nanmedian(columns["mfu"])
    yield "Tokens per second", figure(round(float(speed))), f"median; MFU {percent(float(mfu))}"


def _notes(subject: Subject) -> Iterator[Safe]:
    said = list(notes(subject))
    if said:
        items = "".join(f"<div>{escape.text(each)}</div>" for each in said)
        yield Safe(f'<div class="note" role="note">{items}</div>')


def notes(subject: Subject) -> Iterator[str]:
    """What one should know before the figures are believed."""
    for facts in subject.stages:
        where = f"{facts.stage}: " if facts.stage else ""
        resumed = [call["step"] for call in facts.calls if isinstance(call.get("step"), int) and call["step"] > 0]
        if resumed:
            yield f"{where}Resumed after step {', '.join(f'{step:,}' for step in resumed)}."
        skipped = facts.columns["skipped"]
        if np.isfinite(skipped).any() and np.nanmax(skipped) > 0:
            yield f"{where}{int(np.nanmax(skipped)):,} batches were skipped: their loss or gradient was not usable."
        rows = facts.columns.validations
        best = min(rows, key=lambda row: row["val_loss"], default=None)
        if best is not None and rows[-1]["val_loss"] > 1.01 * best["val_loss"]:
            yield (
                f"{where}Validation loss was lowest at step {best['step']:,} ({best['val_loss']:.3f}); at step "
                f"{rows[-1]['step']:,} it is {rows[-1]['val_loss']:.3f}."
            )
    if not subject.is_finished:
        when = subject.columns["time"]
        last = f" The last row is of {markup.utc(when[-1])}." if len(when) and math.isfinite(when[-1]) else ""
        yield f"N{subject.state[1:]}.{last}"


def samples(subject: Subject) -> Safe:
    """Texts written during training, the newest first; only the newest is open."""
    found = [(facts.stage, sample) for facts in subject.stages for sample in facts.samples]
    if not found:
        return Safe("")
    kept = sorted({round(i) for i in np.linspace(0, len(found) - 1, min(len(found), SAMPLES))}, reverse=True)
    parts = []
    for number in kept:
        stage, sample = found[number]
        title = f"{stage}, step {sample.step:,}" if stage else f"Step {sample.step:,}"
        step = markup.folded(title, _texts(sample), is_open=number == len(found) - 1)
        parts.append(Safe(step.replace("<details", '<details class="sample-step"', 1)))
    left = len(found) - len(kept)
    note = [markup.paragraph(f"{left} more are in samples.md.", "small muted")] if left else []
    return markup.joined([markup.card(markup.joined(parts)), *note])


def _texts(sample: Sample) -> Safe:
    texts = [
        f'<div class="sample"><pre tabindex="0" dir="auto">{escape.text(text)}</pre></div>'
        if text
        else '<div class="sample muted">(no text: the model ended it at once)</div>'
        for text in sample.texts
    ]
    return Safe("".join(texts))


def data(subject: Subject) -> Safe:
    """What was read, what was made of it, and what was held out."""
    rows, said = [], []
    for facts in subject.stages:
        total = sum(manifest["weight"] for manifest in facts.manifests)
        for manifest in facts.manifests:
            train, held_out = manifest["train"], manifest["validation"]
            name = f"{facts.stage}: {manifest['name']}" if facts.stage else manifest["name"]
            cells = [name, percent(manifest["weight"] / total)]
            for side in (train, held_out):
                cells += [f"{side['documents']:,}", f"{side['tokens']:,}", f"{side['bytes'] / 1e6:,.2f}"]
            rows.append(cells)
            counts = SourceCounts.from_json(manifest["counts"])
            if counts.duplicates:
                said.append(f"{name}: {counts.duplicates:,} exact repeats were left out.")
            if counts.invalid:
                said.append(f"{name}: {counts.invalid_text()}.")
            if train["prompts"]:
                said.append(f"{name}: prompts are not predicted; the bytes are those of the responses.")
    if not rows:
        return Safe("")
    top = ["source", "share of batches", "documents", "tokens", "MB of text"]
    top += ["held-out documents", "held-out tokens", "held-out MB"]
    return markup.joined([markup.table(top, rows, range(1, 8), "Data"), *(markup.paragraph(s, "small") for s in said)])


def config(subject: Subject) -> Safe:
    """What differs from the defaults, and all options folded away."""
    if subject.is_curriculum:
        return config_differences([(stage.stage, stage.config) for stage in subject.stages], Config())
    now, defaults = subject.last.config.flat(), Config().flat()
    changed = [(name, value_text(now[name]), value_text(defaults[name])) for name in now if now[name] != defaults[name]]
    short = markup.table(["option", "here", "default"], changed, (), "Options that differ from the defaults")
    what = f"{len(changed)} of {len(now)} options differ from the defaults."
    parts = [markup.paragraph(what, "muted"), *([short] if changed else [])]
    rows = []
    for section_name, section in subject.last.config:
        for field, info in type(section).model_fields.items():
            name = f"{section_name}.{field}"
            differs = now[name] != defaults[name]
            shown = _marked(now[name]) if differs else value_text(now[name])
            rows.append((name, shown, value_text(defaults[name]), info.description or ""))
    whole = markup.table(["option", "here", "default", "meaning"], rows, (), "All options")
    return markup.joined([*parts, markup.folded(f"All {len(rows)} options", whole)])


def config_differences(configs: list[tuple[str, Config]], defaults: Config | None = None) -> Safe:
    """The options in which configs differ from each other (with defaults: or from those), a column for each config."""
    flat, base = [config.flat() for _, config in configs], defaults.flat() if defaults else {}
    rows = []
    for name, first in flat[0].items():
        values, default = [each[name] for each in flat], base.get(name, first)
        if any(value != default for value in values):
            texts = [_marked(value) if base and value != default else value_text(value) for value in values]
            rows.append([name, *texts, *[value_text(default)] * bool(base)])
    if not rows:
        return markup.paragraph("No option differs.", "muted")
    top = ["option", *(name for name, _ in configs), *["default"] * bool(base)]
    return markup.table(top, rows, (), "Options that differ")


def _marked(value: Any) -> Safe:
    """A value that is not the default."""
    return Safe(f'<span class="changed">{escape.text(value_text(value))}</span>')


def value_text(value: Any) -> str:
    """An option's value as TOML writes it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def environment(subject: Subject) -> Safe:
    """Device and versions of the newest call, and the calls there were."""
    calls = [(facts, call) for facts in subject.stages for call in facts.calls]
    parts = [markup.card(markup.facts_list(_cost(subject)), "Cost")]
    if calls:
        title = "The newest call" if len(calls) > 1 else "Environment"
        parts.insert(0, markup.card(markup.facts_list(_call(calls[-1][1])), title))
    found = [Safe(f'<div class="pair">{markup.joined(parts)}</div>')]
    if len(calls) > 1:
        rows = [_call_row(facts, call) for facts, call in calls[-CALLS:]]
        top = ["began", "after step", "device", "jax", "commit"]
        found.append(markup.folded(f"{len(calls)} calls", markup.table(top, rows, {1}, "Calls")))
    if not calls:
        found.append(markup.paragraph("Versions and device were not recorded (no environment.json).", "small muted"))
    return markup.joined(found)


def _call(call: dict[str, Any]) -> Iterator[tuple[str, object]]:
    count, kind = call.get("devices", 1), call.get("device", "")
    mesh = ", ".join(f"{axis} {size}" for axis, size in (call.get("mesh") or {}).items() if size != 1)
    yield "Device", f"{count} x {kind}" + (f" ({mesh})" if mesh else "")
    if call.get("processes", 1) != 1:
        yield "Processes", call["processes"]
    for name in ("precision", "attention"):
        yield name.capitalize(), call.get(name)
    yield "MFU is of", call.get("mfu_of")
    memory = f", {call['memory_gb']:g} GB" if isinstance(call.get("memory_gb"), int | float) else ""
    yield "Processor", f"{call.get('processor', '')} ({call.get('cores', '?')} cores{memory})"
    yield "System", call.get("system")
    yield "Python", call.get("python")
    yield "slm_jax", " ".join(filter(None, [str(call.get("slm_jax", "")), str(call.get("commit", ""))]))
    yield "Packages", ", ".join(f"{name} {version}" for name, version in (call.get("packages") or {}).items())
    if isinstance(call.get("time"), int | float):
        yield "Began", markup.utc(call["time"])


def _call_row(facts: Facts, call: dict[str, Any]) -> tuple[object, ...]:
    when = markup.utc(call["time"]) if isinstance(call.get("time"), int | float) else ""
    step = f"{facts.stage} {call.get('step', '')}".strip()
    device = f"{call.get('devices', '')} x {call.get('device', '')}"
    return when, step, device, (call.get("packages") or {}).get("jax", ""), call.get("commit", "")


def _cost(subject: Subject) -> Iterator[tuple[str, object]]:
    columns, last = subject.columns, subject.last
    if not len(columns):
        yield "Steps", "none yet"
        return
    seconds = columns.end["seconds"]
    yield "Training time", f"{span(seconds)} (steps, validation and samples; no compilation)"
    times = columns["time"][np.isfinite(columns["time"])]
    if times.size:
        yield "First to last row", f"{span(float(times[-1] - times[0]))} of wall time, {markup.utc(float(times[0]))} on"
    yield "Model FLOPs", f"{subject.flops:.3e}"
    each = last.flops_per_token
    yield "A token", f"{each:.3e} FLOPs (6 a matrix parameter, 12 a layer, channel and key attended to)"
    if seconds > 0:
        speed = compact(columns["input_tokens"].sum() / seconds)
        yield "On average", f"{speed} tokens/s, {subject.flops / seconds / 1e12:.3g} TFLOP/s"
    sizes = f"{last.config.train.batch_size} sequences of {last.config.train.sequence_length} tokens"
    yield "A step", f"{sizes}, {np.nanmedian(columns['bytes']) / 1e3:.1f} kB of text (median)"
