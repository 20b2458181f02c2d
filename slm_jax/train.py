"""Raw text to a trained model: `python -m slm_jax.train`, or `train(config)`.

    run directory  ->  tokenizer and corpus  ->  model and steps  ->  restore  ->  loop  ->  report

Each of these is done once and found again: the same command on a run that was stopped, or killed at any instant,
goes on where it was and ends with the same numbers.
"""

import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slm_jax import cli, hosts
from slm_jax.callable_module import make_callable
from slm_jax.config import Config
from slm_jax.errors import UserError, command_line
from slm_jax.presets import read_toml
from slm_jax.run import RUNS, Result, Run, curriculum_of, find_run, new_run


def train(config: Config, run: str | Path | None = None) -> Result:
    """Train, or continue, the run at a path (default: a fresh one in `runs/`). Raises UserError.

    SIGINT and SIGTERM end it after the step in hand, saved; a second one ends it at once.
    """
    config = _with_absolute_folder(config)
    hosts.require_same({k: v for k, v in config.flat().items() if k not in ("data.cache", "data.workers")})
    place = Run(Path(hosts.from_first(lambda: str(run or new_run(config).path))))
    fresh, first = not place.exists() and not place.path.exists(), hosts.is_first()
    if first:
        print(f"run: {place.path}", file=sys.stderr)
    with place.lock(config.checkpoint.folder) if first else contextlib.nullcontext():
        try:
            hosts.from_first(lambda: place.begin(config))
            if not place.exists():
                raise UserError(f"{place.path.absolute()} is not there: all processes must see the same file system")
            # JAX is imported late: a wrong option is told at once.
            from slm_jax.loop import run_training

            return run_training(config, place)
        except BaseException:
            if first and fresh and not place.corpus.is_dir():  # nothing came of it: leave no trace
                shutil.rmtree(place.path, ignore_errors=True)
            raise


def _with_absolute_folder(config: Config) -> Config:
    """The config with a `checkpoint.folder` that is the same one from wherever the run goes on."""
    folder = config.checkpoint.folder
    if not folder or "://" in folder:
        return config
    section = config.checkpoint.model_copy(update={"folder": str(Path(folder).expanduser().absolute())})
    return config.model_copy(update={"checkpoint": section})


def parse_args(args: Sequence[str]) -> tuple[Config, Run]:
    """The config and run of a command line. Raises UserError."""
    rest = list(args)
    path, rest = cli.take_option(rest, "run")
    resume, rest = "--resume" in rest, [arg for arg in rest if arg != "--resume"]
    run = find_run(path) if resume else Run(Path(path)) if path else None
    if resume and run is not None and (curriculum := curriculum_of(run)):
        raise UserError(f"{run.path} is a stage of a curriculum: python -m slm_jax.orchestrator --run {curriculum}")
    base = read_toml(run.config) if run is not None and run.exists() else None
    config = cli.config_from_args(rest, "python -m slm_jax.train", HELP, base)
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
    together, args = hosts.take_options(sys.argv[1:])
    config, run = parse_args(args)
    from slm_jax.process import tune_process

    tune_process(config.train.deterministic)
    hosts.join(**together)
    start = time.monotonic()
    again = f"python -m slm_jax.train --run {shlex.quote(str(run.path))}"
    try:
        with hosts.ending_together():
            result = train(config, run.path)
    except KeyboardInterrupt:  # before the first step, or a second one
        print(
            "stopped" + (f". Go on with:\n  {again}" if run.exists() else ", nothing was begun"),
            file=sys.stderr,
            flush=True,
        )
        os._exit(130)  # at once: a save in flight may take its time, and would leave nothing that is not whole
    if not hosts.is_first():
        raise SystemExit(128 + result.stopped_by if result.stopped_by is not None else 0)
    run = Run(result.run)
    if result.stopped_by is not None:
        print(f"stopped by {signal.Signals(result.stopped_by).name} after step {result.step}, saved. Go on with:")
        print(f"  {again}")
        raise SystemExit(128 + result.stopped_by)
    summary(run, result, time.monotonic() - start)


def summary(run: Run, result: Result, seconds: float) -> None:
    """What came out, and the commands to go on."""
    from slm_jax.data.prepare import first_words
    from slm_jax.metrics import duration, scores_text

    row = result.metrics
    name = f"--run {shlex.quote(str(run.path))}"
    sample = last_sample(run)
    if sample:
        print(f"\nSample ({run.samples} holds those of earlier steps):\n\n{sample}\n")
    print(f"{result.step} steps, {duration(seconds)} in this call.", end=" ")
    if "val_loss" in row:
        print(f"Validation: {scores_text(row)}.")
    print(f"In {run.path}: {run.report.name}, {run.metrics.name}, {run.samples.name}, {run.config.name}\n\nGo on:")
    prompt = next(filter(None, run.read_config().eval.prompts), None) or first_words(run)
    print(f"  python -m slm_jax.generate {name} --prompt {shlex.quote(prompt)}")
    print(f"  python -m slm_jax.train {name} --train.steps {2 * result.step}    # train further")
    print("  python -m slm_jax.train --data.files 'my/*.txt'    # your own text")


def last_sample(run: Run) -> str:
    """The newest texts in samples.md, without its indentation."""
    if not run.samples.is_file():
        return ""
    section = run.samples.read_text(encoding="utf-8", errors="replace").rpartition("\n## ")[2].partition("\n")[2]
    return "\n".join(line.removeprefix("    ") for line in section.split("\n")).strip()


make_callable(__name__)

if __name__ == "__main__":
    with command_line():
        main()
