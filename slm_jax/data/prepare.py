"""Prepare the data of a config: make the tokenizer and the corpus, or find them in the run or in the shared cache."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slm_jax.config.schema import Config
from slm_jax.data.ancestry import runs_of_weights
from slm_jax.data.batches.modes import check_size
from slm_jax.data.corpus import cache
from slm_jax.data.corpus.build import CorpusOptions, build_corpus, write_json
from slm_jax.data.corpus.corpus import FORMAT, Corpus, MixturePart, mixture_fingerprint, open_corpus, read_manifest
from slm_jax.data.corpus.disjoint import copy_without, exclusion_key, find_exclusions, read_digests
from slm_jax.data.corpus.plan import make_plan
from slm_jax.data.corpus.splitting import SourceCounts, SourceSample, SplitAssigner, SplitText
from slm_jax.data.load import load_tokenizer
from slm_jax.data.sources.documents import Source
from slm_jax.data.sources.registry import make_sources
from slm_jax.run.directory import Run, other_input_error
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural, text_size
from slm_jax.utils.labels import source_labels
from tokenizer import HybridTokenizer, TokenizerError

logger = logging.getLogger(__name__)


@dataclass
class WeightedSource:
    """A source of a config.

    Attributes:
        source: The source.
        weight: Its weight in the mixture.
        options: The options that its corpus depends on.
        sample: Its sample, once that has been read.
    """

    source: Source
    weight: float
    options: CorpusOptions
    sample: SourceSample | None = None

    def read_sample(self) -> SourceSample:
        """Return the sample, which is read only once."""
        if self.sample is None:
            self.sample = SourceSample(self.source.read(), self.options.max_documents, self.options.max_tokens)
        return self.sample


@dataclass(frozen=True)
class CachedCorpus:
    """A corpus in the shared cache.

    Attributes:
        folder: Its folder.
        source: Its source.
    """

    folder: Path
    source: WeightedSource


def prepare(config: Config, run: Run, tokenizer_path: str = "") -> tuple[HybridTokenizer, Corpus]:
    """Prepare the data of a run: open what it has, or make it from the config's text.

    A learned tokenizer is trained on training text only. Nothing is stored in the run if the text is too small for one
    batch of the config.

    Args:
        config: The run's config.
        run: The run; its folder must exist.
        tokenizer_path: Path or name of the tokenizer of a run without data; empty: learn one.

    Returns:
        The run's tokenizer and corpus.

    Raises:
        UserError: The text cannot be read, is too small, or does not fit the tokenizer or the checkpoints of the run.
    """
    if run.corpus.is_dir():
        tokenizer = load_tokenizer(str(run.tokenizer))
        corpus = open_corpus(run.corpus, tokenizer)
        if _has_changed(config, corpus):
            logger.info("note: the text has changed since this run was started; it continues with the original text")
        return tokenizer, corpus
    if has_tokenizer(run):
        tokenizer_path = str(run.tokenizer)
    # If a run has lost its corpus, that may have been removed because it was damaged, with the cache's copy of it.
    tokenizer, entries = prepare_cached(config, tokenizer_path, verify=True if run.tokenizer.is_file() else None)
    corpora = [open_corpus(entry.folder, tokenizer) for entry in entries]
    labels = source_labels([entry.source.source.name for entry in entries])
    weights = [entry.source.weight for entry in entries]
    check_size(config, [MixturePart(c.train, w, label) for c, w, label in zip(corpora, weights, labels, strict=True)])
    parts = [(corpus.fingerprint, weight) for corpus, weight in zip(corpora, weights, strict=True)]
    _require_same_text(run, parts, tokenizer)
    tokenizer.save(run.tokenizer)
    _store(entries, run.corpus)
    corpus = open_corpus(run.corpus, tokenizer)
    for line in describe_corpus(corpus):
        logger.info("%s", line)
    return tokenizer, corpus


def _require_same_text(run: Run, parts: Sequence[tuple[str, float]], tokenizer: HybridTokenizer) -> None:
    """Refuse to store a corpus in a run that was trained on another one, and would be evaluated on this one.

    Args:
        run: The run, which has lost its corpus if it has a checkpoint.
        parts: Fingerprint and weight of each corpus that is to be stored.
        tokenizer: The tokenizer that is to be stored.

    Raises:
        UserError: The newest checkpoint is of another tokenizer or text.
    """
    step = run.newest_step()
    if step is None:
        return
    from slm_jax.run.selection import newest_position  # imports JAX

    position = newest_position(run)
    saved_tokenizer = position.get("tokenizer", tokenizer.fingerprint)
    if saved_tokenizer != tokenizer.fingerprint:
        raise other_input_error(step, "tokenizer", saved_tokenizer, tokenizer.fingerprint)
    saved = position.get("corpus")
    if saved not in (None, mixture_fingerprint(parts) if len(parts) > 1 else parts[0][0]):
        raise UserError(
            f"{run.corpus} is missing and cannot be prepared again: the text has changed, or an earlier version of "
            "this program split it in another way. Restore it from a backup, or start another --run"
        )


def has_tokenizer(run: Run) -> bool:
    """Return whether a run has a tokenizer that `prepare` uses: it has data, or has lost them with the cache.

    A run on another file system than the cache has a symbolic link to its corpus. If the cache was emptied, the corpus
    is built again, with the run's tokenizer. The same holds if a damaged corpus was removed after training had begun.
    """
    if run.corpus.is_dir():
        return True
    return run.tokenizer.is_file() and (run.corpus.is_symlink() or run.newest_step() is not None)


def prepare_cached(
    config: Config, tokenizer_path: str = "", verify: bool | None = None
) -> tuple[HybridTokenizer, list[CachedCorpus]]:
    """Prepare the tokenizer and the corpora of a config's sources in the shared cache.

    Args:
        config: The options `data` and `tokenizer`.
        tokenizer_path: Path or name of the tokenizer; empty: learn one.
        verify: See `open_corpus`; damaged corpora are built again.

    Returns:
        The tokenizer, and the corpus of each source.

    Raises:
        UserError: The text cannot be read or is too small, or the cache cannot be written to.
    """
    sources = _weighted_sources(config)
    folder = cache.cache_folder(config.data.cache)
    if tokenizer_path:
        tokenizer = load_tokenizer(tokenizer_path)
    else:
        tokenizer = _learned_tokenizer(config, sources, folder)
    entries = [CachedCorpus(_cached_corpus(config, source, tokenizer, folder, verify), source) for source in sources]
    return tokenizer, _disjoint(entries, tokenizer, _corpora_of_weights(config), verify)


def learn_tokenizer(configs: Sequence[Config]) -> HybridTokenizer:
    """Learn one tokenizer from the sources of several configs, or find it in the cache.

    Args:
        configs: The configs; options of the tokenizer and the cache are taken from the first. A source that occurs in
            several configs is read once.

    Raises:
        UserError: The text cannot be read or is too small, or the cache cannot be written to.
    """
    sources: dict[str, WeightedSource] = {}
    for config in configs:
        for source in _weighted_sources(config):
            key = cache.cache_key([source.source.describe(), asdict(source.options)])
            sources.setdefault(key, source)
    return _learned_tokenizer(configs[0], list(sources.values()), cache.cache_folder(configs[0].data.cache))


def _weighted_sources(config: Config) -> list[WeightedSource]:
    data = config.data
    options = CorpusOptions(
        data.validation_fraction,
        data.deduplicate,
        data.max_documents,
        data.max_tokens,
        data.loss_on,
        data.max_validation_characters,
    )
    return [WeightedSource(source, weight, options) for source, weight in make_sources(data)]


def _learned_tokenizer(config: Config, sources: Sequence[WeightedSource], folder: Path) -> HybridTokenizer:
    """Return the tokenizer that is learned from the samples of sources, from the cache if it is there."""
    options = config.tokenizer
    first = sources[0].source.name
    path = folder / "tokenizers" / f"{cache.slug(first)}-{_tokenizer_key(config, sources)}.hybtok"
    with cache.locked_entry(path, f"the tokenizer of {first}"):
        if path.is_file():
            try:
                return HybridTokenizer.load(path)
            except TokenizerError as error:
                logger.warning("%s; learning it again", error)
        logger.info("reading %s", ", ".join(source.source.name for source in sources))
        texts = list(_training_texts(sources))
        logger.info("learning a tokenizer of up to %d entries", options.vocab_size)
        tokenizer = HybridTokenizer(lowercase=options.lowercase, byte_limit=options.byte_limit)
        for text in texts:
            tokenizer.add_text(text)
        try:
            tokenizer.freeze_vocab(vocab_size=options.vocab_size, boundaries=options.boundaries)
        except TokenizerError as error:
            raise UserError(f"tokenizer: {error}") from None
        tokenizer.save(path)
        return tokenizer


def _tokenizer_key(config: Config, sources: Sequence[WeightedSource]) -> str:
    """Return a hash of all that a learned tokenizer depends on."""
    t = config.tokenizer
    described = [[source.source.describe(), source.weight] for source in sources]
    options = [asdict(source.options) for source in sources]
    key: list[Any] = [FORMAT, described, t.vocab_size, t.lowercase, t.byte_limit, t.boundaries]
    if all(each == options[0] for each in options):
        key.append(options[0])
    else:
        key.append(options)
    return cache.cache_key(key)


def _training_texts(sources: Sequence[WeightedSource]) -> Iterator[str]:
    """Yield the training texts of sources' samples, without documents that another source holds out."""
    samples = [_split_sample(source) for source in sources]
    held_out = [{text.digest for text in texts if text.split == "validation"} for texts in samples]
    for index, texts in enumerate(samples):
        others = set().union(*(digests for number, digests in enumerate(held_out) if number != index))
        others -= held_out[index]  # documents that both cut
        for text in texts:
            if text.split == "train" and text.digest not in others:
                yield text.text + (text.response or "")


