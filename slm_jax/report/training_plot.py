"""`loss.png` of a run: losses and learning rate, drawn with Matplotlib."""

import math
from pathlib import Path
from typing import Any

from slm_jax.run.metrics import Row
from slm_jax.utils.files import replace_file


def plot_training(rows: list[Row], path: Path, title: str) -> None:
    """Draw training loss, validation loss and learning rate over the steps.

    Args:
        rows: The rows of `metrics.jsonl`. The loss of a skipped step is None and leaves a gap.
        path: The PNG file to write.
        title: The title, usually the name of the run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = [row["step"] for row in rows]
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    loss.plot(steps, losses, linewidth=0.8, label="training")
    validated = [row for row in rows if row.get("val_loss") is not None]
    if validated:
        label = f"validation (last: {validated[-1]['val_bits_per_byte']:.3f} bits per byte)"
        loss.plot([r["step"] for r in validated], [r["val_loss"] for r in validated], marker="o", label=label)
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    loss.grid(alpha=0.3)
    loss.set_title(title.encode(errors="replace").decode().replace("$", r"\$"))  # $ would begin a formula
    rate.plot(steps, [row["lr"] for row in rows], color="tab:gray")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Save a Matplotlib figure as PNG, as a whole or not at all."""
    with replace_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
