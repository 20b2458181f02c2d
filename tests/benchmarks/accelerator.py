"""MFU of training on an accelerator: python tests/benchmarks/accelerator.py [--models 125m 1b] [--trace FOLDER]

Trains models of 125 M (sequences of 1,024) and 1 B parameters (2,048) for a few dozen steps on random ids, with the
training step of `python -m slm_jax.train`, in bfloat16. The batch size is searched: doubled until the speed grows by
less than 2 %, in as few microbatches as fit (for 1 B also with recomputed activations). Prints the report of
`python -m slm_jax.mfu` for each model (MFU relative to the vendor's and the measured peak, FLOPs counted three ways,
spread of the steps, memory), and whether the target is reached. One H100, H200, A100 or TPU chip is enough; several
share the batch. On a CPU: --tiny.

Any option of the config may be added: --model.depth 6 --optimizer.name adamw.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]
sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")

import jax  # noqa: E402  # after the environment is set

from slm_jax.cli.options import config_from_args  # noqa: E402  # after the path is set
from slm_jax.config.schema import Config  # noqa: E402
from slm_jax.distributed import sharding  # noqa: E402  # after the path is set
from slm_jax.training import mfu  # noqa: E402  # after the path is set
from slm_jax.utils.errors import UserError, command_errors  # noqa: E402
from slm_jax.utils.process import tune_process  # noqa: E402

Tree = dict[str, dict[str, Any]]

# Widths are multiples of 128 and heads 64 or 128 wide, which suits matrix units; 50,304 is GPT-2's vocabulary, padded.
COMMON = {"optimizer": {"name": "adamw", "lr": 3e-4, "warmup_steps": 2}, "tokenizer": {"vocab_size": 50304}}
MODELS: dict[str, Tree] = {
    "125m": {
        "model": {"dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072},
        "train": {"sequence_length": 1024, "dtype": "bfloat16"},
        **COMMON,
    },
    "1b": {
        "model": {"dim": 2048, "depth": 18, "heads": 16, "mlp_dim": 8256},
        "train": {"sequence_length": 2048, "dtype": "bfloat16"},
        **COMMON,
    },
    "tiny": {
        "model": {"dim": 64, "depth": 2, "heads": 2, "mlp_dim": 192},
        "train": {"sequence_length": 64, "dtype": "auto"},
        "tokenizer": {"vocab_size": 300},
    },
}
TARGETS = {"125m": 0.5, "1b": 0.6}
"""Targets for the MFU relative to the measured peak."""
FIRST_BATCH = {"125m": 8, "1b": 2, "tiny": 1}
"""Sequences per device of the first attempt."""
REMAT = {"125m": ["none"], "1b": ["none", "dots"], "tiny": ["none", "dots"]}
"""Values of `model.remat` to try: recomputation costs FLOPs, but lets a larger batch fit."""


def configured(name: str, batch: int, overrides: list[str]) -> Config:
    """Return the config of a model with a batch size, overridden by the options of the command line."""
    tree: Tree = {section: dict(fields) for section, fields in MODELS[name].items()}
    tree["train"] |= {"batch_size": batch, "steps": 1000}
    return config_from_args(overrides, "accelerator.py", __doc__ or "", tree)


def find_fastest(name: str, overrides: list[str], largest: int) -> tuple[int, list[str]]:
    """Return the batch size with the highest throughput among the doublings that fit, and its options.

    Raises:
        UserError: If not even the smallest batch fits.
    """
    fastest = 0.0
    best = None
    has_remat = any(word.startswith("--model.remat") for word in overrides)
    for remat in [""] if has_remat else REMAT[name]:
        options = [*overrides, "--model.remat", remat] if remat else overrides
        batch = FIRST_BATCH[name] * jax.device_count()
        previous = 0.0
        while batch <= largest * jax.device_count():
            config = configured(name, batch, options)
            mesh = sharding.make_mesh(config)
            print(f"  {f'remat {remat}, ' if remat else ''}batch {batch}:", end=" ", flush=True)
            try:
                times = mfu.time_steps(config, mfu.vocabulary(config), 5, mesh)
            except UserError as error:  # no microbatch fits
                print(error, flush=True)
                gc.collect()
                break
            speed = batch * config.train.sequence_length / statistics.median(times.seconds)
            print(
                f"{speed:,.0f} tokens/s, {times.grad_accum_steps} microbatches, {times.program_bytes / 1e9:.3g} GB, ",
                end="",
            )
            print(f"compiled in {times.compile_seconds:.0f} s", flush=True)
            if speed > fastest:
                fastest = speed
                best = (batch, options)
            if speed < 1.02 * previous:
                break
            previous = speed
            batch = 2 * batch
    if best is None:
        raise UserError(f"{name}: not even the smallest batch fits: try --model.remat full, or fewer layers")
    return best


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--tiny", action="store_true", help="a model of 0.1 M parameters instead, to test on a CPU")
    parser.add_argument("--steps", type=int, default=30, help="timed steps at the best batch size")
    parser.add_argument("--batch", type=int, default=0, help="sequences per step; 0: search")
    parser.add_argument("--trace", default="", help="folder for a profile of three steps of each model")
    parser.add_argument("--json", default="", help="file to append one JSON object per model to")
    options, overrides = parser.parse_known_args()
    tune_process()  # enables the compilation cache: the best program is not compiled again
    for name in ["tiny"] if options.tiny else options.models:
        print(f"{name}:", flush=True)
        chosen = (options.batch, overrides)
        if not options.batch:
            chosen = find_fastest(name, overrides, 2 if options.tiny else 1024)
        config = configured(name, *chosen)
        trace = str(Path(options.trace) / name) if options.trace else ""
        report = mfu.measure(config, mfu.vocabulary(config), options.steps, trace)
        print(mfu.as_text(report))
        if name in TARGETS:
            reached = "reached" if report.mfu_of_measured_peak >= TARGETS[name] else "not reached"
            print(f"target: {TARGETS[name]:.0%} of the measured peak: {reached}")
        print(flush=True)
        if options.json:
            with Path(options.json).open("a", encoding="utf-8") as file:
                file.write(mfu.as_json(report) + "\n")
        gc.collect()


if __name__ == "__main__":
    with command_errors():
        main()