def _split_sample(source: WeightedSource) -> list[SplitText]:
    """Return the documents of a source's sample with their splits."""
    sample = source.read_sample()
    documents = sample.documents()
    options = source.options
    plan = make_plan(documents, options.validation_fraction, sample.complete)
    assigner = SplitAssigner(plan, max_held_out=options.max_validation_characters)
    counts = SourceCounts()
    return [text for document in documents for text in assigner.assign(document, counts)]


def _cached_corpus(
    config: Config, source: WeightedSource, tokenizer: HybridTokenizer, folder: Path, verify: bool | None
) -> Path:
    """Return the folder in the cache with the corpus of a source, which is built if it is missing or damaged."""
    name = source.source.name
    key = cache.cache_key([FORMAT, source.source.describe(), asdict(source.options), tokenizer.fingerprint])
    entry = folder / "corpora" / f"{cache.slug(name)}-{key}"
    with cache.locked_entry(entry, name):
        if _is_usable(entry, tokenizer, verify):
            return entry
        for earlier in cache.earlier_entries(entry, source.source.describe(), FORMAT):
            logger.info(
                "note: %s was prepared by an earlier version, which cut documents into parts for the held-out split: "
                "preparing it again, with whole documents. %s may be removed",
                name,
                earlier,
            )
        build_corpus(entry, source.source, tokenizer, source.options, source.sample, config.data.workers)
    return entry


