"""Checks of a run or a config: `python -m slm_jax.check`, or `check(...)`.

    from slm_jax.checks.run import check
    failed = [each for each in check(run="runs/NAME") if each.verdict == "FAIL"]

Before training (a config, or a run without a checkpoint) everything that a run uses is made as the run makes it:
tokenizer, corpus, a batch, the compiled step, untrained weights. Of a trained run the weights of one checkpoint are
checked, and the files that training wrote.
"""

import logging
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.checks.finding import DOCUMENTS, FAIL, Finding, finding, skipped
from slm_jax.config.schema import Config, LoraConfig, TrainConfig
from slm_jax.run.directory import Run, find_run
from slm_jax.run.selection import Step
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

_CACHED = 32  # tokens of the text that is fed through the cache


def check(
    run: str | Path | None = None,
    config: Config | None = None,
    worst: int = 3,
    documents: int = DOCUMENTS,
    step: Step = None,
) -> list[Finding]:
    """Check a run, or a config that has not been run yet.

    Args:
        run: Run directory; None without a config: the newest run.
        config: A config without a run, or another config for the run.
        worst: Held-out texts that are shown, those with the highest loss.
        documents: Documents of a hub source that are read if no run has them; 0: all, as in training.
        step: The checkpoint of the run, see `load_run`.

    Returns:
        One finding per check.

    Raises:
        UserError: There is no such run.
    """
    folder = None if run is None and config is not None else find_run(None if run is None else str(run))
    if config is None:
        assert folder is not None
        config = folder.read_config()
    from slm_jax.data.sources.unused_options import log_unused_options

    log_unused_options(config)
    return list(_findings(config, folder, worst, documents, step))


class _Text(NamedTuple):
    """Input of a run."""

    tokenizer: Any  # TextTokenizer
    corpus: Any  # Corpus
    batches: Any  # PackedBatches or PaddedBatches


def _attempt(name: str, run_check: Callable[[], Finding]) -> Finding:
    """Return the finding of a check; one that raises has failed."""
    try:
        return run_check()
    except UserError as error:
        return finding(name, False, str(error), "")
    except Exception as error:  # a broken model or damaged file may raise anything
        last = traceback.format_exception(error)[-2].strip().splitlines()[0]
        return finding(name, False, f"{type(error).__name__}: {error}".splitlines()[0][:200], "", [last])


def _findings(config: Config, run: Run | None, worst: int, documents: int, step: Step) -> Iterator[Finding]:
    from slm_jax.checks import data as texts

    trained_as = config
    if config.train.objective == "dpo":  # its corpus holds the chosen conversations, which a language model predicts
        next_token = {"objective": "next-token", "dpo_beta": TrainConfig().dpo_beta}
        config = config.model_copy(update={"train": config.train.model_copy(update=next_token)})
    with tempfile.TemporaryDirectory(prefix="slm_jax_check") as scratch:
        logger.info("tokenizer and text")
        try:
            text = _read_text(config, run, documents, Path(scratch))
            batch = text.batches.at(0)
        except UserError as error:
            yield finding("text", False, str(error), "a tokenizer, a corpus and a batch")
            return
        corpus = text.corpus
        tokenizer = text.tokenizer
        size = f"{len(corpus.train):,} tokens to train on, {len(corpus.validation):,} held out"
        yield finding("text", len(corpus.validation) > 0, size, "a tokenizer, a corpus, some of it held out")
        logger.info("labels, ids and tokenizer")
        splits = (corpus.train, corpus.validation)
        samples = [*texts.SAMPLES, *texts.sample_documents(corpus, tokenizer)]
        yield _attempt("labels", lambda: texts.next_token(batch, tokenizer.vocab_size))
        yield _attempt("ids in range", lambda: texts.ids_in_range(batch, splits, tokenizer.vocab_size))
        yield _attempt("tokenizer round trip", lambda: texts.lossless(tokenizer, samples))
        if run is not None and run.newest_step() is not None:
            yield from _trained(config, run, text, worst, step)
        else:
            if trained_as.train.objective == "dpo":
                yield _attempt("preference pairs", lambda: _pairs(trained_as, text))
            yield from _untrained(config, text, trained_as)


def _read_text(config: Config, run: Run | None, documents: int, scratch: Path) -> _Text:
    """Return the text of the run; without one that of the config, prepared in the shared cache as in training (a hub
    source only in part, in a temporary folder)."""
    from slm_jax.data.batches.modes import make_batches
    from slm_jax.data.sources.hub import HubSource
    from slm_jax.data.sources.registry import make_sources
    from slm_jax.training.tokenizer import prepare_data

    folder = run if run is not None and run.corpus.is_dir() else Run(scratch / "run")
    if folder is not run:
        folder.path.mkdir()
        if documents and any(isinstance(source, HubSource) for source, _ in make_sources(config.data)):
            part = {"max_documents": documents, "cache": str(scratch / "cache")}
            config = config.model_copy(update={"data": config.data.model_copy(update=part)})
    tokenizer, corpus = prepare_data(config, folder)
    return _Text(tokenizer, corpus, make_batches(config, corpus))


def _pairs(config: Config, text: _Text) -> Finding:
    """Check that the source has preference pairs."""
    from slm_jax.data.pairs import has_pairs

    found = has_pairs(config, text.tokenizer)
    return finding("preference pairs", found, "found" if found else "none", "rows with columns chosen and rejected")


