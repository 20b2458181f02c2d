"""Sweeps behind the learning rates of slm_jax/config/rule.py: python tests/benchmarks/rule.py [SWEEP …]

A sweep is a list of settings (a shape, or another batch or length). For each setting, text and seed, the best value of
an option is searched by factors of 2, from the rule's rate or the setting before, until the best one has worse
neighbors. The table compares the minimum of the parabola through these three with the rule:

    best        the best rate that was found, and its loss (bits per byte of held-out text)
    rule        the rate of `slm_jax.config.rule.learning_rate`, and the loss there, from the same parabola
    bars        the two rates within a factor of 1.5, and the rule's loss within 1 % of the best one

Trials are short and small (see `trials.py`), so that the sweeps take hours on one core, not days. Scores are kept in
--results: the same command after an interruption continues, and further texts and seeds add to the table.

    python tests/benchmarks/rule.py                                # all sweeps on python-docs, seed 0, and the table
    python tests/benchmarks/rule.py width batch --texts python-docs my.txt --seeds 0 1 2
    python tests/benchmarks/rule.py --table                        # the table of what is there, without training
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)

from tests.benchmarks.trials import COMMON, Scores, Trial, base  # noqa: E402

LR = "optimizer.lr"
EMBEDDING = "optimizer.embedding_lr_scale"
VECTOR = "optimizer.vector_lr_scale"
OUTPUT = "model.output_init"
STD = "model.init_std"
DECAY = "optimizer.decay_fraction"
WEIGHT_DECAY = "optimizer.weight_decay"

Options = dict[str, Any]


def size(dim: int, depth: int, **others: Any) -> Options:
    """Return the options of a model with heads of width 64."""
    shape = {"model.dim": dim, "model.depth": depth, "model.heads": max(1, dim // 64), "model.mlp_dim": 4 * dim}
    return shape | {f"train.{name}": value for name, value in others.items()}


# Of each sweep the settings, each with the options whose best values are searched, one after the other, from the best
# values of the setting before.
SWEEPS: dict[str, list[tuple[Options, tuple[str, ...]]]] = {
    "width": [(size(dim, 4), (LR,)) for dim in (64, 128)],
    "wide": [(size(dim, 4), (LR,)) for dim in (256, 192, 384)],
    "depth": [(size(64, depth), (LR,)) for depth in (4, 2, 8)],
    "deep": [(size(128, depth), (LR,)) for depth in (4, 2, 8)],
    "batch": [(size(64, 4, batch_size=batch), (LR,)) for batch in (8, 32, 2)],
    "horizon": [(size(64, 4, steps=steps), (LR,)) for steps in (300, 1200)],
    "preset": [(size(128, 4, steps=1000, sequence_length=128), (LR,))],
    "groups": [
        (size(64, 4), (LR, OUTPUT, LR, EMBEDDING, STD, VECTOR, LR)),
        (size(128, 4), (LR, OUTPUT, LR, EMBEDDING, LR)),
        (size(256, 4), (LR, EMBEDDING, LR)),
    ],
    "schedule": [(size(64, 4, steps=600), (DECAY, WEIGHT_DECAY))],
}
DEFAULTS = {LR: 0.01, STD: 0.02, OUTPUT: "normal", DECAY: 0.5, WEIGHT_DECAY: 0.1}  # of others 1
CHOICES: dict[str, tuple[Any, ...]] = {
    OUTPUT: ("normal", "zero", "depth"),
    VECTOR: (1.0, 0.25, 4.0),
    DECAY: (0.5, 0.25, 0.75, 1.0),
    WEIGHT_DECAY: (0.1, 0.0, 0.3),
}
MARGIN = 0.9997  # a search continues while the loss falls by more than this
RATE_BAR = 1.5
LOSS_BAR = 0.01


class Found(NamedTuple):
    """Result of a search for a rate.

    Attributes:
        text: Name of the text.
        seed: Seed of the trials.
        options: Shape, batch and length.
        losses: Bits per byte by rate.
    """

    text: str
    seed: int
    options: Options
    losses: dict[float, float]


def search(scores: Scores, text: str, options: Options, seed: int, name: str, start: Any) -> dict[Any, float]:
    """Return the losses of values of an option: its choices, or factors of 2 with the best one not at an end."""
    losses: dict[Any, float] = {}

    def attempt(value: Any) -> float:
        if value not in losses:
            losses[value] = scores.loss(Trial(text, {**options, name: value}, seed))
        return losses[value]

    if name in CHOICES:
        for value in CHOICES[name]:
            attempt(value)
        return losses

    default = DEFAULTS.get(name, 1.0)

    def at(power: int) -> float:
        return attempt(float(f"{default * 2.0**power:.4g}"))

    best = round(math.log2(start / default))
    while True:
        if at(best + 1) < MARGIN * at(best):
            best += 1
        elif at(best - 1) < MARGIN * at(best):
            best -= 1
        else:
            return dict(sorted(losses.items()))


def parabola(losses: dict[float, float]) -> tuple[float, float, float]:
    """Return (rate, loss, curvature) of the minimum of the parabola through the best rate and its neighbors.

    The loss is a function of the logarithm of the rate; the curvature is its second derivative.
    """
    rates = sorted(losses)
    i = rates.index(min(rates, key=lambda rate: losses[rate]))
    near = rates[max(0, i - 1) : i + 2]
    if len(near) < 3 or not all(math.isfinite(losses[rate]) for rate in near):
        return rates[i], losses[rates[i]], math.nan
    (x0, x1, x2), (y0, y1, y2) = map(math.log, near), (losses[rate] for rate in near)
    slope0, slope1 = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = 2 * (slope1 - slope0) / (x2 - x0)
    x = (x0 + x1) / 2 - slope0 / curvature
    return math.exp(x), y1 - curvature * (x1 - x) ** 2 / 2, curvature


def run_sweep(
    scores: Scores, settings: list[tuple[Options, tuple[str, ...]]], text: str, seed: int, dtype: str
) -> None:
    """Search the best values of a sweep for one text and seed, with products of a dtype."""
    carried: Options = {"train.dtype": dtype}
    for setting, names in settings:
        carried[LR] = rule_rate(base() | setting)
        for name in names:
            start = carried.get(name, DEFAULTS.get(name, 1.0))
            losses = search(scores, text, carried | setting, seed, name, start)
            carried[name] = min(losses, key=lambda value: losses[value])
            print(f"{Path(text).stem} seed {seed} {setting}: best {name} {carried[name]}", flush=True)


def found_rates(scores: Scores) -> list[Found]:
    """Return the searches for a rate that the scores have, those with all other options at their defaults."""
    shape = {"model.dim", "model.depth", "model.heads", "model.mlp_dim", LR, *COMMON}
    groups: dict[str, Found] = {}
    for trial, row in scores.trials():
        if trial.options.keys() <= shape:
            options = {name: value for name, value in trial.options.items() if name != LR}
            key = f"{trial.text} {sorted(options.items())} {trial.seed}"
            group = groups.setdefault(key, Found(trial.text, trial.seed, options, {}))
            group.losses[trial.options.get(LR, DEFAULTS[LR])] = row["bits_per_byte"]
    return [found for found in groups.values() if len(found.losses) > 2]


def show(scores: Scores) -> None:
    """Print the best rates beside those of the rule."""
    print("| text | seed | width x depth | batch tokens | steps | best | rule | rule / best | loss above the best |")
    print("|---|---|---|---|---|---|---|---|---|")
    for found in sorted(found_rates(scores), key=lambda f: (f.text, str(f.options), f.seed)):
        rate, loss, curvature = parabola(found.losses)
        options = base() | found.options
        rule = rule_rate(options)
        above = curvature * math.log(rule / rate) ** 2 / 2 / loss
        good = max(rule / rate, rate / rule) <= RATE_BAR and above <= LOSS_BAR
        batch = options["train.batch_size"] * options["train.sequence_length"]
        print(
            f"| {found.text} | {found.seed} | {options['model.dim']} x {options['model.depth']} | {batch:,} | "
            f"{options['train.steps']:,} | {rate:.4f} ({loss:.4f}) | {rule:.4f} | {rule / rate:.2f} | "
            f"{100 * above:.2f} %{'' if good else ', outside the bars'} |"
        )


def rule_rate(options: Options) -> float:
    """Return the rate of the rule for the shape, the batch and the length of a setting."""
    from slm_jax.config.rule import learning_rate

    batch = options["train.batch_size"] * options["train.sequence_length"]
    return learning_rate(options["model.dim"], batch, options["train.steps"])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"default: all of {', '.join(SWEEPS)}")
    parser.add_argument("--texts", nargs="+", default=["python-docs"], help="files, or values of data.source")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the products; bfloat16 takes half the time on a processor with AMX",
    )
    parser.add_argument("--results", type=Path, default=Path("sweeps/rule.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table only")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    scores = Scores(args.results)
    for name in () if args.table else args.sweeps or SWEEPS:
        if name not in SWEEPS:
            raise SystemExit(f"no sweep {name!r}; there are: {', '.join(SWEEPS)}")
        for seed in args.seeds:
            for text in args.texts:
                run_sweep(scores, SWEEPS[name], text, seed, args.dtype)
    show(scores)


if __name__ == "__main__":
    main()
