"""Ablation table: python tests/benchmarks/ablations.py [ROW …] [--texts TEXT …] [--seeds 0 1 2]

Each row changes one option of a base, the model of the preset `minute` in the short trials of `trials.py`. A row is
compared with the base of the same seed and text:

    at equal tokens   difference of the bits per byte of held-out text, in percent
    at equal time     the same after the base was trained for as many more steps as the row's step takes longer; from
                      bases of half and of twice the steps

Step times are measured with all rows in turn (--time; alone on the machine), so that other programs disturb them alike.
Scores are kept in --results: the same command after an interruption continues, further seeds and texts add rows.

    python tests/benchmarks/ablations.py --time                   # step times, once
    python tests/benchmarks/ablations.py --seeds 0 1              # train, and print the table
    python tests/benchmarks/ablations.py NorMuon --texts my.txt   # one row
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)

from tests.benchmarks import trials  # noqa: E402
from tests.benchmarks.trials import Scores, Trial  # noqa: E402

BASE = {"optimizer.lr": 0.005}  # the rule's
# The options of each row; those of another shape are chosen so that the parameters are as many as possible the same.
ROWS: dict[str, dict[str, Any]] = {
    "output_init zero": {"model.output_init": "zero"},
    "output_init depth": {"model.output_init": "depth"},
    "ReLU²": {"model.mlp": "relu2"},
    "soft-cap": {"model.logit_softcap": 15.0},
    "residual scales": {"model.residual_scales": True},
    "value embeddings": {"model.value_embeddings": (1, 3)},
    "window SSSL": {"model.window": 32, "model.window_pattern": "SSSL"},
    "attention gate": {"model.attention_gate": True},
    "NorMuon": {"optimizer.name": "normuon"},
    "Polar Express": {"optimizer.orthogonalization": "polar-express"},
    "cautious decay": {"optimizer.cautious_decay": True},
    "momentum schedule": {"optimizer.momentum_warmup_steps": 100, "optimizer.momentum_cooldown_steps": 50},
    "averaging": {"optimizer.average_decay": 0.98},
    "best-fit packing": {"data.mode": "best-fit"},
    "speedrun": {"model.recipe": "speedrun"},
}
ROUNDS = 15


def rows_of(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the chosen rows whose options exist; says which do not."""
    from slm_jax.config.sections import Sections

    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        raise SystemExit(f"no row {unknown[0]!r}; there are: {', '.join(ROWS)}")
    chosen = {name: ROWS[name] for name in names or ROWS}
    missing = [name for name, options in chosen.items() if not options.keys() <= Sections.fields().keys()]
    if missing:
        print("left out, the options do not exist:", ", ".join(missing))
    return {name: options for name, options in chosen.items() if name not in missing}


def step_times(rows: dict[str, dict[str, Any]], text: str) -> dict[str, float]:
    """Return the time of a step of each row as a multiple of the base's: the median over rounds in turn."""
    import jax

    steppers = {}
    for name, options in {"base": {}, **rows}.items():
        config = trials.config_of(Trial(text, {**BASE, **options}))
        stepper = trials.Stepper(config, trials.data_of(config))
        stepper.step()
        jax.block_until_ready(stepper.state)
        steppers[name] = stepper
    ratios: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        times = {}
        for name, stepper in steppers.items():
            start = time.perf_counter()
            for _ in range(3):
                stepper.step()
            jax.block_until_ready(stepper.state)
            times[name] = time.perf_counter() - start
        for name in rows:
            ratios[name].append(times[name] / times["base"])
    for name, values in ratios.items():
        quartiles = statistics.quantiles(values, n=4)
        print(f"{name:20} {quartiles[1]:.3f} of the base's step ({quartiles[0]:.3f} to {quartiles[2]:.3f})")
    return {name: statistics.median(values) for name, values in ratios.items()}


class Table:
    """Differences of rows from the base."""

    def __init__(self, scores: Scores, steps: int, ratios: dict[str, float]):
        self.scores = scores
        self.steps = steps
        self.ratios = ratios

    def loss(self, text: str, seed: int, options: dict[str, Any], factor: float = 1.0) -> float:
        """Return the bits per byte of a trial of `factor` times the steps."""
        return self.scores.loss(Trial(text, {**BASE, "train.steps": round(factor * self.steps), **options}, seed))

    def base_after(self, text: str, seed: int, factor: float) -> float:
        """Return the bits per byte of the base after `factor` times the steps, from a parabola in their logarithm."""
        low, middle, high = (self.loss(text, seed, {}, f) for f in (0.5, 1.0, 2.0))
        x = math.log2(factor)
        return middle + x * (high - low) / 2 + x * x * (high - 2 * middle + low) / 2

    def differences(self, name: str, options: dict[str, Any], text: str, seed: int) -> tuple[float, float]:
        """Return the differences in percent, at equal tokens and at equal time (NaN: no step times)."""
        value = self.loss(text, seed, options)
        tokens = 100 * (value / self.loss(text, seed, {}) - 1)
        ratio = self.ratios.get(name)
        return tokens, math.nan if ratio is None else 100 * (value / self.base_after(text, seed, ratio) - 1)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.2f}{deviation}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    parser.add_argument("--texts", nargs="+", default=["python-docs"], help="files, or values of data.source")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--results", type=Path, default=Path("sweeps/ablations.jsonl"))
    parser.add_argument("--time", action="store_true", help="measure the step times only")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = rows_of(args.rows)
    times = args.results.with_suffix(".times.json")
    ratios = json.loads(times.read_text()) if times.is_file() else {}
    if args.time:
        ratios |= step_times(rows, args.texts[0])
        times.parent.mkdir(parents=True, exist_ok=True)
        times.write_text(json.dumps(ratios, indent=2))
        return
    table = Table(Scores(args.results), args.steps, ratios)
    lines = ["| row | text | step time | equal tokens, % | equal time, % | seeds |", "|---|---|---|---|---|---|"]
    for text in args.texts:  # row by row, so that complete rows come first
        for name, options in rows.items():
            pairs = [table.differences(name, options, text, seed) for seed in args.seeds]
            tokens, equal_time = (spread([pair[i] for pair in pairs]) for i in (0, 1))
            time_text = f"{ratios[name]:.2f}" if name in ratios else "–"
            lines.append(
                f"| {name} | {Path(text).stem} | {time_text} | {tokens} | "
                f"{equal_time if name in ratios else '–'} | {len(args.seeds)} |"
            )
            print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