def _untrained(config: Config, text: _Text, trained_as: Config) -> Iterator[Finding]:
    """Check the devices, the compiled step and untrained weights.

    Args:
        config: The config of a next-token model.
        text: Its input.
        trained_as: The config of the run, which differs with DPO.
    """
    from slm_jax.checks import step, weights
    from slm_jax.data.batches.modes import empty_batch
    from slm_jax.distributed import sharding
    from slm_jax.training.steps import make_steps

    vocab_size = text.tokenizer.vocab_size
    found, mesh = step.devices(config)
    yield found
    if mesh is None:
        return
    logger.info("compiling the training step")
    widest = empty_batch(trained_as)
    found, fitted = step.memory_fit(trained_as, vocab_size, mesh, sharding.shard_batch(mesh, widest))
    yield found
    if fitted is None:
        yield skipped("model", "the step does not fit on these devices")
        return
    state = fitted.steps.init()
    # Adapters are 0 at first: the model without them computes the same, and all of its weights have gradients.
    plain = config.model_copy(update={"lora": LoraConfig()}) if config.lora.rank else config
    steps = fitted.steps if plain is config else make_steps(plain, vocab_size, mesh)
    model = weights.copy_to_one_device(steps.model, (state if plain is config else steps.init()).params)
    batch = text.batches.at(0)
    yield from _model(config, model, text, batch, True)
    logger.info("one training step")
    if trained_as.train.objective == "dpo":
        yield skipped("one step", "a step of pairs compares with the initial weights of the run")
        return
    yield _attempt("one step", lambda: step.one_step(fitted, state, mesh, step.filled(widest, batch)))


def _trained(config: Config, run: Run, text: _Text, worst: int, choice: Step) -> Iterator[Finding]:
    """Check the checkpoints, the chosen one in detail, and the files that training wrote."""
    from slm_jax.checks import trained, weights
    from slm_jax.run.load import load_run
    from slm_jax.run.metrics import read_metrics

    logger.info("checkpoints")
    yield _attempt("checkpoint", lambda: trained.complete_checkpoints(run))
    try:
        loaded = load_run(str(run.path), step=choice)
    except UserError as error:
        yield finding("weights", False, str(error), "a checkpoint that can be read")
        return
    logger.info("weights of %s", loaded.step_text)
    model = loaded.model
    step = loaded.step
    is_dpo = loaded.config.train.objective == "dpo"
    tokenizer = text.tokenizer
    rows: list[dict[str, Any]] = []
    try:
        rows = read_metrics(run.metrics)
        newest = run.newest_step() or step
        yield _attempt("metrics", lambda: trained.metrics_rows(rows, newest))
        if not is_dpo:
            yield _attempt("overfitting", lambda: trained.overfitting(rows, newest, loaded.step_text, config))
    except UserError as error:
        yield finding("metrics", False, str(error), "a row for each step")
    finite = weights.finite_weights(model)
    yield finite
    yield from _model(config, model, text, text.batches.at(step), False)
    if finite.verdict == FAIL:
        yield skipped("held-out loss", "the weights are not finite")
        return
    logger.info("loss of the held-out text")
    held_out = text.corpus.held_out(config.eval.max_tokens)
    losses = trained.row_losses(model, config, [part.stream for part in held_out])
    loss = trained.held_out_loss(losses)
    unigram = trained.unigram_loss(text.corpus.train, losses, tokenizer.vocab_size)
    yield trained.below_baselines(loss, unigram, tokenizer.vocab_size)
    if is_dpo:
        yield skipped("validation repeats", "the validations of this run are of preference pairs")
    else:
        yield _attempt("validation repeats", lambda: trained.matches_log(loss, rows, step, model.dtype.name))
    yield _attempt("loss of each sample", lambda: trained.per_sample(losses, tokenizer, worst))
    logger.info("generation with and without a cache")
    length = min(config.train.sequence_length, _CACHED)
    ids = [tokenizer.eos_id, *text.corpus.validation[: length - 1].tolist()]
    yield _attempt("cached logits", lambda: trained.cached_logits(model, ids, loaded.context))
    prompt = ids[: length // 2]
    drawn = length - length // 2
    yield _attempt("greedy text", lambda: trained.greedy_text(model, tokenizer, prompt, loaded.context, drawn))


def _model(config: Config, model: Any, text: _Text, batch: Any, fresh: bool) -> Iterator[Finding]:
    """Check what holds for trained and untrained models."""
    from slm_jax.checks import masking, weights
    from slm_jax.checks.data import vocabulary

    length = config.train.sequence_length
    few = weights.few_rows(batch)
    yield _attempt("vocabulary", lambda: vocabulary(model, text.tokenizer))
    yield _attempt("shapes", lambda: weights.shapes(model, config.model, text.tokenizer.vocab_size, length))
    yield _attempt("tied weights", lambda: weights.tied(model, config.model.tie_weights))
    logger.info("logits, gradients, visible positions")
    outputs = weights.outputs(model, few)
    yield weights.finite_logits(outputs)
    if fresh:
        yield weights.initial_loss(outputs, model)
        model = weights.without_zeros(model)
    checks = {
        "gradient flow": lambda: weights.gradient_flow(model, few),
        "causality": lambda: masking.causality(model, length, fresh),
        "attention window": lambda: masking.attention_window(model, length, fresh),
        "padding": lambda: masking.padding(model, length, fresh),
        "segments": lambda: masking.segments(model, length, fresh),
    }
    with ThreadPoolExecutor(2) as pool:  # compiling takes most of the time
        yield from pool.map(_attempt, checks.keys(), checks.values())
