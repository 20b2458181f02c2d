"""The training loop: step, measure, validate, write samples, save."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from slm_jax.config.schema import Config
from slm_jax.data.batches.arrays import Arrays
from slm_jax.data.batches.modes import make_batches
from slm_jax.data.batches.prefetch import Prefetcher
from slm_jax.data.corpus.corpus import Corpus
from slm_jax.distributed import multihost, sharding
from slm_jax.generation.decode import Sampling, generate
from slm_jax.model import ops
from slm_jax.performance import flops
from slm_jax.performance.roofline import mfu_baseline
from slm_jax.report.page import write_report_after_training
from slm_jax.report.training_plot import plot_training
from slm_jax.run import environment
from slm_jax.run.checkpoint import Checkpoints
from slm_jax.run.directory import Result, Run, curriculum_of
from slm_jax.run.metrics import MetricsWriter, Row, progress_text, read_metrics, scores_text
from slm_jax.run.samples import append_samples, forget_samples_after
from slm_jax.training import health, memory, validation, warm_start
from slm_jax.training.loggers import make_sinks
from slm_jax.training.profiler import Profiler
from slm_jax.training.schedule import make_schedule
from slm_jax.training.signals import Stop
from slm_jax.training.tokenizer import prepare_data
from slm_jax.training.train_step import Steps, TrainState, make_steps
from slm_jax.utils.batch import Batch
from slm_jax.utils.errors import UserError
from slm_jax.utils.process import DETERMINISTIC
from slm_jax.utils.progress import ProgressBar, show_log, waiting
from tokenizer import HybridTokenizer


def run_training(config: Config, run: Run) -> Result:
    """Train or continue a run whose directory is begun and locked. Raises UserError."""
    show_log()
    if config.train.deterministic and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        raise UserError(
            f"train.deterministic: set the environment variable XLA_FLAGS={DETERMINISTIC}=true before JAX starts"
        )
    mesh = sharding.make_mesh(config)
    origin = warm_start.find_origin(config) if run.newest_step() is None else None
    tokenizer, corpus = multihost.first_process_first(lambda: prepare_data(config, run))
    batches = make_batches(config, corpus)
    steps = make_steps(config, tokenizer.vocab_size, mesh)
    model, dtype = config.model, ops.compute_dtype(config.train.dtype)
    attention = ops.describe_attention(model.attention, dtype, config.train.sequence_length, model.dim // model.heads)
    _say(f"{sharding.describe(mesh)}, {ops.describe_precision(config.train.dtype)}, {attention}")

    with Checkpoints(run.checkpoints, config.checkpoint) as checkpoints:
        basis = _basis(config, corpus, tokenizer)
        state, start = _restore(checkpoints, steps, mesh, config, basis)
        if state is None and origin is not None:
            state = warm_start.first_state(config, origin, steps, tokenizer.vocab_size, mesh)
            checkpoints.save(0, _saved(state), basis)
            checkpoints.wait()  # the other run may go now
            _say(f"beginning with the weights of {origin.path}")
        rows = read_metrics(run.metrics)
        first, part = multihost.is_first(), sharding.batch_shard(mesh)
        if start > config.train.steps:
            raise UserError(f"{start} steps of {run.path} are done, more than --train.steps {config.train.steps}")
        if start == config.train.steps:
            if curriculum_of(run):  # which decides how long its stages are
                _say(f"this stage is finished: {start} steps are done")
            else:
                _say(f"this run is finished: {start} steps are done. To go on: --train.steps {2 * start}")
            _plot(run)
            return Result(run.path, start, (rows or [{}])[-1])
        if start:
            _say(f"continuing after step {start}")
        for notice in (*batches.summary(config.train.steps), *_notices(config, start, rows)):
            _say(notice)
        count = flops.parameters(model, tokenizer.vocab_size)
        with waiting(f"compiling a model of {count / 1e6:.2f} M parameters"):
            resident = sharding.bytes_per_device(state)
            blank = sharding.shard_batch(mesh, batches.empty_batch())
            before = (
                run.read_config().train.grad_accum_steps
            )  # of a run that goes on: other parts would round otherwise
            fitted = memory.compile_to_fit(config, tokenizer.vocab_size, mesh, blank, resident, before)
            state = steps.init() if state is None else state
        _say(memory.describe(fitted, config))
        config, steps = fitted.config, fitted.steps
        if first:
            run.save_config(config)  # with the microbatch that was found
        with (
            MetricsWriter(run.metrics, start, first, make_sinks(config, run, start) if first else ()) as metrics,
            Stop() as stop,
            Profiler(config.log.profile, run.profile, _say) as profiler,
            jax.debug_nans(True) if config.train.debug else contextlib.nullcontext(),
            Loop(config, run, mesh, tokenizer, corpus, steps, metrics, done=start) as loop,
            Prefetcher(
                batches, lambda b: sharding.shard_batch(mesh, b, part), start, config.train.steps, part
            ) as prefetcher,
        ):
            if first:
                forget_samples_after(run.samples, start)
            train = _for_any_width(fitted, blank, loop.pause)
            step = saved = start
            while step < config.train.steps and not stop(step):
                batch, num_bytes = prefetcher.next()
                step += 1
                state, measured = profiler.take(step, train, state, batch)
                loop.measured(step, measured, num_bytes)
                last = step == config.train.steps
                if last or step % config.eval.every == 0:
                    loop.validate(state, step)
                if checkpoints.due(step, loop.score) or last:
                    score = loop.score
                    loop.flush()  # the rows that a checkpoint stands for are on disk before it is
                    metrics.flush()
                    checkpoints.save(step, _saved(state), basis, score)
                    saved = step
            loop.flush()
            loop.waited(prefetcher.wait_seconds)
            if saved != step:  # stopped by a signal
                checkpoints.save(step, _saved(state), basis)
            checkpoints.wait()  # while a first signal still leaves it its time
    _plot(run)
    return Result(run.path, step, loop.last_row, stop.signal if step < config.train.steps else None, stop.signal)


def _for_any_width(fitted: memory.FittedStep, widest: Batch, pause: Callable[[str], Any]) -> Callable[..., Any]:
    """The training step for batches like the widest, for which it is compiled, and for narrower ones (padded batches
    come in a few widths), for which it is compiled when the first one comes."""
    programs = {widest["input_ids"].shape: fitted.train}

    def train(state: TrainState, batch: Batch) -> Any:
        if fitted.config.train.debug:  # jax_debug_nans looks into jit only
            return fitted.steps.train(state, batch)
        shape = batch["input_ids"].shape
        if shape not in programs:
            with pause(f"compiling for rows of {shape[1]} tokens"):
                programs[shape] = fitted.steps.train.lower(state, batch).compile()
        return programs[shape](state, batch)

    return train


class Loop:
    """What happens around the steps: rows, progress, validation, samples."""

    def __init__(
        self,
        config: Config,
        run: Run,
        mesh: jax.sharding.Mesh,
        tokenizer: HybridTokenizer,
        corpus: Corpus,
        steps: Steps,
        metrics: MetricsWriter,
        done: int,
    ):
        self._config, self._run, self._mesh, self._tokenizer, self._steps = config, run, mesh, tokenizer, steps
        self._validation = corpus.validation.head(config.eval.max_tokens)
        self._metrics = metrics
        self._layers = MetricsWriter(run.layers, done, multihost.is_first()) if config.log.layers else None
        self.last_row = metrics.last
        quiet = None if multihost.is_first() else open(os.devnull, "w")  # noqa: SIM115, PTH123
        self._progress = ProgressBar(config.train.steps, done, config.log.every, quiet)
        self._pending: tuple[int, dict[str, Any], Row] | None = None
        self._clock = time.perf_counter()
        self._spent = self._before = metrics.seconds
        self._step_seconds, self._timed = 0.0, 0
        per_token = flops.train_flops_per_token(config.model, tokenizer.vocab_size, config.train.sequence_length)
        roof = mfu_baseline(config, tokenizer.vocab_size, mesh)
        self._mfu_per_rate = per_token / roof.flops
        _say(f"MFU (share of this device's top speed) is of {roof.text}")
        environment.record(run, done, mesh, precision=ops.describe_precision(config.train.dtype), mfu_of=roof.text)

    def __enter__(self) -> "Loop":
        self._clock = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.close()
        if self._layers is not None:
            self._layers.close()

    @property
    def score(self) -> float | None:
        """Validation bits per byte of the newest step, if it was measured."""
        return None if self._pending is None else self._pending[2].get("val_bits_per_byte")

    def measured(self, step: int, metrics: dict[str, Any], num_bytes: int) -> None:
        """Take a step's metrics, still on the device, and the bytes of text that it predicted; what is read now are
        those of the step before."""
        self.flush()
        self._pending = (step, metrics, {"bytes": num_bytes})

    @contextlib.contextmanager
    def pause(self, text: str) -> Iterator[None]:
        """Say what is done between two steps; its time is no part of theirs."""
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])
        _say(text)
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def waited(self, seconds: float) -> None:
        """Tell of time that the steps of this call spent waiting for data, if it was much."""
        if (share := seconds / max(self._spent - self._before, 1e-9)) > 0.01:
            _say(f"note: {share:.0%} of the time was spent waiting for data")

    def flush(self) -> None:
        """Read the metrics in hand, write and show their row."""
        if self._pending is None:
            return
        step, metrics, more = self._pending
        self._pending = None
        layers = metrics.pop("layers", None)
        row: Row = {"step": step} | {name: float(value) for name, value in metrics.items()}
        row |= {name: int(row[name]) for name in ("tokens", "input_tokens")} | more
        lr = self._config.optimizer.lr
        advice = f"Begin another --run with a lower --optimizer.lr (here {lr}); this one keeps its last checkpoint"
        row = health.check(row, self._config.health, advice)  # before a checkpoint is made of it
        if self._layers is not None and step % self._config.log.layers == 0:
            self._layers.write(health.layer_norms_record(step, layers))
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        self._spent += elapsed
        self._timed += 1
        # A running mean: of all steps at first, of about ten later, never of the first one, which is slow.
        weight = max(0.1, 1 / max(self._timed - 1, 1))
        self._step_seconds += weight * (elapsed - self._step_seconds)
        rate = row["input_tokens"] / self._step_seconds  # also those that are not predicted cost their FLOPs
        row |= {
            "seconds": self._spent,
            "tokens_per_second": rate,
            "mfu": rate * self._mfu_per_rate,
            "eta_seconds": (self._config.train.steps - step) * self._step_seconds,
            "time": time.time(),
        }
        self._metrics.write(row)
        self._progress.show(row["step"], progress_text(row))
        self.last_row = row

    def validate(self, state: TrainState, step: int) -> None:
        """Measure the held-out text and write sample texts; the numbers join the step's row."""
        assert self._pending is not None
        jax.block_until_ready(self._pending[1])
        step_end = time.perf_counter()
        scores = self._score(state.params)
        self._pending[2].update(scores)
        self._write_samples(state.params, step)
        spent = time.perf_counter() - step_end
        self._spent += spent
        self._clock += spent  # what validation takes is no part of a step's time
        _say(f"step {step}: validation {scores_text(scores)}")

    def _score(self, params: Any) -> Row:
        def sums(batch: Arrays) -> Any:
            return self._steps.evaluate(params, sharding.shard_batch(self._mesh, batch))

        found = validation.scores(self._config, self._validation, sums)
        return {f"val_{name}": value for name, value in found.items() if name != "count"}

    def _write_samples(self, params: Any, step: int) -> None:
        config = self._config
        if not (config.eval.sample_tokens and config.eval.prompts):
            return
        params = sharding.gather_to_one_device(self._mesh, params)
        if not multihost.is_first():
            return
        # A fixed seed: what changes between the samples of two steps is the model.
        texts = generate(
            self._steps.model(params),
            self._tokenizer,
            config.eval.prompts,
            config.eval.sample_tokens,
            Sampling(seed=config.train.seed),
            config.train.sequence_length,
        )
        whole = [prompt + text for prompt, text in zip(config.eval.prompts, texts, strict=True)]
        append_samples(self._run.samples, step, whole)


