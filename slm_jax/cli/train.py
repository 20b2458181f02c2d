"""The command `python -m slm_jax.train`."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slm_jax.cli.options import config_from_args, take_multihost_options, take_option
from slm_jax.config.paths import RUNS
from slm_jax.config.presets import read_toml
from slm_jax.config.schema import Config
from slm_jax.distributed import multihost
from slm_jax.run.directory import Result, Run, curriculum_of, find_run, new_run
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError


def parse_args(args: Sequence[str]) -> tuple[Config, Run]:
    """The config and run of a command line. Raises UserError."""
    rest = list(args)
    path, rest = take_option(rest, "run")
    resume, rest = "--resume" in rest, [arg for arg in rest if arg != "--resume"]
    run = find_run(path) if resume else Run(Path(path)) if path else None
    if resume and run is not None and (curriculum := curriculum_of(run)):
        raise UserError(f"{run.path} is a stage of a curriculum: python -m slm_jax.orchestrator --run {curriculum}")
    base = read_toml(run.config) if run is not None and run.exists() else None
    config = config_from_args(rest, "python -m slm_jax.train", HELP, base)
    return config, run or new_run(config)


HELP = f"""Train a small language model from raw text.

With no options: the documentation inside this Python, a few minutes on two CPU cores, no network.

On your own text: --data.files 'my/*.txt'

--config NAME|PATH   preset in configs/ or a TOML file; every option below overrides it
--run PATH           the run directory (default: a fresh one in {RUNS}/); an existing run is continued
--resume             continue the newest run in {RUNS}/ (or the one of --run, which must exist)

Several hosts: the same command on each, with the same file system; found by themselves under Slurm, Open MPI, on
Kubernetes (pip install kubernetes) and on TPU slices, elsewhere by
--coordinator HOST:PORT --processes N --process I   (the first one's address, how many, and which this is, from 0)

Exit status: 0 done, 2 a mistake in the command or the data, 130 or 143 stopped by SIGINT or SIGTERM, all saved;
75 or 134 another process of the run was lost: give the same command again."""


def main() -> None:
    """The command line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # samples on any terminal
    together, args = take_multihost_options(sys.argv[1:])
    config, run = parse_args(args)
    from slm_jax.utils.process import tune_process

    tune_process(config.train.deterministic)
    multihost.initialize(**together)
    start = time.monotonic()
    again = f"python -m slm_jax.train --run {shlex.quote(str(run.path))}"
    try:
        with multihost.exit_together():
            result = train(config, run.path)
    except KeyboardInterrupt:  # before the first step, or a second one
        print(
            "stopped" + (f". Go on with:\n  {again}" if run.exists() else ", nothing was begun"),
            file=sys.stderr,
            flush=True,
        )
        os._exit(130)  # at once: a save in flight may take its time, and would leave nothing that is not whole
    if not multihost.is_first():
        raise SystemExit(128 + result.stopped_by if result.stopped_by is not None else 0)
    run = Run(result.run)
    if result.stopped_by is not None:
        print(f"stopped by {signal.Signals(result.stopped_by).name} after step {result.step}, saved. Go on with:")
        print(f"  {again}")
        raise SystemExit(128 + result.stopped_by)
    summary(run, result, time.monotonic() - start)


def summary(run: Run, result: Result, seconds: float) -> None:
    """What came out, and the commands to go on."""
    from slm_jax.data.prepare import example_prompt
    from slm_jax.run.metrics import scores_text
    from slm_jax.run.samples import read_samples
    from slm_jax.utils.formatting import duration

    row = result.metrics
    name = f"--run {shlex.quote(str(run.path))}"
    samples = read_samples(run.samples)
    if samples:
        sample = "\n\n* * *\n\n".join(samples[-1].texts)
        print(f"\nSample ({run.samples} holds those of earlier steps):\n\n{sample}\n")
    print(f"{result.step} steps, {duration(seconds)} in this call.", end=" ")
    if "val_loss" in row:
        print(f"Validation: {scores_text(row)}.")
    print(f"In {run.path}: {run.report.name}, {run.metrics.name}, {run.samples.name}, {run.config.name}\n\nGo on:")
    prompt = next(filter(None, run.read_config().eval.prompts), None) or example_prompt(run)
    print(f"  python -m slm_jax.generate {name} --prompt {shlex.quote(prompt)}")
    print(f"  python -m slm_jax.train {name} --train.steps {2 * result.step}    # train further")
    print("  python -m slm_jax.train --data.files 'my/*.txt'    # your own text")
