"""Describe the sources of text, the prepared text in the cache, and one corpus: `python -m slm_jax.data`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from slm_jax.config.schema import Config
from slm_jax.data.ancestry import runs_of_weights
from slm_jax.data.batches.modes import make_batches
from slm_jax.data.corpus.corpus import FORMAT, Corpus, open_corpus, read_manifest
from slm_jax.data.mask_view import legend, masked_lines
from slm_jax.data.overlap import corpus_overlap, stored_overlap
from slm_jax.data.prepare import describe_corpus
from slm_jax.data.sources.catalog import CATALOG
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural, text_size
from slm_jax.utils.text_tokenizer import TextTokenizer

_SAMPLES = 3  # documents
_SAMPLE_CHARACTERS = 240
_SAMPLE_TOKENS = 160  # of an instruction or a conversation


def describe_sources(folder: Path) -> Iterator[str]:
    """Yield lines about the named sources and the corpora in the cache.

    Args:
        folder: The folder of the cache.
    """
    yield "Sources (--data.source):"
    yield f"  {'python-docs':12} the documentation bundled with this Python, 2.5 MB; no network"
    yield f"  {'python-qa':12} 4,700 questions about its modules, classes and functions, 0.5 MB; no network"
    yield f"  {'python-chat':12} 23,000 conversations about its most used names, 4 MB; no network"
    yield f"  {'files':12} your own text, with --data.files"
    for name, dataset in CATALOG.items():
        yield f"  {name:12} {dataset.description} (hf:{dataset.repo})"
    yield "  hf:OWNER/NAME[:CONFIG][:SPLIT]  any data set of the Hugging Face hub"
    yield f"\nPrepared, in {folder}:"
    manifests = sorted((folder / "corpora").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    for path in manifests:
        try:
            manifest = read_manifest(path.parent)
        except UserError as error:
            yield f"  {error}"
            continue
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        train = manifest["train"]
        yield (
            f"  {manifest['name']}: {plural(train['tokens'], 'token')} of {text_size(train['bytes'])} to train on, "
            f"{text_size(manifest['validation']['bytes'])} held out; {text_size(size)} in {path.parent.name}"
            f"{' (made by an earlier version, no longer used)' if manifest['format'] < FORMAT else ''}"
        )
    for path in sorted((folder / "corpora").glob("*.partial")):
        does = "begins it again" if path.name.endswith(".merge.partial") else "resumes it"
        yield f"  {path.name}: incomplete; the command that started it {does}"
    for path in sorted((folder / "corpora").glob("*.parts-*")):
        if path.is_dir():
            yield f"  {path.name}: parts of a corpus, not merged"
    if not manifests:
        yield "  nothing yet"


def inspect_corpus(
    folder: Path, corpus: Corpus, tokenizer: TextTokenizer, config: Config, color: bool = False
) -> Iterator[str]:
    """Yield lines about a corpus whose checksums were verified.

    Args:
        folder: Its folder.
        corpus: The corpus.
        tokenizer: Its tokenizer.
        config: The options of the batches that are described.
        color: Whether to color the predicted tokens of instructions and conversations.
    """
    manifest = corpus.manifests[0]
    yield f"{manifest['name']} in {folder}"
    yield f"  fingerprint {corpus.fingerprint[:16]}, tokenizer of {tokenizer.vocab_size} ids, all checksums match"
    yield f"  options: {', '.join(f'{name} {value}' for name, value in manifest['options'].items())}"
    for line in describe_corpus(corpus):
        yield f"  {line}"
    for name, stream in (("train", corpus.train), ("validation", corpus.validation)):
        lengths = np.diff(stream.ends, prepend=0)
        median, high = (int(np.quantile(lengths, q)) for q in (0.5, 0.95))
        yield (
            f"  {name}: {plural(stream.num_documents, 'document')} in {plural(len(stream.shards), 'shard')}; tokens "
            f"per document: median {median:,}, 95th percentile {high:,}, longest {int(lengths.max()):,}"
        )
    for mode in ("packed", *(("segmented",) if corpus.train.has_conversations else ()), "best-fit", "padded"):
        yield f"  {_mode_text(mode, corpus, config)}"
    ends = corpus.train.ends
    has_mask = corpus.train.has_prompts or corpus.train.has_conversations
    if has_mask:
        yield f"  {legend(color)}"
    for number in np.linspace(0, corpus.train.num_documents - 1, _SAMPLES).astype(int):
        start = int(ends[number - 1]) if number else 0
        if has_mask:
            yield f"  document {number:,}:"
            stop = min(int(ends[number]), start + _SAMPLE_TOKENS)
            yield from (f"    {line}" for line in masked_lines(corpus.train, start, stop, tokenizer, color))
            continue
        ids = corpus.train[start : min(int(ends[number]), start + _SAMPLE_CHARACTERS)]
        yield f"  document {number:,}: {tokenizer.decode(ids.tolist())[:_SAMPLE_CHARACTERS]!r}"


def overlap_summary(corpora: Sequence[Corpus], folder: Path | None, tokenizer: TextTokenizer, config: Config) -> str:
    """Return one line about held-out text that is also training text of these corpora or of the initial weights.

    Args:
        corpora: The corpora that are trained on together.
        folder: The folder of the corpus or mixture, in which the figure is kept for the report; None: none.
        tokenizer: Their tokenizer.
        config: The option `init.from_run`.
    """
    earlier = [run.corpus for run in runs_of_weights(config)[0]]
    if folder is not None:
        overlap = stored_overlap(folder, tokenizer, earlier)
        assert overlap is not None
    else:
        opened = [open_corpus(path, tokenizer, verify=False) for path in earlier]
        overlap = corpus_overlap(corpora, tokenizer, opened)
    return overlap.summary()


def _mode_text(mode: str, corpus: Corpus, config: Config) -> str:
    """Return the summary of a corpus in batches of a mode, or why there are none."""
    data = config.data.model_copy(update={"mode": mode})
    try:
        batches = make_batches(config.model_copy(update={"data": data}), corpus)
    except UserError as error:
        return f"{mode}: {error}"
    size = f"{config.train.batch_size} x {config.train.sequence_length}"
    return (
        f"{mode} at {size}: {'; '.join([*batches.summary(config.train.steps), *batches.warnings(config.train.steps)])}"
    )
