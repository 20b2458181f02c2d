"""The benchmark row of a stage or run: `python -m slm_jax.benchmark_logger --run runs/NAME`.

A row holds the last validation of a run, its speed, and what they depend on. It is identified by stage, step and the
time of that step: the same model, measured again after a kill, adds no row. Rows are read and written by
`slm_jax.run.results`.
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
from slm_jax.utils.formatting import text_table
from slm_jax.utils.labels import source_labels

# Columns of the text table, with their formats.
_TABLE = {
    "stage": "",
    "dataset": "",
    "steps": ",",
    "loss": ".3f",
    "perplexity": ".1f",
    "accuracy": ".1%",
    "bits_per_byte": ".3f",
    "tokens_per_second": ",.0f",
    "mfu": ".0%",
}
_MAX_WIDTH = 32  # of a cell of the text table


def _dataset_text(config: Config) -> str:
    """Return the labels of a config's sources, those of a mixture with their weights: `python-docs=1 my=3`."""
    data = config.data
    if not data.mix:
        return " ".join(source_labels(data.files or (data.source,)))
    entries = [entry.rpartition("=") for entry in data.mix]  # a name without a weight is the last of the three
    labels = source_labels([name or last for name, _, last in entries])
    return " ".join(
        f"{label}={last}" if equals else label for label, (_, equals, last) in zip(labels, entries, strict=True)
    )


def measure(run: Run) -> Benchmark:
    """Return the benchmark row of a run after its last validation.

    Raises:
        UserError: The run was never validated, or one of its files is damaged.
    """
    from slm_jax.performance import flops
    from slm_jax.run.load import load_tokenizer

    rows = read_metrics(run.metrics)
    validated = [i for i, row in enumerate(rows) if row.get("val_loss") is not None]
    if not validated:
        raise UserError(
            f"{run.path} was never validated, so there is nothing to log: train it to --eval.every or its end"
        )
    row = rows[validated[-1]]
    done = rows[: validated[-1] + 1]
    config = run.read_config()
    call = _last_call(run)
    is_dpo = config.train.objective == "dpo"  # its loss and accuracy are of pairs, not of tokens
    loss = math.nan if is_dpo or row["loss"] is None else row["loss"]
    return Benchmark(
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row["time"])),
        stage=run.path.name,
        model=f"{config.model.dim}x{config.model.depth}",
        device=call["device"],
        parameters=flops.parameters(config.model, load_tokenizer(run).vocab_size),
        dataset=_dataset_text(config),
        sequence_length=config.train.sequence_length,
        steps=row["step"],
        items=row["step"] * config.train.batch_size,
        batch=config.train.batch_size,
        tokens=sum(each["tokens"] for each in done),
        seconds=row["seconds"],
        loss=math.log(row["val_perplexity"]) if is_dpo else row["val_loss"],
        perplexity=row["val_perplexity"],
        accuracy=math.nan if is_dpo else row["val_accuracy"],
        bits_per_byte=row["val_bits_per_byte"],
        train_loss=loss,
        tokens_per_second=statistics.median(each["tokens_per_second"] for each in done),
        mfu=statistics.median(each["mfu"] for each in done),
        version=call["version"],
        jax=call["jax"],
        config=config_hash(run),
        commit=call["commit"],
    )


def config_hash(run: Run) -> str:
    """Return a hash of the options that the result of a run depends on, without paths to other runs.

    Options with default values are left out, so that options of later versions change nothing.

    Returns:
        12 hexadecimal digits.
    """
    skipped = Config.fields_with("resumable") - {"train.steps"}
    # Execution options were part of the hash before they became resumable: hashes of earlier versions stay valid.
    skipped -= {"model.attention", "model.scan_layers", "model.remat"}
    skipped |= {"init.from_run", "tokenizer.path"}
    default = Config().flat()
    former_default = {"model.scan_layers": False, "model.remat": "none"}
    flat = {
        k: v
        for k, v in run.read_config().flat().items()
        if k not in skipped and v != default[k] and v != former_default.get(k, default[k])
    }
    if flat.get("init.optimizer") == "keep":
        flat["init.optimizer"] = "carry"  # the value's name in earlier versions
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12]


def _last_call(run: Run) -> dict[str, str]:
    """Return device, version, jax and commit of the run's last call; empty where they are not recorded."""
    from slm_jax.run import environment

    calls = environment.read_calls(run)
    call = calls[-1] if calls else {}
    device = call.get("processor" if call.get("platform") == "cpu" else "device", "")
    number = call.get("devices", 1)
    return {
        "device": f"{number} x {device}" if number > 1 else device,
        "version": call.get("slm_jax", ""),
        "jax": call.get("packages", {}).get("jax", ""),
        "commit": call.get("commit", ""),
    }


def table(rows: Sequence[Row]) -> str:
    """Return the main columns of benchmark rows as a text table."""
    cells = [[name.replace("_", " ") for name in _TABLE]]
    for row in rows:
        cells.append(
            ["" if row[name] != row[name] else f"{row[name]:{form}}"[:_MAX_WIDTH] for name, form in _TABLE.items()]
        )
    return text_table(cells, right=range(2, len(_TABLE)))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw bits per byte, accuracy and speed of benchmark rows, in their order.

    Args:
        rows: The rows.
        path: The PNG file to write.

    Raises:
        UserError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.1 * len(rows) + 3), 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True)
    quantities = (("bits_per_byte", "bits per byte"), ("accuracy", "accuracy"), ("tokens_per_second", "tokens/s"))
    for axes, (name, label) in zip(panels, quantities, strict=True):
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
    """Return the default CSV file of a run: in its folder, or in that of the curriculum that it is a stage of."""
    return (curriculum_of(run) or run.path) / BENCHMARKS
