"""The command `python -m slm_jax.orchestrator`."""

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from slm_jax.cli import bare_words
from slm_jax.cli.options import SINGLE_HOST, Flag, MultihostOptions, nested, read_options_and_config
from slm_jax.config.curriculum import Curriculum
from slm_jax.config.paths import CURRICULUM, RUNS
from slm_jax.config.presets import read_preset, read_toml
from slm_jax.curriculum import benchmarks
from slm_jax.curriculum.orchestrate import Outcome, orchestrate
from slm_jax.distributed import agreement, lifecycle, multihost
from tokenizer.streams import print_last

PROG = "python -m slm_jax.orchestrator"


@dataclass(frozen=True)
class Options:
    """Train one model through a curriculum of texts, stage by stage.

    Without options: the preset curriculum-offline, a few minutes on two CPU cores, no network.

    A stage is a table [[stages]] with a name and any options of a run: data.source or data.mix, epochs or train.steps,
    optimizer.lr, optimizer.schedule, model.dropout, train.sequence_length, data.loss_on, init.optimizer (keep or
    fresh). The section [curriculum] has evaluate, compare and tokenizer_text. Stages can be added after those that
    are finished. Options of the config on the command line override all stages.

    Exit status: 0 done; 2 invalid usage or data; 130, 143 or 129 stopped by SIGINT, SIGTERM or SIGHUP,
    saved; 75 or 134 another process of the run was lost: run the same command again.
    """

    config: Annotated[str, Flag(metavar="NAME|PATH", bare=bare_words.config_files)] = ""
    """Preset in configs/, or a TOML file with [[stages]]; the options of the config override it in all stages."""
    run: Annotated[str, Flag(metavar="PATH")] = ""
    """Folder of the curriculum (default: runs/NAME of the config); an existing one is resumed."""
    multihost: MultihostOptions = SINGLE_HOST


def parse_args(args: Sequence[str]) -> tuple[Curriculum, Path]:
    """Return the curriculum and its folder of a command line.

    Raises:
        UserError: The command line or the curriculum is invalid.
    """
    return _curriculum_and_folder(*read_options_and_config(Options, args, PROG, preset=""))


def _curriculum_and_folder(options: Options, overrides: dict[str, Any]) -> tuple[Curriculum, Path]:
    # By the first process only: a network file system might tell the others for a while that there are no files.
    tree, origin = agreement.from_first("curriculum", lambda: _read(options))
    curriculum = Curriculum.from_tree(tree, nested(overrides), origin)
    return curriculum, Path(options.run) if options.run else RUNS / curriculum.name


def _read(options: Options) -> tuple[dict[str, Any], str]:
    """Return the curriculum of a command line as nested dicts, and the file or preset that it is from."""
    saved = Path(options.run) / CURRICULUM if options.run else None
    if saved is not None and saved.is_file() and not options.config:
        return read_toml(saved), str(saved)
    origin = options.config or "curriculum-offline"
    return read_preset(origin, curricula=True), origin


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # samples on any terminal
    options, overrides = read_options_and_config(Options, args, PROG, preset="")
    lifecycle.initialize(**vars(options.multihost))
    with lifecycle.exit_together():
        curriculum, folder = _curriculum_and_folder(options, overrides)
    from slm_jax.utils.process import tune_process

    tune_process()
    start = time.monotonic()
    again = f"{PROG} --run {shlex.quote(str(folder))}"
    try:
        with lifecycle.exit_together():
            outcome = orchestrate(curriculum, folder)
    except KeyboardInterrupt:  # between steps, or a second one
        started = (folder / CURRICULUM).is_file()
        print_last("stopped" + (f". Resume with:\n  {again}" if started else ", nothing was started"))
        raise SystemExit(130) from None
    if multihost.is_first():
        _print_summary(folder, curriculum, outcome, time.monotonic() - start, again)
    if outcome.stopped_by is not None:
        raise SystemExit(128 + outcome.stopped_by)


def _print_summary(folder: Path, curriculum: Curriculum, outcome: Outcome, seconds: float, again: str) -> None:
    """Print the results and the commands to go on with."""
    from slm_jax.curriculum import stage_scores
    from slm_jax.run.results import BENCHMARKS, read_benchmarks, read_stage_scores
    from slm_jax.utils.formatting import duration, plural

    if outcome.stopped_by is not None:
        signal_name = signal.Signals(outcome.stopped_by).name
        last = outcome.results[-1]
        print(f"stopped by {signal_name} after step {last.step} of {last.run.name}, saved. Resume with:\n  {again}")
        return
    print(f"\n{benchmarks.table(read_benchmarks(folder / BENCHMARKS))}\n")
    if scores := read_stage_scores(folder):
        print(f"{stage_scores.table(scores)}\n")
    print(f"{plural(len(curriculum.stages), 'stage')}, {duration(seconds)} in this call.")
    print(f"In {folder}: report.html, {CURRICULUM}, benchmarks.csv, stages/ with one run per stage\n\nNext:")
    name = f"--run {shlex.quote(str(folder))}"
    print(f"  python -m slm_jax.generate {name} --prompt 'The'    # the model of the last stage")
    print(f"  python -m slm_jax.evaluate {name}")
    print(f"  add a table [[stages]] to {folder / CURRICULUM}, then\n  {again}")
