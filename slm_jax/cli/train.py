"""The command `python -m slm_jax.train`."""

import contextlib
import itertools
import os
import shlex
import signal
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from slm_jax.cli.dial import NO_DIAL, DialOptions, apply_rule, keep_saved, measured_speed, require_memory
from slm_jax.cli.options import SINGLE_HOST, Flag, MultihostOptions, make_config, nested, read_options_and_config
from slm_jax.config.schema import Config
from slm_jax.distributed import agreement, lifecycle, multihost
from slm_jax.run.directory import Run, curriculum_of, find_run
from slm_jax.run.naming import new_run, removed_if_unused
from slm_jax.training.result import Result
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from tokenizer.streams import print_last

if TYPE_CHECKING:
    # These import JAX: wrong options are reported without waiting for it.
    from slm_jax.cli.forecast import Forecast
    from slm_jax.run.selection import Selection

PROG = "python -m slm_jax.train"


@dataclass(frozen=True)
class Options:
    """Train a small language model from raw text.

    Without options: on the documentation bundled with Python, a few minutes on two CPU cores, no network.

        python -m slm_jax.train 'my/*.txt'     on your own text (FILE and --data.files are the same)

    Exit status: 0 done; 2 invalid usage or data; 130, 143 or 129 stopped by SIGINT, SIGTERM or SIGHUP,
    saved; 75 or 134 another process of the run was lost: run the same command again.
    """

    config: Annotated[str, Flag(metavar="NAME|PATH")] = ""
    """Preset in configs/, or a TOML file; the options of the config override it."""
    run: Annotated[str, Flag(metavar="PATH")] = ""
    """Run directory (default: a new one in runs/); an existing run is resumed."""
    resume: bool = False
    """Resume the newest run in runs/, or the one of --run, which must exist."""
    dial: DialOptions = NO_DIAL
    multihost: MultihostOptions = SINGLE_HOST


def parse_args(args: Sequence[str]) -> tuple[Config, Run | None]:
    """Return the config and the run of a command line; None: a new one, which is not created yet.

    Raises:
        UserError: The command line or the config is invalid.
    """
    return _config_and_run(*read_options_and_config(Options, args, PROG, files=True))


def _config_and_run(options: Options, overrides: dict[str, Any]) -> tuple[Config, Run | None]:
    run: Run | None = None
    if options.resume:
        run = find_run(options.run or None, trained=True)
        if curriculum := curriculum_of(run):
            raise UserError(f"{run.path} is a stage of a curriculum: python -m slm_jax.orchestrator --run {curriculum}")
    elif options.run:
        run = Run(Path(options.run))
    base = None
    if run is not None and run.exists():
        base = run.read_options()
        if not options.config:
            _require_resumable(run, base, overrides)
        if {"train.batch_size", "train.accumulation"} & overrides.keys() and "train.microbatch" not in overrides:
            base["train"] = {**base.get("train", {}), "microbatch": "auto"}  # the saved one fitted the saved batch
    if run is not None and run.exists():
        return make_config(keep_saved(options.dial, overrides, run), options.config, base), run
    overrides = apply_rule(options.dial, overrides, options.config, measured_speed, options.run)
    config = make_config(overrides, options.config, base)
    require_memory(options.dial, config)
    return config, run


def _agreed_config_and_run(options: Options, overrides: dict[str, Any]) -> tuple[Config, Run]:
    """Return the config and the run of the command line, as the first process finds them.

    The other processes do not look for the run: a network file system might remember for a while that its files did not
    exist.

    Raises:
        UserError: The command line is invalid, or differs between processes.
    """
    if multihost.process_count() == 1:
        config, run = _config_and_run(options, overrides)
        return config, run or new_run(config)
    per_host = {name: value for name, value in overrides.items() if name in Config.fields_with("per_host")}
    given = {"config": options.config, "run": options.run, "resume": options.resume}
    given |= vars(options.dial)
    given |= {name: value for name, value in overrides.items() if name not in per_host}
    agreement.require_same("the options", lambda: given, "give the same command to all processes")

    def find() -> tuple[str, str]:
        config, run = _config_and_run(options, overrides)
        return config.to_toml(), str((run or new_run(config)).path)

    text, path = agreement.from_first("config and run", find)
    tree = tomllib.loads(text)
    for section, fields in nested(per_host).items():
        tree[section] = tree.get(section, {}) | fields
    return Config.from_tree(tree), Run(Path(path))


