"""One model through a curriculum of texts: `python -m slm_jax.orchestrator`, or `orchestrate(curriculum)`.

    curriculum  ->  one tokenizer  ->  stage by stage: its run, begun with the weights of the one before
                                       ->  a benchmark row, the scores on all texts so far, evaluation tasks

A stage is a run like any other, in `stages/NN-NAME`, and the training loop does what it does for every run. So the same
command, given again after a kill at any instant, goes on where it was and ends with the same bits; on a curriculum that
is finished it does the stages that were added since.
"""

import contextlib
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_jax.config.curriculum import Curriculum, Stage
from slm_jax.config.paths import CURRICULUM, RUNS
from slm_jax.config.schema import MAX_STEPS, Config
from slm_jax.curriculum import benchmarks
from slm_jax.distributed import multihost
from slm_jax.run.directory import Run, stages_in
from slm_jax.run.results import BENCHMARKS, append_benchmark
from slm_jax.training.result import Result
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import is_partial, replace_text
from slm_jax.utils.progress import show_log


@dataclass(frozen=True)
class Outcome:
    """How a call of `orchestrate` ended."""

    path: Path
    results: list[Result]  # of the stages that this call looked at
    stopped_by: int | None = None  # the signal that ended it


def orchestrate(curriculum: Curriculum | str | Path | dict[str, Any], path: str | Path | None = None) -> Outcome:
    """Train, or continue, a curriculum (or a preset's name, a TOML file, nested dicts) in the folder at a path.

    The folder is `runs/NAME` by default: the same call continues it. Raises UserError. SIGINT and SIGTERM end it after
    the step in hand, saved.
    """
    show_log()
    if isinstance(curriculum, dict):
        curriculum = Curriculum.from_tree(curriculum)
    elif not isinstance(curriculum, Curriculum):
        curriculum = Curriculum.load(curriculum)
    folder = Path(path or RUNS / curriculum.name)
    first, fresh = multihost.is_first(), not folder.exists()
    _say(f"curriculum: {folder}")
    with Run(folder).lock() if first else contextlib.nullcontext():
        try:
            multihost.broadcast_from_first(lambda: _begin(folder, curriculum))
            return _run_stages(folder, curriculum)
        except BaseException:
            if first and fresh and not stages_in(folder):  # nothing came of it: leave no trace
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _begin(folder: Path, curriculum: Curriculum) -> None:
    """Check that what was done fits the curriculum, and that its texts are there; keep it; make the tokenizer."""
    from slm_jax.curriculum import stage_scores
    from slm_jax.data.sources.registry import make_sources
    from slm_jax.evaluation.suite import parse_tasks

    here = {entry.name for entry in folder.iterdir() if not is_partial(entry)} - {".lock"}
    if here and CURRICULUM not in here:
        what = "a run" if Run(folder).exists() else "files"
        raise UserError(f"{folder} holds {what} but no curriculum: use another --run")
    begun = stages_in(folder)
    problems = _changes(folder, curriculum)
    try:
        parse_tasks(curriculum.options.evaluate)
    except UserError as error:
        problems.append(f"curriculum.evaluate: {str(error).removeprefix('--tasks: ')}")
    for stage in curriculum.stages:
        if not Run(stage.folder(folder)).corpus.is_dir():
            try:
                make_sources(stage.config.data)
            except UserError as error:
                problems.append(f"{stage.title}: {error}")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        again = "\nTo begin a stage anew, remove its folder and those behind it; or use another --run." if begun else ""
        raise UserError(f"{folder} cannot go on:{listed}{again}")
    stage_scores.forget(folder, [place.name for place in begun])
    replace_text(folder / CURRICULUM, curriculum.to_toml())
    _make_tokenizer(folder, curriculum)


def _changes(folder: Path, curriculum: Curriculum) -> list[str]:
    """What the curriculum says otherwise of the stages that were begun."""
    from slm_jax.data.load import load_tokenizer

    problems, given, tokenizer = [], curriculum.stages[0].config.tokenizer.path, Run(folder).tokenizer
    if (
        given
        and tokenizer.is_file()
        and load_tokenizer(given).fingerprint != load_tokenizer(str(tokenizer)).fingerprint
    ):
        problems.append(f"tokenizer.path {given} is not the tokenizer that the curriculum was begun with")
    for number, place in enumerate(stages_in(folder)):
        stage = curriculum.stages[number] if number < len(curriculum.stages) else None
        if stage is None or stage.folder(folder).name != place.name:
            now = f"now stage {number + 1} is {stage.name}" if stage else f"now there are {number} stages"
            problems.append(f"{place.name} was begun, and {now}: stages can be added behind those that were begun only")
            break
        run = Run(place)
        if not run.corpus.is_dir():  # nothing is bound to its config yet
            continue
        saved = run.read_config()
        done = run.newest_step() == saved.train.steps
        may = Config.fields_with("resumable")
        if done and stage.epochs is None:
            may -= {"train.steps"}
        wanted = _placed(stage, folder)
        for name, (old, new) in _placed(stage, folder, saved).differences(wanted).items():
            if name not in may:
                problems.append(f"{stage.title} was begun with another {name}: {old!r} there, {new!r} here")
        if done and stage.epochs is not None and (steps := _steps_of(wanted, run, stage.epochs)) != saved.train.steps:
            problems.append(f"{stage.title} was of {saved.train.steps} steps: {stage.epochs:g} epochs are {steps}")
    return problems


