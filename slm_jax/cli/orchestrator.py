"""The command `python -m slm_jax.orchestrator`."""

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slm_jax.cli.options import parse_overrides, take_multihost_options, take_option
from slm_jax.config.curriculum import Curriculum
from slm_jax.config.paths import CURRICULUM, RUNS
from slm_jax.config.presets import read_preset, read_toml
from slm_jax.curriculum import benchmarks
from slm_jax.curriculum.orchestrate import Outcome, orchestrate
from slm_jax.distributed import multihost

HELP = f"""Take one model through a curriculum of texts, stage by stage.

With no options: the preset curriculum-offline, a few minutes on two CPU cores, no network.

--config NAME|PATH   preset in configs/ or a TOML file with [[stages]]; every option below overrides it in all stages
--run PATH           the curriculum's folder (default: {RUNS}/NAME of the config); what is there is continued

A stage is a table [[stages]] with a name and any options of a run: data.source or data.mix, epochs or train.steps,
optimizer.lr, optimizer.schedule, model.dropout, train.sequence_length, data.loss_on, init.optimizer (carry or fresh).
The section [curriculum] has evaluate, compare and tokenizer_text. Stages can be added behind those that are done.

Exit status: 0 done, 2 a mistake in the command or the data, 130 or 143 stopped by SIGINT or SIGTERM, all saved."""


def parse_args(args: Sequence[str]) -> tuple[Curriculum, Path]:
    """The curriculum and folder of a command line. Raises UserError."""
    path, rest = take_option(list(args), "run")
    preset, rest = take_option(rest, "config")
    overrides = parse_overrides(rest, {}, "python -m slm_jax.orchestrator", HELP)
    saved = Path(path) / CURRICULUM if path else None
    if saved is not None and saved.is_file() and preset is None:
        curriculum = Curriculum.from_tree(read_toml(saved), overrides, str(saved))
    else:
        preset = preset or "curriculum-offline"
        curriculum = Curriculum.from_tree(read_preset(preset, curricula=True), overrides, preset)
    return curriculum, Path(path) if path else RUNS / curriculum.name


def main() -> None:
    """The command line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # samples on any terminal
    together, args = take_multihost_options(sys.argv[1:])
    curriculum, folder = parse_args(args)
    multihost.initialize(**together)
    from slm_jax.utils.process import tune_process

    tune_process()
    start = time.monotonic()
    again = f"python -m slm_jax.orchestrator --run {shlex.quote(str(folder))}"
    try:
        with multihost.exit_together():
            outcome = orchestrate(curriculum, folder)
    except KeyboardInterrupt:  # between steps, or a second one
        begun = (folder / CURRICULUM).is_file()
        print("stopped" + (f". Go on with:\n  {again}" if begun else ", nothing was begun"), file=sys.stderr)
        raise SystemExit(130) from None
    if multihost.is_first():
        _summary(folder, curriculum, outcome, time.monotonic() - start, again)
    if outcome.stopped_by is not None:
        raise SystemExit(128 + outcome.stopped_by)


def _summary(folder: Path, curriculum: Curriculum, outcome: Outcome, seconds: float, again: str) -> None:
    """What came out, and the commands to go on."""
    from slm_jax.curriculum import stage_scores
    from slm_jax.run.results import BENCHMARKS, read_benchmarks, read_stage_scores
    from slm_jax.utils.formatting import duration

    if outcome.stopped_by is not None:
        step, name = outcome.results[-1].step, outcome.results[-1].run.name
        print(f"stopped by {signal.Signals(outcome.stopped_by).name} after step {step} of {name}, saved. Go on with:")
        print(f"  {again}")
        return
    print(f"\n{benchmarks.table(read_benchmarks(folder / BENCHMARKS))}\n")
    if scores := read_stage_scores(folder):
        print(f"{stage_scores.table(scores)}\n")
    print(f"{len(curriculum.stages)} stages, {duration(seconds)} in this call.")
    print(f"In {folder}: report.html, {CURRICULUM}, benchmarks.csv, stages/ with a run for each\n\nGo on:")
    name = f"--run {shlex.quote(str(folder))}"
    print(f"  python -m slm_jax.generate {name} --prompt 'The'    # the model of the last stage")
    print(f"  python -m slm_jax.evaluate {name}")
    print(f"  add a table [[stages]] to {folder / CURRICULUM}, then\n  {again}")
