"""The command `python -m slm_jax.mfu`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from slm_jax.cli.options import config_from_args, take_option
from slm_jax.config.presets import read_toml
from slm_jax.performance.roofline import CONVENTION
from slm_jax.run.directory import Run
from slm_jax.training.mfu import Report, as_json, as_text, measure, vocabulary
from slm_jax.utils.errors import UserError

HELP = f"""Measure the device's matrix speed and what the training step of a config makes of it (MFU).

The step runs on random token ids of the config's shape: no text is read, nothing is written. MFU is model FLOPs
({CONVENTION}) per second over the vendor's peak, where the device is known, and over the measured roof.

--config NAME|PATH   preset in configs/ or a TOML file; every option below overrides it
--run PATH           the config and the tokenizer of a run
--steps N            timed steps (default 10)
--trace FOLDER       write a profile of three more steps there (TensorBoard, Perfetto)
--json               one JSON object instead of text"""


def main(args: Sequence[str] | None = None) -> Report:
    """The command line; returns what it printed."""
    rest = list(sys.argv[1:] if args is None else args)
    steps, rest = take_option(rest, "steps")
    trace, rest = take_option(rest, "trace")
    path, rest = take_option(rest, "run")
    if steps is not None and not (steps.isdecimal() and int(steps) > 0):
        raise UserError(f"--steps {steps}: should be a whole number, 1 or more")
    base = None
    if path is not None:
        run = Run(Path(path))
        base = read_toml(run.config)
        base.setdefault("tokenizer", {})["path"] = str(run.tokenizer)
    config = config_from_args([arg for arg in rest if arg != "--json"], "python -m slm_jax.mfu", HELP, base)
    from slm_jax.utils.process import tune_process

    tune_process()
    report = measure(config, vocabulary(config), int(steps or 10), trace or "")
    print(as_json(report) if "--json" in rest else as_text(report))
    return report