def _plot(run: Run) -> None:
    """Draw the curves and write the report, unless it is done already."""
    if (
        multihost.is_first()
        and run.metrics.is_file()
        and (not run.plot.is_file() or run.plot.stat().st_mtime_ns < run.metrics.stat().st_mtime_ns)
    ):
        plot_training(read_metrics(run.metrics), run.plot, run.path.name)
        write_report_after_training(run)


def _notices(config: Config, start: int, rows: list[Row]) -> Iterator[str]:
    """What happens that one may not expect."""
    if not start and rows:
        yield f"note: there is no checkpoint: beginning again; the {len(rows)} steps in metrics.jsonl are repeated"
    elif start and [row["step"] for row in rows[:start]] != list(range(1, start + 1)):
        yield f"note: metrics.jsonl does not hold every step up to {start}: rows were lost"
    steps, warmup = config.train.steps, config.optimizer.warmup_steps
    if steps <= warmup:
        yield f"note: warm-up takes {warmup} steps of {steps}; the learning rate does not reach its peak"
    rate = float(make_schedule(config.optimizer, steps)(start))
    before = rows[start - 1]["lr"] if 0 < start <= len(rows) else rate
    if start > warmup and rate > 1.5 * before:
        yield f"note: with {steps} steps the learning rate goes up again, from {before:.2e} to {rate:.2e}"


