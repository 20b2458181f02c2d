"""Train one model through a curriculum of texts: `python -m slm_jax.orchestrator`, or `orchestrate(curriculum)`.

    curriculum -> one tokenizer -> for each stage: a run that starts with the weights of the stage before
                                   -> a benchmark row, the scores on the text of all stages so far, evaluation tasks

A stage is an ordinary run in `stages/NN-NAME`, trained by `slm_jax.training.train.train`. The same command, given again
after a kill at any instant, resumes the curriculum and ends with the same bits; stages that were appended to a finished
curriculum are trained.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slm_jax.config.conversion import loaded
from slm_jax.config.curriculum import Curriculum, Stage
from slm_jax.config.paths import CURRICULUM, RUNS
from slm_jax.config.schema import MAX_STEPS, Config
from slm_jax.curriculum import benchmarks
from slm_jax.distributed import agreement, multihost
from slm_jax.distributed.software import require_same_software
from slm_jax.run.directory import UNUSED, Run, stages_in
from slm_jax.run.results import BENCHMARKS, append_benchmark
from slm_jax.run.trend import Trend
from slm_jax.training.result import Result
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import is_partial, replace_text
from slm_jax.utils.progress import show_log
from slm_jax.utils.text_tokenizer import save_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call of `orchestrate`.

    Attributes:
        path: The folder of the curriculum.
        results: The results of the stages that this call trained or found to be finished.
        stopped_by: The signal that ended it.
    """

    path: Path
    results: list[Result]
    stopped_by: int | None = None


def orchestrate(curriculum: Curriculum | str | Path | dict[str, Any], path: str | Path | None = None) -> Outcome:
    """Train a curriculum, or resume its training.

    SIGINT, SIGTERM and SIGHUP end it after the current step, with a checkpoint.

    Args:
        curriculum: The curriculum, the name of a preset, the path of a TOML file, or nested dicts.
        path: The folder of the curriculum, `runs/NAME` by default. A curriculum in it is resumed.

    Returns:
        The results of the stages.

    Raises:
        UserError: The curriculum is invalid, or differs from what was trained before; all problems are named.
        TypeError: `curriculum` is none of these.
    """
    show_log(multihost.log_prefix())
    curriculum = loaded(curriculum, Curriculum)
    folder = Path(agreement.from_first("folder of the curriculum", lambda: str(path or RUNS / curriculum.name)))
    logger.info("curriculum: %s", folder)
    require_same_software()
    agreement.require_same("the curriculum", partial(_shared, curriculum), "give the same command to all processes")
    with _locked(folder):
        agreement.from_first("start of the curriculum", lambda: _begin(folder, curriculum))
        return _run_stages(folder, curriculum)