def _require_resumable(run: Run, base: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Refuse options that conflict with those of a run, before the two are mixed into one config and validated.

    Raises:
        UserError: Names every option with its saved and its given value.
    """
    saved, problems = Config.check(base)
    if saved is None or problems:  # edited by hand; reported with the overrides, which may correct it
        return
    flat = saved.flat()
    # A relative checkpoint.folder is compared when it has been made absolute.
    given = {name: value for name, value in overrides.items() if value != flat[name] and name != "checkpoint.folder"}
    run.require_no_conflicts(run.binding({name: (flat[name], value) for name, value in given.items()}))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    began = time.monotonic()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # samples on any terminal
    options, overrides = read_options_and_config(Options, args, PROG, files=True)
    lifecycle.initialize(**vars(options.multihost))
    with lifecycle.exit_together():
        config, run = _agreed_config_and_run(options, overrides)
    from slm_jax.utils.process import tune_process

    start = time.monotonic()
    again = f"{PROG} --run {shlex.quote(str(run.path))}"
    try:
        with lifecycle.exit_together(), removed_if_unused(run) if multihost.is_first() else contextlib.nullcontext():
            tune_process(config.train.deterministic)  # before a device is opened
            forecast = _forecast(config, run) if options.dial.is_auto and multihost.is_first() else None
            result = train(config, run.path, began)
    except KeyboardInterrupt:  # before the first step, or a second one
        print_last("stopped" + (f". Resume with:\n  {again}" if run.exists() else ", nothing was started"))
        os._exit(130)  # at once: a save in flight may take long, and what it leaves is not taken for a checkpoint
    if not multihost.is_first():
        raise SystemExit(128 + result.stopped_by if result.stopped_by is not None else 0)
    run = Run(result.run)
    if result.stopped_by is not None:
        name = signal.Signals(result.stopped_by).name
        print(f"stopped by {name} after step {result.step}, saved. Resume with:\n  {again}")
        raise SystemExit(128 + result.stopped_by)
    print_summary(run, result, time.monotonic() - start, forecast.comparison(result) if forecast else ())


def _forecast(config: Config, run: Run) -> "Forecast | None":
    """Print and return what to expect of a run of --size auto; None if the size of its text is not known."""
    from slm_jax.cli.forecast import make_forecast

    can_measure = run.newest_step() is None and multihost.process_count() == 1
    try:
        forecast = make_forecast(config, measured_speed if can_measure else None)
    except UserError:
        if can_measure:
            raise
        return None
    for line in forecast.lines() if forecast else ():
        print(line, file=sys.stderr)
    return forecast


def print_summary(run: Run, result: Result, seconds: float, remarks: Iterable[str] = ()) -> None:
    """Print the results and the commands to go on with.

    Args:
        run: The finished run.
        result: What `train` returned.
        seconds: Duration of this call.
        remarks: Further lines on the results.
    """
    from slm_jax.data.load import example_prompt, has_conversations
    from slm_jax.run.metrics import scores_text, tasks_text
    from slm_jax.run.samples import read_samples
    from slm_jax.run.selection import select_checkpoint
    from slm_jax.utils.formatting import duration

    selection = select_checkpoint(run)
    name = f"--run {shlex.quote(str(run.path))}"
    samples = {sample.step: sample for sample in read_samples(run.samples)}
    if samples:
        step, sample = selection.step, samples.get(selection.step)
        if sample is None:
            step, sample = list(samples.items())[-1]
        text = "\n\n* * *\n\n".join(sample.texts)
        print(f"\nSample of step {step} (others are in {run.samples}):\n\n{text}\n")
    config = run.read_config()
    early = f" of {config.train.steps}: stopped early (train.stop_early)" if result.step < config.train.steps else ""
    print(f"{result.step} steps{early}, {duration(seconds)} in this call.", end=" ")
    if "val_loss" in result.metrics:
        print(f"Validation: {scores_text(result.metrics)}.")
    if tasks := tasks_text(result.metrics):
        print(f"Tasks: {tasks}.")
    for line in itertools.chain(best_lines(result, selection, config.train.objective == "dpo"), remarks):
        print(line)
    print(f"In {run.path}: {run.report.name}, {run.metrics.name}, {run.samples.name}, {run.config.name}\n\nNext:")
    if has_conversations(run):
        print(f"  python -m slm_jax.chat {name}    # talk to the model")
    else:
        prompt = next(filter(None, config.eval.prompts), None) or example_prompt(run)
        print(f"  python -m slm_jax.generate {name} --prompt {shlex.quote(prompt)}")
    if not result.trend.since_best:
        print(f"  {PROG} {name} --train.steps {2 * result.step}    # train further")
    if not (config.data.files or config.data.mix):
        print(f"  {PROG} --data.files 'my/*.txt'    # your own text")


def best_lines(result: Result, selection: "Selection", is_dpo: bool = False) -> Iterator[str]:
    """Yield the lines of the summary about the best validation, if it is not the last one."""
    best = result.trend.best
    if best is None or best.loss is None or not result.trend.since_best:
        return
    bits = "" if is_dpo else f", {best.bits_per_byte:.3f} bits per byte"
    yield f"The best validation was at step {best.step}: loss {best.loss:.3f}{bits}."
    if selection.step == best.step:
        yield (
            f"generate, serve, evaluate, export and a run that starts with this one use step {best.step}; "
            f"--step last: step {selection.last}."
        )
    else:
        yield f"Its checkpoint was not kept (checkpoint.keep_best): the commands use step {selection.step}."