def _say(text: str) -> None:
    if not multihost.is_first():
        return
    print(text, file=sys.stderr, flush=True)


def _basis(config: Config, corpus: Corpus, tokenizer: HybridTokenizer) -> dict[str, Any]:
    """What the states of a run depend on; kept in each checkpoint and checked on resume."""
    return {
        "seed": config.train.seed,
        "corpus": corpus.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "health": health.is_enabled(config.health),  # whether the state has a part for it
        "config": json.loads(json.dumps(config.flat())),
    }


def _check_basis(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint is of another tokenizer, text or config. (Versions before kept less of it.)"""
    for name, thing in (("tokenizer", "tokenizer"), ("corpus", "text"), ("seed", "seed")):
        if name in there and there[name] != here[name]:
            raise UserError(
                f"the checkpoint of step {there['step']} is of another {thing}: {there[name]} there, {here[name]} here."
                " Bring back what the run began with, or begin another --run"
            )
    bound = ("model.", "optimizer.", "train.", "data.mode")
    resumable = Config.fields_with("resumable")
    for name, value in there.get("config", {}).items():
        if name.startswith(bound) and name not in resumable and value != here["config"].get(name, value):
            raise UserError(
                f"the checkpoint of step {there['step']} is of another config: {name} is {value!r} there, "
                f"{here['config'][name]!r} here. Give the same value, or begin another --run"
            )


def _saved(state: TrainState) -> dict[str, Any]:
    """The state as a checkpoint holds it: without `health` where there is none."""
    return {name: value for name, value in state._asdict().items() if name != "health" or value}


def _restore(
    checkpoints: Checkpoints, steps: Steps, mesh: jax.sharding.Mesh, config: Config, basis: dict[str, Any]
) -> tuple[TrainState | None, int]:
    """The newest checkpoint's state and step, or None and 0."""

    def target(position: dict[str, Any]) -> Any:
        _check_basis(position, basis)
        watch = jax.eval_shape(health.init) if position.get("health") else ()
        shapes = _saved(jax.eval_shape(steps.init)._replace(health=watch))
        return sharding.abstract_arrays(mesh, shapes, steps.partitions)

    found = checkpoints.restore_newest(target, warn=_say)
    if found is None:
        return None, 0
    state, position = TrainState(**found[0]), found[1]
    if basis["health"] != bool(state.health):  # its policy has changed
        watch = jax.device_put(health.init(), sharding.replicated(mesh)) if basis["health"] else ()
        state = state._replace(health=watch)
    return state, position["step"]
