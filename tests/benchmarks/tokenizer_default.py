"""Bits per byte of portable against case-marking tokenizers: python tests/benchmarks/tokenizer_default.py --to FOLDER

For each text and vocabulary size a sweep (`python -m slm_jax.sweep`) trains the preset `minute` with both kinds of
tokenizer, learned from that text, and the same seeds; the table has the bits per byte of all held-out text, their
ratio (below 1: the portable tokenizer ended better) with its range over the seeds, and the time of a step as the
ratio of medians. Both kinds train on as many tokens per step, so equal steps are equal time as far as that ratio is 1.
A text is the name of a source (python-docs) or a file. A kill at any instant loses nothing: the same command continues.

    python tests/benchmarks/tokenizer_default.py --to FOLDER --texts python-docs my.txt --sizes 2048 8192 --steps 400
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
METRIC = "val_bits_per_byte"
KINDS = ("False", "True")  # tokenizer.portable


def sweep(text: str, size: int, args: argparse.Namespace) -> Path:
    """Train all runs of one text and vocabulary size; return the folder of the sweep."""
    folder = args.to / f"{Path(text).name.partition('.')[0]}-{size}"
    command = [sys.executable, "-m", "slm_jax.sweep", "--to", str(folder)]
    if not (folder / "sweep.toml").exists():
        source = ["--data.files", text] if Path(text).exists() else ["--data.source", text]
        options = {
            "tokenizer.vocab_size": size,
            "train.steps": args.steps,
            "checkpoint.every": args.steps,
            "checkpoint.keep_best": 0,
            "eval.every": args.steps,
            "eval.max_tokens": 0,  # all: a limit in tokens would score other parts of the text for each tokenizer
            "eval.sample_tokens": 0,
            "log.every": 20,
            "data.workers": 1,
        }
        command += ["--config", "minute", "--vary", f"tokenizer.portable={','.join(KINDS)}", *source]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([*command, "--seeds", str(args.seeds)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


def step_time(run: Path) -> float:
    """Return the median seconds of a step of a run, without the first steps, in which the step is compiled."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return 1 / statistics.median(speeds[1:] or speeds)


def row(text: str, size: int, folder: Path) -> tuple[str, float]:
    """Return a line of the table and the mean ratio of the bits per byte."""
    scores: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with (folder / "results.csv").open(newline="") as file:
        for trial in csv.DictReader(file):
            kind = trial["tokenizer.portable"]
            scores[kind][trial["train.seed"]] = float(trial[METRIC])
            times[kind].append(step_time(folder / "runs" / trial["run"]))
    marked, portable = (scores[kind] for kind in KINDS)
    ratios = [portable[seed] / marked[seed] for seed in marked]
    time_ratio = statistics.median(times["True"]) / statistics.median(times["False"])
    mean = statistics.fmean(ratios)
    line = (
        f"| {Path(text).name.partition('.')[0]} | {size} | {statistics.fmean(marked.values()):.4f} "
        f"| {statistics.fmean(portable.values()):.4f} | {mean:.4f} ({min(ratios):.4f}-{max(ratios):.4f}) "
        f"| {time_ratio:.2f} |"
    )
    return line, mean


def main() -> None:
    """Run the sweeps that the command line names and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder of the sweeps")
    parser.add_argument("--texts", nargs="+", default=["python-docs"], help="sources or files (default: python-docs)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[2048, 8192], help="vocabulary sizes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    args.to = args.to.resolve()
    texts = [str(Path(text).resolve()) if Path(text).exists() else text for text in args.texts]
    print("| text | ids | case marks | portable | ratio (range over the seeds) | ratio of step times |")
    print("|---|---|---|---|---|---|")
    means = []
    for size in args.sizes:
        for text in texts:
            line, mean = row(text, size, sweep(text, size, args))
            means.append(mean)
            print(line, flush=True)
    print(f"\nmean ratio of the bits per byte: {statistics.geometric_mean(means):.4f}")


if __name__ == "__main__":
    main()
