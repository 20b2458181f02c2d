"""Whether a run can be trusted, before it is trained and after: `python -m slm_jax.check`, or `check(...)`.

    from slm_jax.check import check
    failed = [each for each in check(run="runs/NAME") if each.verdict == "FAIL"]

Before training, of a config or of a run without a checkpoint, all that a run will use is made as the run makes it
(tokenizer, corpus, a batch, the compiled step, untrained weights) and looked at. Of a trained run its newest weights
are, with what training wrote. What is checked, and how it can fail: slm_jax/checks/.
"""

import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax import cli
from slm_jax.callable_module import make_callable
from slm_jax.checks.finding import FAIL, Finding, as_json, as_table, count, finding, skipped
from slm_jax.config import Config
from slm_jax.errors import UserError, command_line
from slm_jax.presets import read_toml
from slm_jax.run import Run, find_run

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
    batches: Any  # Batches or PaddedBatches


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
    from slm_jax.checks import text as texts

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
    from slm_jax.data.feed import make_batches
    from slm_jax.data.hub import HubSource
    from slm_jax.data.prepare import prepare
    from slm_jax.data.sources import make_sources

    place = run if run is not None and run.corpus.is_dir() else Run(scratch / "run")
    if place is not run:
        place.path.mkdir()
        if documents and any(isinstance(source, HubSource) for source, _ in make_sources(config.data)):
            part = {"max_documents": documents, "cache": str(scratch / "cache")}
            config = config.model_copy(update={"data": config.data.model_copy(update=part)})
    tokenizer, corpus = prepare(config, place, say)
    return _Text(tokenizer, corpus, make_batches(config, corpus))


def _untrained(config: Config, text: _Text, say: Say) -> Iterator[Finding]:
    """The devices, the compiled step and untrained weights."""
    from slm_jax import sharding
    from slm_jax.checks import step, weights

    vocab_size = text.tokenizer.vocab_size
    found, mesh = step.devices(config)
    yield found
    if mesh is None:
        return
    say("compiling the training step")
    widest = text.batches.blank()
    found, fitted = step.memory_fit(config, vocab_size, mesh, sharding.put_batch(mesh, widest))
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
    from slm_jax.load import load_run
    from slm_jax.metrics import read_rows

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
        rows = read_rows(run.metrics)
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
    from slm_jax.checks import sight, weights
    from slm_jax.checks.text import vocabulary

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
        "causality": lambda: sight.causality(model, length, fresh),
        "attention window": lambda: sight.attention_window(model, length, fresh),
        "padding": lambda: sight.padding(model, length, fresh),
        "segments": lambda: sight.segments(model, length, fresh),
    }
    with ThreadPoolExecutor(2) as pool:  # most of the time goes by compiling
        yield from pool.map(_attempt, looks.keys(), looks.values())


HELP = """Check a run, or a config before it is run: shapes, labels, masks, gradients, memory, tokenizer; after
training the loss against baselines and against what was noted, generation, the texts that are predicted worst.

With neither --run nor an option: the newest run in runs/.

--run PATH           the run; of one with a checkpoint the trained weights are checked
--config NAME|PATH   a preset or a TOML file that is yet to be run; every option below overrides it
--format table|json  json: one object, {"ok": …, "checks": [{"name", "verdict", "found", "expected", "details"}]}
--worst N            held-out texts shown, those predicted worst (default 3)
--documents N        of a source on the hub that are read where no run holds them (default 2000; 0: all)

Exit status: 0 all is well, 1 a check failed, 2 a mistake in the command."""


def main(args: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. Raises UserError."""
    rest = list(sys.argv[1:] if args is None else args)
    path, rest = cli.take_option(rest, "run")
    form, rest = cli.take_option(rest, "format")
    if form not in (None, "table", "json"):
        raise UserError(f"--format {form}: should be table or json")
    numbers = []
    for name, default in (("worst", 3), ("documents", DOCUMENTS)):
        value, rest = cli.take_option(rest, name)
        if value is not None and not value.isdecimal():
            raise UserError(f"--{name} {value}: should be a whole number")
        numbers.append(default if value is None else int(value))
    wants_run = path is not None or not rest
    run = find_run(path) if wants_run else None
    base = read_toml(run.config) if run is not None else None
    config = cli.config_from_args(rest, "python -m slm_jax.check", HELP, base)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # texts on any terminal
    from slm_jax.process import tune_process

    tune_process()
    print(f"checking {run.path if run else 'the config'}", file=sys.stderr)
    found = check(run.path if run else None, config, worst=numbers[0], documents=numbers[1], say=_say)
    if form == "json":
        print(as_json({"run": str(run.path) if run else None}, found))
    else:
        print(as_table(found))
    return 1 if count(found, FAIL) else 0


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


make_callable(__name__)

if __name__ == "__main__":
    with command_line():
        raise SystemExit(main())
