"""MFU of training on an accelerator: python tests/benchmarks/accelerator.py [--models 125m 1b] [--trace FOLDER]

Trains models of 125 M (sequences of 1,024) and 1 B parameters (2,048) for some tens of steps on random ids, with the
train step that `python -m slm_jax.train` runs, in bfloat16. The batch is found by trying: doubled until the speed
grows by less than 2 %, in as few parts as fit (for 1 B also with activations recomputed). Prints, per model, what
`python -m slm_jax.mfu` prints (MFU against the vendor's peak and the measured roof, FLOPs counted three ways, the
spread of the steps, memory), and whether the target is reached. One H100, H200, A100 or TPU chip is enough; several
share the batch. On a CPU: --tiny.

Any field of the config may be added: --model.depth 6 --optimizer.name adamw.
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

# Widths are multiples of 128 and heads 64 or 128 wide, as matrix units like them; 50,304 entries are GPT-2's, padded.
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
"""Share of the measured roof."""
FIRST_BATCH = {"125m": 8, "1b": 2, "tiny": 1}
"""Sequences a device."""
REMAT = {"125m": ["none"], "1b": ["none", "dots"], "tiny": ["none", "dots"]}
"""What is tried: recomputing costs FLOPs, but lets a larger batch fit."""


def configured(name: str, batch: int, overrides: list[str]) -> Config:
    """The model's config at a batch, with the command line's fields on top."""
    tree: Tree = {section: dict(fields) for section, fields in MODELS[name].items()}
    tree["train"] |= {"batch_size": batch, "steps": 1000}
    return config_from_args(overrides, "accelerator.py", __doc__ or "", tree)


def find_fastest(name: str, overrides: list[str], largest: int) -> tuple[int, list[str]]:
    """The batch of the highest speed among the doublings that fit, and the options of it. Raises UserError."""
    fastest, best, given = 0.0, None, any(word.startswith("--model.remat") for word in overrides)
    for remat in [""] if given else REMAT[name]:
        options = [*overrides, "--model.remat", remat] if remat else overrides
        batch, before = FIRST_BATCH[name] * jax.device_count(), 0.0
        while batch <= largest * jax.device_count():
            config = configured(name, batch, options)
            mesh = sharding.make_mesh(config)
            print(f"  {f'remat {remat}, ' if remat else ''}batch {batch}:", end=" ", flush=True)
            try:
                times = mfu.time_steps(config, mfu.vocabulary(config), 5, mesh)
            except UserError as error:  # nothing of it fits
                print(error, flush=True)
                gc.collect()
                break
            speed = batch * config.train.sequence_length / statistics.median(times.seconds)
            print(f"{speed:,.0f} tokens/s, {times.parts} parts, {times.program_bytes / 1e9:.3g} GB, ", end="")
            print(f"compiled in {times.compile_seconds:.0f} s", flush=True)
            if speed > fastest:
                fastest, best = speed, (batch, options)
            if speed < 1.02 * before:
                break
            before, batch = speed, 2 * batch
    if best is None:
        raise UserError(f"{name}: not even the smallest batch fits: try --model.remat full, or fewer layers")
    return best


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--tiny", action="store_true", help="a model of 0.1 M parameters instead, for a try on a CPU")
    parser.add_argument("--steps", type=int, default=30, help="timed steps at the batch that was found")
    parser.add_argument("--batch", type=int, default=0, help="sequences of a step; 0: found by trying")
    parser.add_argument("--trace", default="", help="folder for a profile of three steps of each model")
    parser.add_argument("--json", default="", help="file that gets one JSON object per model and line")
    options, overrides = parser.parse_known_args()
    tune_process()  # with it the program that was found is not compiled again
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
            reached = "reached" if report.mfu_roof >= TARGETS[name] else "not reached"
            print(f"target: {TARGETS[name]:.0%} of the measured roof: {reached}")
        print(flush=True)
        if options.json:
            with Path(options.json).open("a", encoding="utf-8") as file:
                file.write(mfu.as_json(report) + "\n")
        gc.collect()


if __name__ == "__main__":
    with command_errors():
        main()