def _shared(curriculum: Curriculum) -> dict[str, Any]:
    """Return what all processes must agree on: all but the options that may differ between hosts."""
    values: dict[str, Any] = curriculum.options.model_dump(mode="json")
    for stage in curriculum.stages:
        values[f"{stage.title}: epochs"] = stage.epochs
        for name, value in stage.config.flat().items():
            if name not in Config.fields_with("per_host"):
                values[f"{stage.title}: {name}"] = value
    return values


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a curriculum in the first process; remove a new folder if no stage was started."""
    if not multihost.is_first():
        yield
        return
    is_new = not folder.exists()
    with Run(folder).lock():
        try:
            yield
        except BaseException:
            if is_new and not stages_in(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _begin(folder: Path, curriculum: Curriculum) -> None:
    """Check the curriculum against its texts and what was trained before; save it and its tokenizer."""
    from slm_jax.curriculum import stage_scores
    from slm_jax.data.sources.registry import make_sources
    from slm_jax.evaluation.specs import parse_tasks

    names = {entry.name for entry in folder.iterdir() if not is_partial(entry)} - {".lock", UNUSED}
    if names and CURRICULUM not in names:
        content = "a run" if Run(folder).exists() else "files"
        raise UserError(f"{folder} holds {content} but no curriculum: use another --run")
    started = stages_in(folder)
    problems = [*_tokenizer_problems(folder, curriculum), *_stage_problems(folder, curriculum)]
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
        hint = "\nTo restart a stage, remove its folder and those of later stages; or use another --run."
        raise UserError(f"{folder} cannot be trained:{listed}{hint if started else ''}")
    stage_scores.forget(folder, [run.name for run in started])
    replace_text(folder / CURRICULUM, curriculum.to_toml())
    (folder / UNUSED).unlink(missing_ok=True)
    _make_tokenizer(folder, curriculum)


def _tokenizer_problems(folder: Path, curriculum: Curriculum) -> Iterator[str]:
    """Yield a problem if the curriculum names another tokenizer than it was started with."""
    from slm_jax.data.load import load_tokenizer

    path = curriculum.stages[0].config.tokenizer.path
    saved = Run(folder).tokenizer
    if path and saved.is_file() and load_tokenizer(path).fingerprint != load_tokenizer(str(saved)).fingerprint:
        yield f"tokenizer.path {path} is not the tokenizer that the curriculum was started with"


def _stage_problems(folder: Path, curriculum: Curriculum) -> Iterator[str]:
    """Yield how the curriculum differs from the stages that were started."""
    for number, path in enumerate(stages_in(folder)):
        stage = curriculum.stages[number] if number < len(curriculum.stages) else None
        if stage is None or stage.folder(folder).name != path.name:
            now = f"now stage {number + 1} is {stage.name}" if stage else f"now there are {number} stages"
            yield f"{path.name} was started, and {now}: stages can only be added after those that were started"
            return
        yield from _changed_options(folder, stage, Run(path))


def _changed_options(folder: Path, stage: Stage, run: Run) -> Iterator[str]:
    """Yield the options of a stage that differ from those that its run is bound to."""
    if not run.corpus.is_dir():
        return
    saved = run.read_config()
    config = _stage_config(stage, folder)
    trend = _newest_trend(run, saved)
    is_stopped_early = trend.is_over(saved.train.stop_early)
    is_done = is_stopped_early or run.newest_step() == saved.train.steps
    differences = run.conflicts(_relocated(saved, stage, folder), config)
    if is_done and stage.epochs is None and config.train.steps != saved.train.steps:
        # The next stage has started with its weights: more steps would change what was trained.
        differences["train.steps"] = (saved.train.steps, config.train.steps)
    if is_stopped_early and not trend.is_over(config.train.stop_early):  # it would be trained further
        differences["train.stop_early"] = (saved.train.stop_early, config.train.stop_early)
    for name, (old, new) in differences.items():
        yield f"{stage.title} was started with another {name}: {old!r} saved, {new!r} current"
    if is_done and stage.epochs is not None:
        steps = _steps_of_epochs(config, run, stage.epochs)
        if steps != saved.train.steps:
            yield f"{stage.title} had {saved.train.steps} steps: {stage.epochs:g} epochs are {steps}"


def _newest_trend(run: Run, saved: Config) -> Trend:
    """Return the validations of a stage up to its newest checkpoint; none if they cannot end the stage."""
    if not saved.train.stop_early:
        return Trend()
    from slm_jax.run.selection import newest_trend  # imports JAX

    return newest_trend(run)


def _stage_config(stage: Stage, folder: Path) -> Config:
    """Return the config of a stage's run, with the paths that depend on the folder of the curriculum."""
    config = stage.config
    if shared := config.checkpoint.folder:  # of all stages, each of which has a folder in it
        checkpoint = config.checkpoint.model_copy(update={"folder": f"{shared}/{stage.folder(folder).name}"})
        config = config.model_copy(update={"checkpoint": checkpoint})
    return _relocated(config, stage, folder)


def _relocated(config: Config, stage: Stage, folder: Path) -> Config:
    """Return a config, also one that was saved before the folder was moved, with the paths in the folder."""
    tokenizer = config.tokenizer.model_copy(update={"path": str(folder / Run(folder).tokenizer.name)})
    init = config.init
    if stage.number > 1:
        previous = next(folder.glob(f"stages/{stage.number - 1:02d}-*"), folder)
        init = init.model_copy(update={"from_run": str(previous)})
    return config.model_copy(update={"tokenizer": tokenizer, "init": init})


def _make_tokenizer(folder: Path, curriculum: Curriculum) -> None:
    """Save the tokenizer of all stages, unless it is there: a given one, that of the initial weights, or a new one."""
    from slm_jax.data.learning import learn_tokenizer
    from slm_jax.data.load import load_tokenizer
    from slm_jax.training.tokenizer import resolve_tokenizer

    path = Run(folder).tokenizer
    if path.is_file():
        return
    configs = [stage.config for stage in curriculum.stages]
    given = resolve_tokenizer(configs[0])
    if given:
        save_tokenizer(load_tokenizer(given), folder)
    else:
        learn_tokenizer(configs if curriculum.options.tokenizer_text == "all" else configs[:1]).save(path)


