"""Whether a run can be trusted, before it is trained and after: `python -m slm_jax.check`, or `check(...)`.

    from slm_jax.check import check
    failed = [each for each in check(run="runs/NAME") if each.verdict == "FAIL"]

Before training, of a config or of a run without a checkpoint, all that a run will use is made as the run makes it
(tokenizer, corpus, a batch, the compiled step, untrained weights) and looked at. Of a trained run its newest weights
are, with what training wrote. What is checked, and how it can fail: slm_jax/checks/.
"""

import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.checks.finding import FAIL, Finding, finding, skipped
from slm_jax.config.schema import Config
from slm_jax.run.directory import Run, find_run
from slm_jax.utils.errors import UserError

DOCUMENTS = 2000  # of a source on the hub that are read, where no run holds them
Say = Callable[[str], None]
_CACHED = 32  # tokens of the text that goes through the cache


def check(
    run: str | Path | None = None,
    config: Config | None = None,
    worst: int = 3,
    documents: int = DOCUMENTS,
    say: Say = lambda _: None,
) -> list[Finding]:
    """All findings on a run, or on a config that is yet to be run. Raises UserError if there is no such run.

    config: for a run, another one than its own. worst: held-out texts shown, those predicted worst. documents: of a
    source on the hub that are read where no run holds them (0: all, as training does). say: is told what is looked at.
    """
    place = None if run is None and config is not None else find_run(None if run is None else str(run))
    if config is None:
        assert place is not None
        config = place.read_config()
    return list(_findings(config, place, worst, documents, say))


class _Text(NamedTuple):
    """What a run reads."""

    tokenizer: Any  # HybridTokenizer
    corpus: Any  # Corpus
    batches: Any  # PackedBatches or PaddedBatches


def _attempt(name: str, look: Callable[[], Finding]) -> Finding:
    """What a look finds; one that cannot be carried out has failed."""
    try:
        return look()
    except UserError as error:
        return finding(name, False, str(error), "")
    except Exception as error:  # of a broken model or damaged file anything may come
        last = traceback.format_exception(error)[-2].strip().splitlines()[0]
        return finding(name, False, f"{type(error).__name__}: {error}".splitlines()[0][:200], "", [last])


def _findings(config: Config, run: Run | None, worst: int, documents: int, say: Say) -> Iterator[Finding]:
    from slm_jax.checks import data as texts

    with tempfile.TemporaryDirectory(prefix="slm_jax_check") as scratch:
        say("tokenizer and text")
        try:
            text = _read_text(config, run, documents, Path(scratch), say)
            batch = text.batches.at(0)
        except UserError as error:
            yield finding("text", False, str(error), "a tokenizer, a corpus and a batch")
            return
        corpus, tokenizer = text.corpus, text.tokenizer
        size = f"{len(corpus.train):,} tokens to train on, {len(corpus.validation):,} held out"
        yield finding("text", len(corpus.validation) > 0, size, "a tokenizer, a corpus, some of it held out")
        say("labels, ids and tokenizer")
        splits = (corpus.train, corpus.validation)
        samples = [*texts.SAMPLES, *texts.documents(corpus, tokenizer)]
        yield _attempt("labels", lambda: texts.next_token(batch, tokenizer.vocab_size))
        yield _attempt("ids in range", lambda: texts.ids_in_range(batch, splits, tokenizer.vocab_size))
        yield _attempt("tokenizer round trip", lambda: texts.lossless(tokenizer, samples))
        if run is not None and run.newest_step() is not None:
            yield from _trained(config, run, text, worst, say)
        else:
            yield from _untrained(config, text, say)


def _read_text(config: Config, run: Run | None, documents: int, scratch: Path, say: Say) -> _Text:
    """The run's own text; or that of the config, made as training makes it, in the cache that all runs share (of a
    source on the hub a part only, in a place that goes away)."""
    from slm_jax.data.batches.modes import make_batches
    from slm_jax.data.sources.hub import HubSource
    from slm_jax.data.sources.registry import make_sources
    from slm_jax.training.tokenizer import prepare_data

    place = run if run is not None and run.corpus.is_dir() else Run(scratch / "run")
    if place is not run:
        place.path.mkdir()
        if documents and any(isinstance(source, HubSource) for source, _ in make_sources(config.data)):
            part = {"max_documents": documents, "cache": str(scratch / "cache")}
            config = config.model_copy(update={"data": config.data.model_copy(update=part)})
    tokenizer, corpus = prepare_data(config, place)
    return _Text(tokenizer, corpus, make_batches(config, corpus))