def _is_usable(entry: Path, tokenizer: HybridTokenizer, verify: bool | None) -> bool:
    """Return whether a corpus is in the cache; a damaged one is removed."""
    if not entry.is_dir():
        return False
    try:
        open_corpus(entry, tokenizer, verify)
    except UserError as error:
        logger.warning("%s: building it again", str(error).partition(": remove")[0])
        cache.remove_folder(entry)
        return False
    return True


def _disjoint(
    entries: list[CachedCorpus], tokenizer: HybridTokenizer, trained: Sequence[Path], verify: bool | None
) -> list[CachedCorpus]:
    """Return corpora without documents that are on the other side in another one.

    Args:
        entries: The corpora of the sources.
        tokenizer: Their tokenizer.
        trained: The corpora of the runs that the weights come from.
        verify: See `open_corpus`.
    """
    if len(entries) == 1 and not trained:
        return entries
    digests = [read_digests(entry.folder)[0] for entry in entries]
    before = [each for folder in trained for each in read_digests(folder)]
    result = []
    for entry, exclusion in zip(entries, find_exclusions(digests, before), strict=True):
        folder = entry.folder
        if not exclusion.is_empty:
            key = cache.cache_key(exclusion_key(folder, exclusion))
            folder = folder.with_name(f"{folder.name.rpartition('-')[0]}-{key}")
            with cache.locked_entry(folder, entry.source.source.name):
                if not _is_usable(folder, tokenizer, verify):
                    copy_without(entry.folder, folder, exclusion)
        result.append(CachedCorpus(folder, entry.source))
    return result


