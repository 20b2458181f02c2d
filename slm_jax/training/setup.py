"""Everything before the first step: devices, text, restored or initial state, and a compiled step that fits.

    open_run          mesh -> initial weights (checked) -> tokenizer and text -> newest checkpoint or warm start
    compile_session   compile to fit into memory -> initial state -> a `Session` for the loop

The order matters: mistakes that are found without much work come first, and nothing that an earlier call has done is
changed before the run is known to be compatible.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from slm_jax.config.schema import Config
from slm_jax.data.batches.modes import make_batches
from slm_jax.data.batches.packed import PackedBatches
from slm_jax.data.batches.padded import PaddedBatches
from slm_jax.data.batches.pairs import PairBatches
from slm_jax.data.corpus.corpus import Corpus
from slm_jax.distributed import agreement, multihost, sharding
from slm_jax.distributed.first_calls import FirstCalls
from slm_jax.distributed.platform import Platform
from slm_jax.evaluation.loading import LoadedTask
from slm_jax.model import ops
from slm_jax.model.precision import compute_dtype, describe_precision
from slm_jax.performance import flops
from slm_jax.performance.roofline import mfu_baseline
from slm_jax.run import environment
from slm_jax.run.checkpoint import Checkpoints
from slm_jax.run.directory import Run, curriculum_of
from slm_jax.run.frozen import save_base
from slm_jax.run.metrics import Row, read_metrics
from slm_jax.run.trend import Trend
from slm_jax.training import health, memory, resume, validation, warm_start
from slm_jax.training.dpo.run import open_pair_batches, pair_validation, set_reference
from slm_jax.training.expectation import expectation
from slm_jax.training.options import layer_norms, loss_scale
from slm_jax.training.options.loggers import make_loggers
from slm_jax.training.options.profiler import traced_steps
from slm_jax.training.overfitting import rise_text
from slm_jax.training.result import Result
from slm_jax.training.sample_texts import sampling_function
from slm_jax.training.schedule import make_schedule
from slm_jax.training.session import Session, plain_steps
from slm_jax.training.steps import Steps, make_steps
from slm_jax.training.tasks import TrainingTasks, load_tasks
from slm_jax.training.tokenizer import prepare_data_together
from slm_jax.training.train_step import TrainState
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural
from slm_jax.utils.process import DETERMINISTIC
from slm_jax.utils.text_tokenizer import TextTokenizer
from slm_jax.utils.waiting import waiting
from tokenizer import HybridTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenRun:
    """A run with its data and its newest state, before its step is compiled.

    Attributes:
        config: The config of this call.
        run: The run directory.
        mesh: The devices.
        tokenizer: The tokenizer.
        corpus: The tokenized text.
        batches: The training batches.
        steps: The functions of the run, not compiled.
        checkpoints: The checkpoints of the run.
        compatibility: Stored with each checkpoint, see `resume.compatibility`.
        state: The restored state, or that of a warm start; None for a run that starts with random weights.
        start: The number of steps taken.
        trend: The validations up to then.
        rows: The rows of `metrics.jsonl`, which may include steps after the newest checkpoint.
        tasks: The tasks of `eval.tasks` with their data.
    """

    config: Config
    run: Run
    mesh: jax.sharding.Mesh
    tokenizer: TextTokenizer
    corpus: Corpus
    batches: PackedBatches | PaddedBatches | PairBatches
    steps: Steps
    checkpoints: Checkpoints
    compatibility: dict[str, Any]
    state: TrainState | None
    start: int
    trend: Trend
    rows: list[Row]
    tasks: list[LoadedTask]

    @property
    def finished(self) -> Result | None:
        """The result of earlier calls, if they took all steps or stopped early."""
        if self.start < self.config.train.steps and not self.trend.is_over(self.config.train.stop_early):
            return None
        return Result(self.run.path, self.start, self.rows[-1] if self.rows else {}, trend=self.trend)


@contextlib.contextmanager
def open_run(config: Config, run: Run) -> Iterator[OpenRun]:
    """Prepare the data of a run and restore its newest state.

    Args:
        config: The options of this call.
        run: The run directory, locked and started (`Run.begin`).

    Yields:
        The open run. Its checkpoints are closed when the block ends.

    Raises:
        UserError: The config does not fit the devices, the text or the checkpoints of the run.
    """
    _require_deterministic(config)
    mesh = sharding.make_mesh(config)
    has_checkpoint = agreement.from_first("newest checkpoint", run.newest_step) is not None
    initial = None if has_checkpoint else warm_start.find_initial_weights(config)
    is_done = agreement.from_first("steps so far", lambda: (run.newest_step() or 0) >= config.train.steps)
    tasks = [] if is_done else load_tasks(config)
    tokenizer, corpus = prepare_data_together(config, run)
    _require_known_documents(config, tokenizer)
    is_dpo = config.train.objective == "dpo"
    batches = open_pair_batches(config, run, corpus, tokenizer) if is_dpo else make_batches(config, corpus)
    steps = make_steps(config, tokenizer.vocab_size, mesh)
    _log_devices(config, mesh)
    with Checkpoints(run.checkpoints, config.checkpoint) as checkpoints:
        pairs = batches.rows.pairs.fingerprint if isinstance(batches, PairBatches) else ""
        compatibility = resume.compatibility(config, steps, corpus.fingerprint, tokenizer.fingerprint, pairs)
        state, start, trend = resume.restore(checkpoints, steps, mesh, compatibility)
        if state is None and initial is not None:
            state, weights = warm_start.initial_state(config, initial, steps, tokenizer.vocab_size, mesh)
            if config.lora.rank or is_dpo:
                save_base(checkpoints.folder, weights)
            del weights
            checkpoints.save(0, state.saved_fields(), compatibility)
            checkpoints.wait()  # from here on the run does not need the other one
        rows = read_metrics(run.metrics)
        trend = _earlier_validations(rows, start) if trend is None else trend
        if start > config.train.steps:
            raise UserError(
                f"{start} steps of {run.path} are done, more than --train.steps {config.train.steps}: "
                "give more steps, or another --run"
            )
        yield OpenRun(
            config=config,
            run=run,
            mesh=mesh,
            tokenizer=tokenizer,
            corpus=corpus,
            batches=batches,
            steps=steps,
            checkpoints=checkpoints,
            compatibility=compatibility,
            state=state,
            start=start,
            trend=trend,
            rows=rows,
            tasks=tasks,
        )


def _require_deterministic(config: Config) -> None:
    """Refuse `train.deterministic` without the flag of XLA, which JAX reads when it starts.

    Raises:
        UserError: It is missing.
    """
    if config.train.deterministic and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        raise UserError(
            f"train.deterministic: set the environment variable XLA_FLAGS={DETERMINISTIC}=true before JAX starts"
        )


def _require_known_documents(config: Config, tokenizer: TextTokenizer) -> None:
    """Refuse the unlikelihood loss where the beginnings of documents in packed rows are not known.

    Raises:
        UserError: They are not.
    """
    if config.train.ul_alpha and config.data.mode == "packed" and not isinstance(tokenizer, HybridTokenizer):
        raise UserError(
            "train.ul_alpha with data.mode packed finds documents by the <EOS> of the project's tokenizers, which this "
            "run does not have: use --data.mode segmented"
        )


def _earlier_validations(rows: list[Row], start: int) -> Trend:
    """Return the validations up to a step, of a run whose checkpoint does not store them."""
    earlier = Trend.from_rows(row for row in rows if row["step"] <= start)
    return Trend.from_json(agreement.from_first("validations so far", earlier.to_json))


def compile_session(opened: OpenRun) -> Session:
    """Compile the training step so that it fits into memory, and make the initial state of a new run.

    Args:
        opened: A run with steps left.

    Returns:
        The session that the training loop runs. The config with the microbatch size that fits is saved in the run.

    Raises:
        UserError: No microbatch size fits, or not the one that was asked for.
    """
    fitted, state, shape = _fit(opened)
    config = fitted.config
    steps = fitted.steps
    run = opened.run
    mesh = opened.mesh
    vocab_size = opened.tokenizer.vocab_size
    first_calls = FirstCalls(Platform.of_mesh(mesh))
    validate = make_validation(config, opened, steps._replace(evaluate=first_calls.program(steps.evaluate)))
    peak = mfu_baseline(config, vocab_size, mesh)
    logger.info("MFU baseline: %s", peak.text)
    precision = describe_precision(config, Platform.of_mesh(mesh))
    _log_other_precision(run, opened.start, precision)
    environment.record(run, opened.start, mesh, precision=precision, mfu_of=peak.text)
    part = sharding.batch_shard(mesh)
    # jax_debug_nans repeats a step that produced a NaN, operation by operation: it needs the jitted function.
    debug = config.train.debug
    is_traced = debug or config.log.profile
    return Session(
        config=config,
        run=run,
        checkpoints=opened.checkpoints,
        compatibility=opened.compatibility,
        trend=opened.trend,
        start=opened.start,
        state=state,
        batches=opened.batches,
        shard_batch=first_calls.transfer(lambda batch: sharding.shard_batch(mesh, batch, part)),
        batch_part=part,
        programs={shape: first_calls.program(steps.train if debug else fitted.train)},
        compile_step=lambda state, batch: first_calls.program(
            steps.train if debug else steps.train.lower(state, batch).compile()
        ),
        open_loggers=functools.partial(make_loggers, config, run, opened.start),
        running_steps=functools.partial(traced_steps, config, run) if is_traced else plain_steps,
        check_row=functools.partial(_check_row, config),
        layers_row=layer_norms.record,
        validate=validate,
        score_name="val_loss" if config.train.objective == "dpo" else "val_bits_per_byte",
        rise_text=functools.partial(rise_text, config),
        generate_samples=sampling_function(config, run, opened.tokenizer, steps),
        score_tasks=TrainingTasks(opened.tasks, config, run, opened.tokenizer, steps.model).score,
        flops_per_token=flops.token_flops(config.model, vocab_size, config.train.sequence_length, config.lora).at,
        peak_flops=peak.flops,
    )


def _fit(opened: OpenRun) -> tuple[memory.FittedStep, TrainState, tuple[int, ...]]:
    """Return the compiled step, the state that it starts with, and the shape of its batches; save the microbatch."""
    config = opened.config
    run = opened.run
    mesh = opened.mesh
    vocab_size = opened.tokenizer.vocab_size
    parameters = flops.parameters(config.model, vocab_size)
    with _waiting_on_first(f"compiling a model of {parameters / 1e6:.2f} M parameters"):
        widest = sharding.shard_batch(mesh, opened.batches.empty_batch())
        # Other accumulation steps than before would round differently.
        accum_steps = agreement.from_first("microbatch of the run", lambda: run.read_config().train.grad_accum_steps)
        resident = sharding.bytes_per_device(opened.state)
        fitted = memory.compile_to_fit(config, vocab_size, mesh, widest, resident, accum_steps)
        state = opened.steps.init() if opened.state is None else opened.state
    logger.info(memory.describe(fitted, config))
    config = fitted.config
    _log_other_microbatches(opened.start, accum_steps, config.train.grad_accum_steps)
    if multihost.is_first():
        run.save_config(config)
    return fitted, state, widest["input_ids"].shape


def _check_row(config: Config, row: Row) -> Row:
    """Check the metrics of a step, see `Session`."""
    remedy = f"Start another --run with a lower --optimizer.lr (now {config.optimizer.lr})"
    advice = f"{remedy}; this one keeps its last checkpoint"
    return health.check(loss_scale.check(row, advice), config.health, advice)


def _log_other_microbatches(start: int, before: int, now: int) -> None:
    """Log that a resumed run has other microbatches than before."""
    if start and now != before:
        logger.info(
            "note: each step now has %d microbatches, before %d: its sums are rounded in another order, so the "
            "results are not bit-identical to those of a run without this interruption",
            now,
            before,
        )


def _log_other_precision(run: Run, start: int, now: str) -> None:
    """Log that a resumed run computes with other dtypes than before: on other hardware, or by another version."""
    calls = environment.read_calls(run) if start else []
    before = calls[-1].get("precision", now) if calls else now
    if _dtypes(before) != _dtypes(now):
        logger.info("note: this run now computes with %s, before with %s", _dtypes(now), _dtypes(before))


def _dtypes(precision: str) -> str:
    """Return a description of the precision without its reason: `bfloat16 products and activations`."""
    return precision.partition(" (")[0]


def _waiting_on_first(text: str) -> contextlib.AbstractContextManager[None]:
    """Show that the first process is busy."""
    return waiting(text) if multihost.is_first() else contextlib.nullcontext()


def make_validation(config: Config, opened: OpenRun, steps: Steps) -> Callable[[Any], Row]:
    """Return a function from parameters to their scores on the held-out text, or pairs."""
    mesh = opened.mesh
    if isinstance(opened.batches, PairBatches):
        set_reference(opened.batches, config, opened.run, opened.tokenizer.vocab_size, mesh)
        return pair_validation(config, opened.batches, opened.corpus, steps, mesh)
    held_out = opened.corpus.held_out(config.eval.max_tokens)

    def validate(params: Any) -> Row:
        scores = validation.scores(
            config, held_out, lambda batch: steps.evaluate(params, sharding.shard_batch(mesh, batch))
        )
        return {f"val_{name}": value for name, value in scores.items() if name != "count"}

    return validate


def _log_devices(config: Config, mesh: jax.sharding.Mesh) -> None:
    model = config.model
    platform = Platform.of_mesh(mesh)
    dtype = compute_dtype(config.train.dtype, platform)
    width = model.head_width
    attention = ops.describe_attention(model.attention, dtype, config.train.sequence_length, width, platform)
    precision = describe_precision(config, platform)
    logger.info("%s, %s, %s", sharding.describe(mesh), precision, attention)


def log_start(opened: OpenRun) -> None:
    """Log where training starts, and what may be unexpected about it."""
    start = opened.start
    if opened.finished:
        if start < opened.config.train.steps:
            logger.info("this run was stopped early: %d steps are done. To train further: --train.stop_early 0", start)
        elif curriculum_of(opened.run):  # the curriculum decides how long its stages are
            logger.info("this stage is finished: %d steps are done", start)
        else:
            logger.info("this run is finished: %d steps are done. To train further: --train.steps %d", start, 2 * start)
        return
    if start:
        logger.info("continuing after step %d", start)
    for line in opened.batches.summary(opened.config.train.steps, total=False):
        logger.info(line)
    parameters = flops.parameters(opened.config.model, opened.tokenizer.vocab_size)
    text_tokens, steps_per_epoch = len(opened.corpus.train), opened.batches.steps_per_epoch
    logger.info(expectation(opened.config, text_tokens, steps_per_epoch, parameters, start))
    if multihost.is_first():  # they are the same in all processes
        for line in opened.batches.warnings(opened.config.train.steps):
            logger.warning(line)
    for line in _notices(opened.config, start, opened.rows):
        logger.info("note: %s", line)


def _notices(config: Config, start: int, rows: list[Row]) -> Iterator[str]:
    """Yield what is unusual about a run that starts or resumes."""
    if not start and rows:
        yield f"there is no checkpoint: starting again; {plural(len(rows), 'step')} in metrics.jsonl will be repeated"
    elif start and [row["step"] for row in rows[:start]] != list(range(1, start + 1)):
        yield f"metrics.jsonl does not hold every step up to {start}: rows were lost"
    steps = config.train.steps
    warmup = config.optimizer.warmup_steps
    if steps <= warmup:
        yield f"warm-up takes {warmup} steps of {steps}; the learning rate does not reach its peak"
    if warmup < start <= len(rows):  # looking up a rate compiles several small programs
        previous = rows[start - 1]["lr"]
        rate = float(make_schedule(config.optimizer, steps)(start))
        if rate > 1.5 * previous:
            yield f"with {steps} steps the learning rate rises again, from {previous:.2e} to {rate:.2e}"