def _untrained(config: Config, text: _Text, say: Say) -> Iterator[Finding]:
    """The devices, the compiled step and untrained weights."""
    from slm_jax.checks import step, weights
    from slm_jax.distributed import sharding

    vocab_size = text.tokenizer.vocab_size
    found, mesh = step.devices(config)
    yield found
    if mesh is None:
        return
    say("compiling the training step")
    widest = text.batches.empty_batch()
    found, fitted = step.memory_fit(config, vocab_size, mesh, sharding.shard_batch(mesh, widest))
    yield found
    if fitted is None:
        yield skipped("model", "its step does not fit on these devices")
        return
    state = fitted.steps.init()
    model = weights.on_one_device(fitted.steps.model, state.params)
    batch = text.batches.at(0)
    yield from _model(config, model, text, batch, True, say)
    say("one training step")
    yield _attempt("one step", lambda: step.one_step(fitted, state, mesh, step.filled(widest, batch)))


def _trained(config: Config, run: Run, text: _Text, worst: int, say: Say) -> Iterator[Finding]:
    """The newest checkpoint and what training wrote."""
    from slm_jax.checks import trained, weights
    from slm_jax.run.load import load_run
    from slm_jax.run.metrics import read_metrics

    newest = run.newest_step()
    say(f"checkpoint of step {newest}")
    try:
        loaded = load_run(str(run.path))
    except UserError as error:
        yield finding("checkpoint", False, str(error), "the newest one can be read")
        return
    model, step, tokenizer = loaded.model, loaded.step, text.tokenizer
    yield finding("checkpoint", step == newest, f"step {step}, the newest is of {newest}", "the newest one can be read")
    rows: list[dict[str, Any]] = []
    try:
        rows = read_metrics(run.metrics)
        yield _attempt("metrics", lambda: trained.metrics_rows(rows, step))
    except UserError as error:
        yield finding("metrics", False, str(error), "a row for each step")
    finite = weights.finite_weights(model)
    yield finite
    yield from _model(config, model, text, text.batches.at(step), False, say)
    if finite.verdict == FAIL:
        yield skipped("held-out loss", "the weights are not finite")
        return
    say("loss of the held-out text")
    held_out = text.corpus.validation.head(config.eval.max_tokens)
    losses = trained.row_losses(model, config, held_out)
    loss = trained.held_out_loss(losses)
    unigram = trained.unigram_loss(text.corpus.train, losses, tokenizer.vocab_size)
    yield trained.below_baselines(loss, unigram, tokenizer.vocab_size)
    yield _attempt("validation repeats", lambda: trained.reproduces(loss, rows, step, model.dtype.name))
    yield _attempt("loss of each sample", lambda: trained.per_sample(losses, tokenizer, worst))
    say("text with and without a cache")
    length = min(config.train.sequence_length, _CACHED)
    ids = [tokenizer.token2id["<EOS>"], *text.corpus.validation[: length - 1].tolist()]
    yield _attempt("cached logits", lambda: trained.cached_logits(model, ids, loaded.context))
    prompt, drawn = ids[: length // 2], length - length // 2
    yield _attempt("greedy text", lambda: trained.greedy_text(model, tokenizer, prompt, loaded.context, drawn))


def _model(config: Config, model: Any, text: _Text, batch: Any, fresh: bool, say: Say) -> Iterator[Finding]:
    """What must hold of a model whether trained or not."""
    from slm_jax.checks import masking, weights
    from slm_jax.checks.data import vocabulary

    length, few = config.train.sequence_length, weights.few_rows(batch)
    yield _attempt("vocabulary", lambda: vocabulary(model, text.tokenizer))
    yield _attempt("shapes", lambda: weights.shapes(model, config.model, text.tokenizer.vocab_size, length))
    yield _attempt("tied weights", lambda: weights.tied(model, config.model.tie_weights))
    say("logits, gradients, what each position sees")
    outputs = weights.outputs(model, few)
    yield weights.finite_logits(outputs)
    if fresh:
        yield weights.initial_loss(outputs, model)
    looks = {
        "gradient flow": lambda: weights.gradient_flow(model, few),
        "causality": lambda: masking.causality(model, length, fresh),
        "attention window": lambda: masking.attention_window(model, length, fresh),
        "padding": lambda: masking.padding(model, length, fresh),
        "segments": lambda: masking.segments(model, length, fresh),
    }
    with ThreadPoolExecutor(2) as pool:  # most of the time goes by compiling
        yield from pool.map(_attempt, looks.keys(), looks.values())