def _run_stages(folder: Path, curriculum: Curriculum) -> Outcome:
    """Train and measure the stages in order, until the last one or a signal."""
    results: list[Result] = []
    for stage in curriculum.stages:
        run = Run(stage.folder(folder))
        later = [each for each in curriculum.stages if each.number > stage.number]
        if later and agreement.from_first("next stage", Run(later[0].folder(folder)).newest_step) is not None:
            _measure(folder, curriculum, stage)  # a kill may have come between its last step and its measurement
            continue
        # A finished stage is trained as well: if its last checkpoint is corrupt, its steps are repeated before the
        # next stage starts with its weights.
        config = _agreed(_stage_config(stage, folder))
        if multihost.is_first() and run.exists() and run.corpus.is_dir():
            run.save_config(_relocated(run.read_config(), stage, folder))
        config = _with_steps(stage, config, run)
        logger.info(_headline(stage, config, len(curriculum.stages)))
        result = train(config, run.path)
        results.append(result)
        if result.stopped_by is not None:
            return Outcome(folder, results, result.stopped_by)
        _measure(folder, curriculum, stage)
        if result.signal is not None and later:  # received during the last step
            return Outcome(folder, results, result.signal)
    return Outcome(folder, results)


def _agreed(config: Config) -> Config:
    """Return the config with the previous stage that the first process has found in the folder."""
    previous = agreement.from_first("previous stage", lambda: config.init.from_run)
    return config.model_copy(update={"init": config.init.model_copy(update={"from_run": previous})})


def _with_steps(stage: Stage, config: Config, run: Run) -> Config:
    """Return the config with the number of steps of the stage's epochs, for which its text is prepared."""
    if stage.epochs is None:
        return config
    is_first = multihost.is_first()
    with run.lock() if is_first else contextlib.nullcontext():
        agreement.from_first("start of the stage", lambda: run.begin(config))
        steps = agreement.from_first("steps of the stage", lambda: _steps_of_epochs(config, run, stage.epochs or 0))
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
        if is_first:
            run.save_config(config)
    return config


def _steps_of_epochs(config: Config, run: Run, epochs: float) -> int:
    """Return the steps of a number of epochs of a run's text, rounded up; the text is prepared if necessary."""
    from slm_jax.data.batches.modes import make_batches
    from slm_jax.data.batches.pairs import PairBatches
    from slm_jax.data.pairs import open_pairs
    from slm_jax.training.tokenizer import prepare_data

    tokenizer, corpus = prepare_data(config, run)
    if config.train.objective == "dpo":
        length, seed = config.train.sequence_length, config.train.seed
        pairs = open_pairs(run.pairs, config, corpus, tokenizer)
        per_epoch = PairBatches(pairs, config.train.batch_size, length, seed).steps_per_epoch
    else:
        per_epoch = make_batches(config, corpus).steps_per_epoch
    if epochs * per_epoch > MAX_STEPS:
        raise UserError(
            f"{epochs:g} epochs of {per_epoch:,.1f} steps each are more than {MAX_STEPS:,} steps: lower epochs"
        )
    steps = max(1, math.ceil(epochs * per_epoch - 1e-9))
    logger.info("%g epochs of %s steps each are %s steps, rounded up", epochs, f"{per_epoch:,.1f}", f"{steps:,}")
    return steps


def _headline(stage: Stage, config: Config, count: int) -> str:
    optimizer = config.optimizer
    text = " ".join(config.data.mix or config.data.files or (config.data.source,))
    parts = [text]
    if config.init.from_run:
        parts.append(f"weights of {Path(config.init.from_run).name}")
    if config.init.optimizer == "keep":
        parts.append("optimizer state kept")
    parts.append(f"{config.train.steps:,} steps of {config.train.batch_size} x {config.train.sequence_length}")
    parts.append(f"{optimizer.name} {optimizer.lr:g} {optimizer.schedule}")
    if config.model.dropout:
        parts.append(f"dropout {config.model.dropout:g}")
    return f"\nstage {stage.number} of {count}: {stage.name}: {', '.join(parts)}"


def _measure(folder: Path, curriculum: Curriculum, stage: Stage) -> None:
    """Append the benchmark row of a finished stage, score and evaluate its model, each unless it is done already."""
    from slm_jax.report.page import write_report_after_training

    if not multihost.is_first():
        return
    runs = [Run(each.folder(folder)) for each in curriculum.stages[: stage.number]]
    append_benchmark(folder / BENCHMARKS, benchmarks.measure(runs[-1]))
    if multihost.process_count() > 1:  # all processes would have to read the checkpoint
        logger.info("note: models are scored and evaluated by one process: run the same command in one when this ends")
    else:
        if curriculum.options.compare:
            from slm_jax.curriculum import stage_scores

            stage_scores.update(folder, runs)
        _evaluate(runs[-1], curriculum.options.evaluate)
    write_report_after_training(Run(folder))


def _evaluate(run: Run, tasks: Sequence[str]) -> None:
    """Measure the tasks that were not measured on the run's default checkpoint, or on another data set."""
    from slm_jax.evaluation import suite

    remaining = suite.unmeasured_tasks(run, tasks)
    if remaining:
        unstored = suite.evaluate(run.path, remaining).unstored
        if unstored:
            raise UserError("; ".join(f"{task}: measured, but not stored: {why}" for task, why in unstored.items()))