def _placed(stage: Stage, folder: Path, config: Config | None = None) -> Config:
    """The config of a stage's run in a folder (or a config that was saved there, for the folder may have moved)."""
    if config is None:
        config = stage.config
        if elsewhere := config.checkpoint.folder:  # shared by all stages, of which each has its own
            checkpoint = config.checkpoint.model_copy(update={"folder": f"{elsewhere}/{stage.folder(folder).name}"})
            config = config.model_copy(update={"checkpoint": checkpoint})
    tokenizer = config.tokenizer.model_copy(update={"path": str(folder / Run(folder).tokenizer.name)})
    init = config.init
    if stage.number > 1:
        before = next(folder.glob(f"stages/{stage.number - 1:02d}-*"), folder)
        init = init.model_copy(update={"from_run": str(before)})
    return config.model_copy(update={"tokenizer": tokenizer, "init": init})


def _make_tokenizer(folder: Path, curriculum: Curriculum) -> None:
    """The tokenizer of all stages: found in the folder, given, that of the run they begin with, or learned."""
    from slm_jax.data.load import load_tokenizer
    from slm_jax.data.prepare import learn_tokenizer
    from slm_jax.training.tokenizer import resolve_tokenizer

    place, configs = Run(folder).tokenizer, [stage.config for stage in curriculum.stages]
    if place.is_file():
        return
    if given := resolve_tokenizer(configs[0]):
        load_tokenizer(given).save(place)
    else:
        learn_tokenizer(configs if curriculum.options.tokenizer_text == "all" else configs[:1]).save(place)


def _run_stages(folder: Path, curriculum: Curriculum) -> Outcome:
    results: list[Result] = []
    for stage in curriculum.stages:
        run = Run(stage.folder(folder))
        behind = [each for each in curriculum.stages if each.number > stage.number]
        if behind and Run(behind[0].folder(folder)).newest_step() is not None:
            _record(folder, curriculum, stage)  # it may have been killed between the last step and this
            continue
        # A stage that is done is found so, or mended if its last checkpoint was damaged, before another begins with it.
        config = _placed(stage, folder)
        if multihost.is_first() and run.exists() and run.corpus.is_dir():
            run.save_config(_placed(stage, folder, run.read_config()))  # the folder may have moved
        config = _with_steps(stage, config, run)
        _say(_headline(stage, config, len(curriculum.stages)))
        result = train(config, run.path)
        results.append(result)
        if result.stopped_by is not None:
            return Outcome(folder, results, result.stopped_by)
        _record(folder, curriculum, stage)
        if result.signal is not None and behind:  # it came at the last step
            return Outcome(folder, results, result.signal)
    return Outcome(folder, results)


def _with_steps(stage: Stage, config: Config, run: Run) -> Config:
    """The config with the steps that the stage's epochs are; its text is prepared for that."""
    if stage.epochs is None:
        return config
    first = multihost.is_first()
    with run.lock() if first else contextlib.nullcontext():
        multihost.broadcast_from_first(lambda: run.begin(config))
        steps = multihost.broadcast_from_first(lambda: _steps_of(config, run, stage.epochs or 0, _say))
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
        if first:
            run.save_config(config)
    return config


def _steps_of(config: Config, run: Run, epochs: float, say: Callable[[str], None] = lambda _: None) -> int:
    """How many steps so many epochs of a run's text are, rounded up; prepares the text if it is not."""
    from slm_jax.data.batches.modes import make_batches
    from slm_jax.training.tokenizer import prepare_data

    _, corpus = prepare_data(config, run)
    each = make_batches(config, corpus).steps_per_epoch
    if epochs * each > MAX_STEPS:
        raise UserError(f"{epochs:g} epochs of {each:,.1f} steps each are more than {MAX_STEPS:,} steps: lower epochs")
    steps = max(1, math.ceil(epochs * each - 1e-9))
    say(f"{epochs:g} epochs of {each:,.1f} steps each are {steps:,} steps, rounded up")
    return steps


def _headline(stage: Stage, config: Config, count: int) -> str:
    o, t = config.optimizer, config.train
    text = " ".join(config.data.mix or config.data.files or (config.data.source,))
    start = f"weights of {Path(config.init.from_run).name}, " if config.init.from_run else ""
    moments = "optimizer state kept, " if config.init.optimizer == "keep" else ""
    dropout = f", dropout {config.model.dropout:g}" if config.model.dropout else ""
    return (
        f"\nstage {stage.number} of {count}: {stage.name}: {text}, {start}{moments}{t.steps:,} steps of "
        f"{t.batch_size} x {t.sequence_length}, {o.name} {o.lr:g} {o.schedule}{dropout}"
    )


def _record(folder: Path, curriculum: Curriculum, stage: Stage) -> None:
    """What is measured of a stage that is done, each once whatever happens."""
    if not multihost.is_first():
        return
    runs = [Run(each.folder(folder)) for each in curriculum.stages[: stage.number]]
    append_benchmark(folder / BENCHMARKS, benchmarks.measure(runs[-1]))
    if multihost.process_count() > 1:  # a checkpoint is read by all of them or none
        _say("note: models are compared and evaluated by one process: give the same command to one, when all is done")
    else:
        if curriculum.options.compare:
            from slm_jax.curriculum import stage_scores

            stage_scores.update(folder, runs, _say)
        _evaluate(runs[-1], curriculum.options.evaluate)
    from slm_jax.report.page import write_report_after_training

    write_report_after_training(Run(folder))  # as training did, now with what was measured since


def _evaluate(run: Run, tasks: Sequence[str]) -> None:
    """Measure those of the tasks that were not measured of the run's newest model, or of another set."""
    from slm_jax.evaluation import suite

    remaining = suite.unmeasured_tasks(run, tasks)
    if remaining:
        suite.evaluate(run.path, remaining)


def _say(text: str) -> None:
    if multihost.is_first():
        print(text, file=sys.stderr, flush=True)