def _corpora_of_weights(config: Config) -> list[Path]:
    """Return the corpora of the runs that the initial weights of a config come from."""
    runs, missing = runs_of_weights(config)
    earlier = [run for run in runs if read_manifest(run.corpus)["format"] < FORMAT]
    reasons = [missing] if missing else []
    reasons += [f"{run.path} was made by an earlier version" for run in earlier]
    for reason in reasons:
        logger.info("note: held-out text is not compared with all text that the weights were trained on: %s", reason)
    return [run.corpus for run in runs if run not in earlier]


def _store(entries: Sequence[CachedCorpus], target: Path) -> None:
    """Put corpora of the cache into a run's folder: one as it is, several with a manifest of the mixture."""
    cache.remove_folder(target)
    if len(entries) == 1:
        cache.link_into_run(entries[0].folder, target)
        return
    partial = target.with_name(target.name + ".partial")
    cache.remove_folder(partial)
    partial.mkdir()
    mix: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        cache.link_into_run(entry.folder, partial / str(number))
        mix.append({"folder": str(number), "name": entry.source.source.name, "weight": entry.source.weight})
    described = [entry.source.source.describe() for entry in entries]
    write_json(partial / "manifest.json", {"format": FORMAT, "mix": mix, "source": described})
    partial.rename(target)


def _has_changed(config: Config, corpus: Corpus) -> bool:
    """Return whether the sources of a config are no longer those that a corpus was built from."""
    try:
        described = [source.describe() for source, _ in make_sources(config.data)]
    except UserError:  # the files do not exist any more
        return True
    return corpus.source != (described if len(described) > 1 else described[0])


def describe_corpus(corpus: Corpus) -> Iterator[str]:
    """Yield lines that describe a corpus: the size of both splits, and what was left out, of each source."""
    for part, manifest in zip(corpus.parts, corpus.manifests, strict=True):
        train = manifest["train"]
        counts = SourceCounts.from_json(manifest["counts"])
        name = f"{part.name}: " if len(corpus.parts) > 1 else ""
        size = f"{plural(train['documents'], 'document')}, {plural(train['tokens'], 'token')}"
        if train["prompts"]:
            text = f"{text_size(train['bytes'])} of responses to train on ({size}, prompts included)"
        else:
            rate = train["bytes"] / train["tokens"]
            text = f"{text_size(train['bytes'])} to train on ({size}, {rate:.2f} bytes per token)"
        yield f"{name}{text}, {text_size(manifest['validation']['bytes'])} held out"
        excluded = manifest.get("excluded", {})
        if excluded.get("train"):
            yield f"{name}{plural(excluded['train'], 'document')} left out of training: held out elsewhere"
        if excluded.get("validation"):
            count = plural(excluded["validation"], "held-out document")
            yield f"{name}{count} left out of validation: the initial weights were trained on this text"
        if excluded.get("all_seen"):
            yield f"{name}note: the initial weights were trained on all held-out documents: their scores say little"
        if counts.cut:
            yield (
                f"{name}note: there are too few documents to hold out whole ones: the beginning of "
                f"{plural(counts.cut, 'document')} is held out, and {plural(counts.gaps, 'character')} after it are "
                "not used"
            )
        if counts.duplicates:
            yield f"{name}{plural(counts.duplicates, 'duplicate')} left out"
        if counts.invalid:
            yield f"{name}{counts.invalid_text()}"
