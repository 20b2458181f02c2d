"""The command `python -m slm_jax.scaling`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from slm_jax.cli.options import Flag, make_config, read_options_and_config
from slm_jax.cli.trials_folder import holds_definition, require_seeds, trials_folder
from slm_jax.utils.errors import UserError
from slm_jax.utils.progress import show_log

if TYPE_CHECKING:  # these import JAX
    from slm_jax.scaling.prediction import Check, Fits, Prediction
    from slm_jax.scaling.study import Study
    from slm_jax.sweep.plan import Trial

PROG = "python -m slm_jax.scaling"
_TARGET = 4.0  # budget of the prediction, as a multiple of the largest one


@dataclass(frozen=True)
class Options:
    """Train models of several sizes at several budgets of FLOPs, fit scaling laws, and predict a larger run.

        python -m slm_jax.scaling --to scaling/a --budgets 1e12 3e12 1e13 --sizes 250k 400k 700k 1.2M --dry-run
        python -m slm_jax.scaling --to scaling/a --budgets 1e12 3e12 1e13 --sizes 250k 400k 700k 1.2M --seeds 2
        python -m slm_jax.scaling --to scaling/a --target 1e14 --check     continue: test the prediction
        python -m slm_jax.scaling --to scaling/a                           continue, or print the results again

    The options of each run follow from its size and budget by the rule of --size and --budget; tokenizer and sequence
    length are the same in all runs. Each is a run in FOLDER/runs, which all other commands read. The folder also has
    results.csv, scaling.json, scaling.png and scaling.toml. After a kill at any instant, the same command continues
    with the same bits. Further budgets, sizes and more seeds add runs to those of the folder.

    Exit status: 0 done; 1 the held-out run of --check is outside its interval; 2 invalid usage or data; 130, 143 or 129
    stopped by SIGINT, SIGTERM or SIGHUP, saved.
    """

    to: Annotated[str, Flag(metavar="FOLDER")]
    """Folder of the study; an existing study in it is continued."""
    budgets: Annotated[tuple[str, ...], Flag(metavar="FLOPS …")] = ()
    """FLOPs of a run, two or more values: 1e12 3e12. Those of an existing folder remain part of the study."""
    sizes: Annotated[tuple[str, ...], Flag(metavar="N …")] = ()
    """Parameters, three or more values: 300k 1.2M. Every budget has each of them, and each of the folder."""
    seeds: int | None = None
    """Number of seeds of each run, from train.seed on. Default: 1, or that of the folder."""
    target: Annotated[str, Flag(metavar="FLOPS")] = ""
    """FLOPs of the prediction. Default: 4 times the largest budget."""
    check: bool = False
    """Train the predicted model as well, and test whether its loss lies in the interval."""
    dry_run: bool = False
    """Print the runs with their FLOPs and expected time, and train nothing."""
    metric: str = ""
    """The loss, a key of metrics.jsonl of which the last value counts. Default: val_bits_per_byte, or that of the
    folder."""
    config: Annotated[str, Flag(metavar="NAME|PATH")] = ""
    """Preset in configs/, or a TOML file, of the options that all runs share; those of the command line override it
    and the rule."""


def parse_args(args: Sequence[str] | None) -> "tuple[Study, Path, Options]":
    """Return the study of a command line, its folder, and the command's own options.

    Raises:
        UserError: The command line is invalid, or does not continue the study in the folder.
    """
    options, overrides = read_options_and_config(Options, args, PROG)
    from slm_jax.scaling.study import SCALING, Study, merged, parse_numbers

    folder = Path(options.to)
    saved = Study.load(folder) if holds_definition(folder, SCALING) else None
    require_seeds(options.seeds)
    if saved is not None and not options.config and not overrides:
        base, given = saved.base, saved.given
    else:
        base, given = make_config(overrides, options.config), tuple(overrides)
    earlier = saved or Study(base, (), ())
    study = Study(
        base,
        merged("budgets", earlier.budgets, parse_numbers("budgets", options.budgets)),
        merged("sizes", earlier.sizes, parse_numbers("sizes", options.sizes)),
        given,
        earlier.seeds if options.seeds is None else options.seeds,
        options.metric or earlier.metric,
    )
    study.require_valid()
    if saved is not None:
        study.require_continues(saved, folder)
    return study, folder, options


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # samples on any terminal
    study, folder, options = parse_args(args)
    from slm_jax.config.training_length import MAX_EPOCHS
    from slm_jax.scaling import results
    from slm_jax.scaling.collect import finished_runs
    from slm_jax.scaling.prediction import can_fit, fit, notes, predict, run_check
    from slm_jax.scaling.study import MIN_SIZES, parse_numbers
    from slm_jax.sweep.run import FAILURES, run_trials
    from slm_jax.training.mfu import vocabulary
    from slm_jax.utils.process import tune_process

    targets = parse_numbers("target", [options.target] if options.target else [])
    target = targets[0] if targets else _TARGET * study.budgets[-1]
    if target <= study.budgets[-1]:
        raise UserError(f"--target {target:g} must be above the largest budget, {study.budgets[-1]:g}")
    tune_process(study.base.train.deterministic)  # before a device is opened
    vocab_size = vocabulary(study.base)
    trials = study.trials(folder, vocab_size)
    if options.dry_run:
        _print_plan(trials, folder, study.metric)
        return 0
    show_log()
    with trials_folder(folder, PROG) as stop:
        study.save(folder)
        scores = run_trials(trials, folder, study.metric)
        runs = finished_runs(trials, scores)
        results.write_csv(folder / results.CSV, trials, runs, study.metric)
        if runs:
            print(f"\n{results.run_table(runs, study.metric)}")
        if not can_fit(runs):
            stop(scores.stopped_by)
            raise UserError(f"no budget has {MIN_SIZES} finished sizes, see {folder / FAILURES}: give other --sizes")
        fits = fit(runs)
        limits = notes(fits, runs, MAX_EPOCHS, lambda budget, size: study.can_train(budget, size, vocab_size))
        prediction = check = None
        try:
            prediction = predict(fits, study, target, vocab_size, folder)
        except UserError as error:
            limits.append(f"No prediction for {target:.3g} FLOPs: {error}.")
        stopped_by = scores.stopped_by
        if options.check and prediction is not None and stopped_by is None:
            check, stopped_by = run_check(fits, prediction, folder, study.metric)
        _write_results(study.metric, folder, fits, prediction, check, limits)
        stop(stopped_by)
        if options.check and check is None:
            raise UserError("--check: there is no prediction to check, or the held-out run failed, see above")
    return int(check is not None and not check.passed)


def _write_results(
    metric: str, folder: Path, fits: "Fits", prediction: "Prediction | None", check: "Check | None", notes: list[str]
) -> None:
    """Print the fits, and write the files of the results."""
    from slm_jax.scaling import results
    from slm_jax.scaling.plot import plot

    results.write_json(folder / results.JSON, fits, prediction, check, metric, notes)
    plot(folder / results.PLOT, fits, prediction, check, metric)
    print()
    for line in results.fit_lines(fits):
        print(line)
    if prediction is not None:
        print()
        for line in results.prediction_lines(prediction, metric):
            print(line)
    if check is not None:
        print(results.check_line(check, metric))
    for note in notes:
        print(f"note: {note}")
    print(f"\nIn {folder}: {results.CSV}, {results.JSON}, {results.PLOT}, scaling.toml, runs/")


def _print_plan(trials: "Sequence[Trial]", folder: Path, metric: str) -> None:
    from slm_jax.scaling.collect import expected_seconds, finished_runs
    from slm_jax.scaling.results import planned_table
    from slm_jax.scaling.study import size_setting
    from slm_jax.sweep.run import finished_scores
    from slm_jax.utils.formatting import duration, plural

    finished = finished_runs(trials, finished_scores(trials, folder, metric))
    seconds, source = expected_seconds(trials, finished)
    done = {run.trial.run for run in finished}
    left = sum(time for trial, time in zip(trials, seconds, strict=True) if trial.run not in done)
    total = sum(size_setting(trial).flops for trial in trials)
    print(planned_table(trials, seconds))
    print(f"\n{plural(len(trials), 'run')}, {len(done)} finished, {total:.2e} FLOPs in all")
    print(f"about {duration(left)} are left without compilation, {source}")
