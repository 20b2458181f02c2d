"""Cost of each option of the speed runs: python tests/benchmarks/model_options.py [--config quickstart] [--rounds 12]

Prints the time of a training step with each option as a ratio to the step without it, and the parameters that it adds.
All steps take turns within each round; the ratio is that of the times within a round, its median and quartiles over the
rounds. Compilation is not included. `window` attends to a quarter of the sequence, in all layers but the last.

    --only relu2 …    some of the options
    --set NAME=VALUE  other options of the config, for all rows
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
sys.path[0] = str(ROOT)

BASELINE = "none of them"


def rows(length: int, depth: int) -> dict[str, dict[str, Any]]:
    """Return the options of each row."""
    return {
        BASELINE: {},
        "relu2": {"model.mlp": "relu2"},
        "output_init": {"model.output_init": "zero"},
        "logit_softcap": {"model.logit_softcap": 15.0},
        "residual_scales": {"model.residual_scales": True},
        "attention_gate": {"model.attention_gate": True},
        "value_embeddings": {"model.value_embeddings": tuple(range((depth - 1) % 2, depth, 2))},
        "window": {"model.window": max(1, length // 4), "model.window_pattern": "S"},
        "speedrun": {"model.recipe": "speedrun"},
    }


def prepare(preset: str, options: dict[str, Any]) -> tuple[Any, Any, Any, int]:
    """Return the compiled step of a config, its state, a batch of random ids, and the number of parameters."""
    import jax
    import numpy as np

    from slm_jax.config.schema import Config
    from slm_jax.performance import flops
    from slm_jax.training.steps import make_steps

    config = Config.load(preset, **options)
    vocab_size = config.tokenizer.vocab_size
    steps = make_steps(config, vocab_size)
    state = steps.init()
    shape = (config.train.batch_size, config.train.sequence_length + 1)
    ids = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)
    batch = jax.device_put({"input_ids": ids[:, :-1].copy(), "labels": ids[:, 1:].copy()})
    step = steps.train.lower(state, batch).compile()
    return step, state, batch, flops.parameters(config.model, vocab_size)


def main() -> None:
    """Measure and print one row per option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="preset or TOML file")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=[], help="some of the rows")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other options of the config")
    arguments = parser.parse_args()

    import jax

    from slm_jax.config.schema import Config
    from slm_jax.utils.process import tune_process

    tune_process()
    common = dict(text.split("=", 1) for text in arguments.set)
    config = Config.load(arguments.config, **common)
    every = rows(config.train.sequence_length, config.model.depth)
    chosen = {name: every[name] for name in every if name == BASELINE or not arguments.only or name in arguments.only}
    made = {name: prepare(arguments.config, common | options) for name, options in chosen.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    states = {name: state for name, (_, state, _, _) in made.items()}
    for round_index in range(arguments.rounds + 1):  # the first one warms up
        for name, (step, _, batch, _) in made.items():
            start = time.perf_counter()
            states[name], metrics = step(states[name], batch)
            jax.block_until_ready((states[name], metrics))
            if round_index:
                times[name].append(time.perf_counter() - start)

    print(f"{arguments.config}, {config.train.batch_size} x {config.train.sequence_length} tokens, {jax.devices()[0]}")
    print(f"{'option':18} {'parameters':>12} {'ms/step':>8} {'ratio':>7}  quartiles")
    for name, (_, _, _, count) in made.items():
        ratios = [own / base for own, base in zip(times[name], times[BASELINE], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        ratio, milliseconds = statistics.median(ratios), 1e3 * statistics.median(times[name])
        print(f"{name:18} {count:12,} {milliseconds:8.1f} {ratio:7.3f}  {low:.3f}-{high:.3f}")


if __name__ == "__main__":
    main()
