"""Measure what each option of the optimizer adds to a training step, interleaved with the default.

    python tests/benchmarks/optimizer.py                      the shape of the preset quickstart
    python tests/benchmarks/optimizer.py --only normuon --rounds 20
    python tests/benchmarks/optimizer.py --waste runs/NAME    padding and cut documents of data.mode best-fit

Each round takes some steps with each option, one option after the other; the ratio is to the default of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)

ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "adamw": {"optimizer.name": "adamw"},
    "lr scales": {"optimizer.embedding_lr_scale": 2.0, "optimizer.vector_lr_scale": 0.5},
    "polar-express": {"optimizer.orthogonalization": "polar-express"},
    "normuon": {"optimizer.name": "normuon"},
    "momentum schedule": {"optimizer.momentum_warmup_steps": 100, "optimizer.momentum_cooldown_steps": 50},
    "cautious decay": {"optimizer.cautious_decay": True},
    "average decay": {"optimizer.average_decay": 0.99},
    "segmented": {"data.mode": "segmented"},
    "best-fit": {"data.mode": "best-fit"},
}


def make_step(preset: str, vocab_size: int, fields: dict[str, Any]) -> Any:
    """Return a function that takes some steps and waits for them; the first call compiles."""
    import jax
    import numpy as np

    from slm_jax.config.schema import Config
    from slm_jax.data.batches.modes import empty_batch
    from slm_jax.training.steps import make_steps

    config = Config.load(preset, **fields)
    steps = make_steps(config, vocab_size)
    state = steps.init()
    batch = empty_batch(config)
    rng = np.random.default_rng(0)
    shape = batch["input_ids"].shape
    batch |= {name: rng.integers(0, vocab_size, shape).astype(np.int32) for name in ("input_ids", "labels")}
    if "segment_ids" in batch:  # four documents in a row
        at = np.arange(shape[1])
        batch["segment_ids"][:] = at * 4 // shape[1]
        batch["positions"][:] = at % -(-shape[1] // 4)
    batch = jax.device_put(batch)

    def run(count: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(count):
            state, metrics = steps.train(state, batch)
        jax.block_until_ready(metrics["loss"])
        jax.block_until_ready(state)
        return (time.perf_counter() - begin) / count

    return run


def measure_steps(options: argparse.Namespace) -> None:
    """Print the seconds of a step with each option, and their ratio to the default."""
    rows = {
        name: fields for name, fields in ROWS.items() if name == "default" or not options.only or name in options.only
    }
    steps = {name: make_step(options.config, options.vocab_size, fields) for name, fields in rows.items()}
    for name, run in steps.items():
        run(1)
        print(f"  {name}: compiled", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    names = list(rows)
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(steps[name](options.steps))
    print(f"{options.config}, {options.vocab_size} ids, {options.rounds} rounds of {options.steps} steps")
    print(f"{'option':20}{'ms per step':>12}{'ratio':>8}   quartiles")
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["default"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"{name:20}{1000 * statistics.median(values):12.1f}{middle:8.3f}   {low:.3f}-{high:.3f}")


def measure_waste(options: argparse.Namespace) -> None:
    """Print the padding of best-fit rows, and the share of the documents that each mode cuts, for several lengths."""
    import numpy as np

    from slm_jax.data.batches.best_fit import BestFitRows
    from slm_jax.data.corpus.corpus import open_corpus
    from slm_jax.run.directory import find_run
    from slm_jax.run.load import load_tokenizer

    run = find_run(options.waste)
    stream = open_corpus(run.corpus, load_tokenizer(run)).train
    sizes = np.diff(stream.ends, prepend=0)
    print(f"{run.path}: {sizes.size:,} documents, {len(stream):,} tokens, median {int(np.median(sizes))} of a document")
    print(f"{'length':>8}{'padding':>10}{'cut by best-fit':>18}{'cut by windows':>17}{'seconds':>10}")
    for length in options.lengths:
        begin = time.perf_counter()
        rows = BestFitRows(stream, length)
        elapsed = time.perf_counter() - begin
        starts = stream.ends - sizes
        in_windows = np.mean(starts // length != (stream.ends - 1) // length)
        print(f"{length:8}{rows.padding:10.3%}{np.mean(sizes > length):18.1%}{in_windows:17.1%}{elapsed:10.2f}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="a preset")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--only", nargs="+", choices=ROWS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each option in a round")
    parser.add_argument("--waste", metavar="RUN", help="measure best-fit packing of the text of a run instead")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    options = parser.parse_args()
    if options.waste:
        measure_waste(options)
    else:
        measure_steps(options)


if __name__ == "__main__":
    main()
