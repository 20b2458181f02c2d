"""Validation loss with the activations of accelerators against float32 ones: python tests/benchmarks/precision.py

Trains the same small model on the same batches with `train.residual_dtype` float32 and compute, both with bfloat16
products, and prints the validation losses and their difference: for each text bundled with Python and each seed a row.
With `compute`, the residual stream, all activations and the logits of the loss are bfloat16, and the backward pass
recomputes what it does on GPUs and TPUs; only the attention kernels are those of a CPU. The target is a mean difference
of at most 0.3 %.

Two runs differ by more than rounding if anything is rounded differently, as two seeds do; the line below the rows is
the mean of the differences and its standard error. A CPU computes bfloat16 elementwise work slowly: about two minutes
a row on two cores. --texts and --seeds choose rows, so that they can be run one by one; --json appends them to a file.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)

TEXTS = ("python-docs", "python-qa")
POLICIES = ("float32", "compute")
OPTIONS = {
    "train.dtype": "bfloat16",
    "train.batch_size": 8,
    "train.sequence_length": 128,
    "eval.sample_tokens": 0,
    "checkpoint.keep_best": 0,
    "log.every": 1000,
}


def validation_loss(text: str, seed: int, residual: str, steps: int, folder: Path) -> float:
    """Train a run of the preset `minute` and return the loss on its held-out text after the last step.

    Args:
        text: A value of `data.source`.
        seed: Seed of the initial weights and of the order of the data.
        residual: A value of `train.residual_dtype`.
        steps: Optimizer steps.
        folder: Where the run is stored.
    """
    from slm_jax import Config, train

    options = {
        **OPTIONS,
        "data.source": text,
        "train.seed": seed,
        "train.residual_dtype": residual,
        "train.steps": steps,
        "eval.every": steps,
        "checkpoint.every": steps,
    }
    return float(train(Config.load("minute", **options), str(folder / f"{text}-{seed}-{residual}")).metrics["val_loss"])


def row(text: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Return both losses of one text and seed, and their difference in percent."""
    losses = {residual: validation_loss(text, seed, residual, steps, folder) for residual in POLICIES}
    difference = 100 * (losses["compute"] / losses["float32"] - 1)
    return {"text": text, "seed": seed, "steps": steps, **losses, "percent": difference}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows and the mean difference."""
    print(f"{'text':14}{'seed':>5}{'steps':>7}{'float32':>10}{'bfloat16':>10}{'difference':>12}")
    for each in rows:
        print(
            f"{each['text']:14}{each['seed']:>5}{each['steps']:>7}{each['float32']:>10.4f}{each['compute']:>10.4f}"
            f"{each['percent']:>+11.3f}%"
        )
    percents = [each["percent"] for each in rows]
    if len(percents) > 1:
        error = statistics.stdev(percents) / len(percents) ** 0.5
        print(f"mean difference {statistics.mean(percents):+.3f} % (standard error {error:.3f} %)")


def main() -> None:
    """Run the rows that the command line names and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", default=TEXTS, help="sources of text; default: both")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path, help="file to append the rows to, and to print all rows of")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for text in args.texts:
            for seed in args.seeds:
                rows.append(row(text, seed, args.steps, Path(folder)))
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    if args.json:
        rows = [json.loads(line) for line in args.json.read_text().splitlines()]
    show(rows)


if __name__ == "__main__":
    main()
