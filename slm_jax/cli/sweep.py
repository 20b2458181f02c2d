"""The command `python -m slm_jax.sweep`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from slm_jax.cli.flags import config_options
from slm_jax.cli.options import Flag, make_config, read_options_and_config
from slm_jax.cli.trials_folder import holds_definition, require_seeds, trials_folder
from slm_jax.sweep.plan import SWEEP, Sweep, Trial
from slm_jax.utils.errors import UserError
from slm_jax.utils.progress import show_log

if TYPE_CHECKING:
    from slm_jax.sweep.run import Scores  # imports JAX

PROG = "python -m slm_jax.sweep"


@dataclass(frozen=True)
class Options:
    """Train the same config with other values of some options, several seeds each, and compare the scores.

        python -m slm_jax.sweep --to sweeps/lr --vary optimizer.lr=0.003,0.01,0.03 --seeds 3 --train.steps 200
        python -m slm_jax.sweep --to sweeps/size --vary model.dim+model.heads=128+2,192+3 optimizer.lr=0.005,0.01
        python -m slm_jax.sweep --to sweeps/random --vary optimizer.lr=0.001..0.1 model.dropout=0,0.1 --random 20
        python -m slm_jax.sweep --to sweeps/lr                continue, or print the results again

    Each trial is a run in FOLDER/runs, which all other commands read. The folder also has results.csv, sweep.png,
    report.html and sweep.toml. After a kill at any instant, the same command continues with the same bits. More values
    (not of random settings), seeds or random settings add trials; values that are not given again are left out of the
    results. A trial that diverges or does not fit into memory is
    listed in failures.json; remove it there to try it again.

    Exit status: 0 done; 2 invalid usage or data; 130, 143 or 129 stopped by SIGINT, SIGTERM or SIGHUP, saved.
    """

    to: Annotated[str, Flag(metavar="FOLDER")]
    """Folder of the sweep; an existing sweep in it is continued."""
    vary: Annotated[tuple[str, ...], Flag(metavar="OPTION=VALUE,VALUE …")] = ()
    """Options and their values; OPTION+OPTION=VALUE+VALUE,… for options that are set together, OPTION=LOW..HIGH for a
    range. All combinations are tried."""
    seeds: int | None = None
    """Number of seeds of each setting, from train.seed on. Default: 1, or that of the folder."""
    random: int | None = None
    """Try this many random settings instead of all combinations. Default: 0, or that of the folder."""
    random_seed: int | None = None
    """Seed of the random settings. Default: 0, or that of the folder."""
    metric: str = ""
    """The score, a key of metrics.jsonl of which the last value counts; lower is better. Default: val_bits_per_byte, or
    that of the folder."""
    config: Annotated[str, Flag(metavar="NAME|PATH")] = ""
    """Preset in configs/, or a TOML file; the options of the config override it."""


def parse_args(args: Sequence[str] | None) -> tuple[Sweep, Path]:
    """Return the sweep of a command line, and its folder.

    Raises:
        UserError: The command line is invalid, or does not continue the sweep in the folder.
    """
    options, overrides = read_options_and_config(Options, args, PROG)
    folder = Path(options.to)
    saved = Sweep.load(folder) if holds_definition(folder, SWEEP) else None
    require_seeds(options.seeds)
    for name in ("random", "random_seed"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise UserError(f"--{name} {value} must be 0 or more")
    if saved is not None and not options.config and not overrides:
        base = saved.base
    else:
        base = make_config(overrides, options.config)
    earlier = saved or Sweep(base, ())
    sweep = Sweep(
        base,
        options.vary or earlier.vary,
        earlier.seeds if options.seeds is None else options.seeds,
        earlier.num_random if options.random is None else options.random,
        earlier.random_seed if options.random_seed is None else options.random_seed,
        options.metric or earlier.metric,
    )
    if saved is not None:
        sweep.require_continues(saved, folder)
    return sweep, folder


def convert_word(name: str, word: str) -> Any:
    """Return the value of an option from a word of the command line.

    Raises:
        UserError: The word has a wrong type.
    """
    options = {option.name: option for option in config_options({})}
    return options[name].value([word])


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # samples on any terminal
    sweep, folder = parse_args(args)
    trials = sweep.trials(folder, convert_word)
    show_log()
    from slm_jax.sweep.run import run_trials
    from slm_jax.utils.process import tune_process

    tune_process(sweep.base.train.deterministic)  # before a device is opened
    with trials_folder(folder, PROG) as stop:
        sweep.save(folder)
        scores = run_trials(trials, folder, sweep.metric)
        _write_results(sweep, folder, trials, scores)
        stop(scores.stopped_by)


def _write_results(sweep: Sweep, folder: Path, trials: Sequence[Trial], scores: "Scores") -> None:
    """Print the table, and write the files of the results."""
    from slm_jax.report.compare import comparison_html
    from slm_jax.report.page import write_page
    from slm_jax.report.run_data import read_report_data
    from slm_jax.sweep import results

    rows = results.by_setting(trials, scores)
    if not rows:
        return
    results.write_csv(folder / results.RESULTS, trials, scores, sweep.metric)
    results.plot(folder / results.PLOT, sweep.axes(convert_word), rows, sweep.metric)
    finished = [trial.run for trial in trials if trial.run.name in scores.values]
    if len(finished) > 1:
        write_page(folder / "report.html", comparison_html([read_report_data(run) for run in finished]))
    print(f"\n{results.table(rows, sweep.metric)}\n")
    for line in (*results.summary(rows), *results.left_out(folder, trials)):
        print(line)
    print(f"\nIn {folder}: {results.RESULTS}, {results.PLOT}, report.html, {SWEEP}, runs/")
