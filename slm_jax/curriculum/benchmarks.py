"""One CSV row per measured stage or run: `python -m slm_jax.benchmark_logger --run runs/NAME`.

Several processes may append to one file: a lock is held while a row is written in a single piece, what a crash has left
of a last line is cut off first, and the header is written once. A row is known by its stage, step and the time of
that step: the same model measured again, after a kill, adds none.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from slm_jax.config.schema import Config
from slm_jax.report.training_plot import save_figure
from slm_jax.run.directory import Run, curriculum_of
from slm_jax.run.metrics import Row, read_metrics
from slm_jax.run.results import BENCHMARKS, Benchmark, file_errors
from slm_jax.utils.errors import UserError


def measure(run: Run) -> Benchmark:
    """The row of a run as its files say, after its last validation. Raises UserError if it was never validated."""
    from slm_jax.performance import flops
    from slm_jax.run.load import load_tokenizer

    rows = read_metrics(run.metrics)
    last = max((i for i, row in enumerate(rows) if row.get("val_loss") is not None), default=None)
    if last is None:
        raise UserError(
            f"{run.path} was never validated, so there is nothing to log: train it to --eval.every or its end"
        )
    config, row, done = run.read_config(), rows[last], rows[: last + 1]
    place = _trained_on(run)
    return Benchmark(
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row["time"])),
        stage=run.path.name,
        model=f"{config.model.dim}x{config.model.depth}",
        device=place["device"],
        parameters=flops.parameters(config.model, load_tokenizer(run).vocab_size),
        dataset=" ".join(config.data.mix or config.data.files or (config.data.source,)),
        sequence_length=config.train.sequence_length,
        steps=row["step"],
        items=row["step"] * config.train.batch_size,
        batch=config.train.batch_size,
        tokens=sum(each["tokens"] for each in done),
        seconds=row["seconds"],
        loss=row["val_loss"],
        perplexity=row["val_perplexity"],
        accuracy=row["val_accuracy"],
        bits_per_byte=row["val_bits_per_byte"],
        train_loss=math.nan if row["loss"] is None else row["loss"],
        tokens_per_second=statistics.median(each["tokens_per_second"] for each in done),
        mfu=statistics.median(each["mfu"] for each in done),
        version=place["version"],
        jax=place["jax"],
        config=config_hash(run),
        commit=place["commit"],
    )


def config_hash(run: Run) -> str:
    """12 hexadecimal digits of the fields of a run's config that its result depends on, without paths to other runs."""
    skipped = (Config.fields_with("resumable") - {"train.steps"}) | {"init.from_run", "tokenizer.path"}
    default = Config().flat()  # left out, so that fields of later versions change nothing
    flat = {k: v for k, v in run.read_config().flat().items() if k not in skipped and v != default[k]}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12]


def _trained_on(run: Run) -> dict[str, str]:
    """device, version, jax and commit of the run's last call; empty where it does not say."""
    from slm_jax.run import environment

    call = (environment.read_calls(run) or [{}])[-1]
    device = call.get("processor" if call.get("platform") == "cpu" else "device", "")
    number = call.get("devices", 1)
    return {
        "device": f"{number} x {device}" if number > 1 else device,
        "version": call.get("slm_jax", ""),
        "jax": call.get("packages", {}).get("jax", ""),
        "commit": call.get("commit", ""),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal, the main columns."""
    shown = ("stage", "dataset", "steps", "loss", "perplexity", "accuracy", "bits_per_byte", "tokens_per_second", "mfu")
    forms = {"loss": ".3f", "perplexity": ".1f", "accuracy": ".1%", "bits_per_byte": ".3f", "mfu": ".0%"}
    forms |= {"steps": ",", "tokens_per_second": ",.0f"}
    cells = [[name.replace("_", " ") for name in shown]]
    cells += [[format(row[name], forms.get(name, ""))[:32] for name in shown] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    texts = [
        [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in cells
    ]
    return "\n".join("  ".join(line).rstrip() for line in texts)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bits per byte, accuracy and speed of the rows in their order, as a PNG. Raises UserError where none can be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.1 * len(rows) + 3), 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True)
    named = (("bits_per_byte", "bits per byte"), ("accuracy", "accuracy"), ("tokens_per_second", "tokens/s"))
    for axes, (name, label) in zip(panels, named, strict=True):
        bars = axes.bar(range(len(rows)), [row[name] for row in rows], color="tab:blue", width=0.6)
        axes.bar_label(bars, fmt="{:,.0f}" if name == "tokens_per_second" else "{:.3f}", fontsize=8)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
        axes.grid(alpha=0.3, axis="y")
    labels = [f"{row['stage']}\nstep {row['steps']:,}" for row in rows]
    panels[-1].set_xticks(range(len(rows)), labels, fontsize=8)
    with file_errors(path):
        save_figure(figure, path)


def default_file(run: Run) -> Path:
    """Where the rows of a run are by default: in its folder, or in that of the curriculum that it is a stage of."""
    return (curriculum_of(run) or run.path) / BENCHMARKS
