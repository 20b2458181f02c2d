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
from slm_jax.data.corpus.build import build_corpus
from slm_jax.data.corpus.conversations import template_digest
from slm_jax.data.corpus.corpus import (
    CHAT_FORMAT,
    FORMAT,
    Corpus,
    MixturePart,
    mixture_fingerprint,
    open_corpus,
    read_manifest,
)
from slm_jax.data.corpus.disjoint import (
    copy_without,
    exclusion_key,
    find_exclusions,
    read_digests,
    trained_corpus_errors,
)
from slm_jax.data.corpus.merge import complete_parts, merge_parts, remove_leftovers
from slm_jax.data.corpus.part_files import Part, PartState
from slm_jax.data.corpus.parts import build_part
from slm_jax.data.corpus.splitting import SourceCounts
from slm_jax.data.corpus.writing import write_json
from slm_jax.data.learning import WeightedSource, learned_tokenizer, weighted_sources
from slm_jax.data.load import load_tokenizer
from slm_jax.data.sources.documents import Source
from slm_jax.data.sources.hub import HubSource
from slm_jax.data.sources.registry import make_sources
from slm_jax.run.directory import Run, other_input_error
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural, text_size
from slm_jax.utils.labels import source_labels
from slm_jax.utils.text_tokenizer import TextTokenizer, save_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedCorpus:
    """A corpus in the shared cache.

    Attributes:
        folder: Its folder.
        source: Its source.
    """

    folder: Path
    source: WeightedSource


def prepare(config: Config, run: Run, tokenizer_path: str = "") -> tuple[TextTokenizer, Corpus]:
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
    save_tokenizer(tokenizer, run.path)
    _store(entries, run.corpus)
    corpus = open_corpus(run.corpus, tokenizer)
    for line in describe_corpus(corpus):
        logger.info("%s", line)
    return tokenizer, corpus


def _require_same_text(run: Run, parts: Sequence[tuple[str, float]], tokenizer: TextTokenizer) -> None:
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
        raise other_input_error(step, "another tokenizer", saved_tokenizer, tokenizer.fingerprint)
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
    config: Config, tokenizer_path: str = "", verify: bool | None = None, merge: int = 0
) -> tuple[TextTokenizer, list[CachedCorpus]]:
    """Prepare the tokenizer and the corpora of a config's sources in the shared cache.

    Args:
        config: The options `data` and `tokenizer`.
        tokenizer_path: Path or name of the tokenizer; empty: learn one.
        verify: See `open_corpus`; damaged corpora are built again.
        merge: Make the corpora that are not in the cache of this many parts; 0: of parts if all are there.

    Returns:
        The tokenizer, and the corpus of each source.

    Raises:
        UserError: The text cannot be read or is too small, a part is missing, or the cache cannot be written to.
    """
    sources = weighted_sources(config)
    tokenizer = find_tokenizer(config, tokenizer_path, sources)
    entries = []
    for source in sources:
        folder = _corpus_folder(config, source, tokenizer)
        with cache.locked_entry(folder, source.source.name):
            if not _is_usable(folder, tokenizer, verify):
                _make_corpus(folder, source, tokenizer, config.data.workers, merge)
            else:
                remove_leftovers(folder)
        _require_kind(folder, source.source)
        entries.append(CachedCorpus(folder, source))
    return tokenizer, _disjoint(entries, tokenizer, _corpora_of_weights(config), verify)


def find_tokenizer(config: Config, tokenizer_path: str, sources: Sequence[WeightedSource]) -> TextTokenizer:
    """Load a tokenizer, or learn it from the samples of sources if the cache does not have it.

    Args:
        config: The options of tokenizer and cache.
        tokenizer_path: Path or name of the tokenizer; empty: learn one.
        sources: The sources of the config.

    Raises:
        UserError: There is no such tokenizer, or the text cannot be read or is too small.
    """
    if tokenizer_path:
        return load_tokenizer(tokenizer_path)
    return learned_tokenizer(config, sources, cache.cache_folder(config.data.cache))


def prepare_part(config: Config, part: Part, tokenizer_path: str = "") -> list[PartState | None]:
    """Prepare a part of each source of a config in the shared cache, for `prepare_cached` with `merge`.

    Args:
        config: The options `data` and `tokenizer`.
        part: The part; number 0: the tokenizer only.
        tokenizer_path: Path or name of the tokenizer; empty: learn one.

    Returns:
        The state of the part of each source; None if its corpus is complete.

    Raises:
        UserError: The text cannot be read or is too small, or the cache cannot be written to.
    """
    sources = weighted_sources(config)
    tokenizer = find_tokenizer(config, tokenizer_path, sources)
    states: list[PartState | None] = []
    for source in sources if part.number else ():
        corpus = _corpus_folder(config, source, tokenizer)
        if corpus.is_dir():
            states.append(None)
            continue
        folder = part.folder(corpus)
        with cache.locked_entry(folder, f"part {part.number} of {source.source.name}"):
            if corpus.is_dir():  # merged while this process waited
                states.append(None)
                continue
            states.append(
                build_part(folder, source.source, tokenizer, source.options, part, source.sample, config.data.workers)
            )
    return states


def _corpus_folder(config: Config, source: WeightedSource, tokenizer: TextTokenizer) -> Path:
    """Return the folder in the cache for the corpus of a source."""
    key = cache.cache_key([FORMAT, source.source.describe(), asdict(source.options), tokenizer.fingerprint])
    return cache.cache_folder(config.data.cache) / "corpora" / f"{cache.slug(source.source.name)}-{key}"


def _make_corpus(entry: Path, source: WeightedSource, tokenizer: TextTokenizer, workers: int, merge: int) -> None:
    """Build the corpus of a source, or merge its parts."""
    name = source.source.name
    parts = merge or complete_parts(entry)
    if parts:
        merge_parts(entry, source.source, tokenizer, source.options, parts, workers)
        return
    for earlier in cache.earlier_entries(entry, source.source.describe(), FORMAT):
        logger.info(
            "note: %s was prepared by an earlier version, which cut documents into parts for the held-out split: "
            "preparing it again, with whole documents. %s may be removed",
            name,
            earlier,
        )
    build_corpus(entry, source.source, tokenizer, source.options, source.sample, workers)


def _require_kind(folder: Path, source: Source) -> None:
    """Refuse conversations where only text is asked for: the key of a data set of the hub is the same for both.

    Raises:
        UserError: The corpus has conversations, and the options of the source read text only.
    """
    if isinstance(source, HubSource) and source.reads_text_only and read_manifest(folder)["format"] == CHAT_FORMAT:
        column = source.dataset.mapper.describe()[0]
        raise UserError(
            f"{source.name} has no column {column}, it was prepared as conversations: leave out data.format and "
            "data.text_field, or make a prompt of columns with --data.template and --data.response_field"
        )


def _is_usable(entry: Path, tokenizer: TextTokenizer, verify: bool | None) -> bool:
    """Return whether a corpus is in the cache; one that is damaged or of another chat template is removed."""
    if not entry.is_dir():
        return False
    try:
        (manifest,) = open_corpus(entry, tokenizer, verify).manifests
    except UserError as error:
        logger.warning("%s: building it again", str(error).partition(": remove")[0])
        cache.remove_folder(entry)
        return False
    if "chat_template" in manifest and manifest["chat_template"] != template_digest(tokenizer):
        logger.info("%s was prepared with another chat template of the tokenizer: building it again", manifest["name"])
        cache.remove_folder(entry)
        return False
    return True


def _disjoint(
    entries: list[CachedCorpus], tokenizer: TextTokenizer, trained: Sequence[Path], verify: bool | None
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
    with trained_corpus_errors():
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
    with trained_corpus_errors():
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
    current = described if len(described) > 1 else described[0]
    return corpus.source not in (current, _without_options(current))


def _without_options(described: Any) -> Any:
    """Return the description of sources without the options by which files are read, as earlier versions stored it."""
    if not isinstance(described, list):
        return described
    return [_without_options(each) for each in described if not isinstance(each, dict)]


def describe_corpus(corpus: Corpus) -> Iterator[str]:
    """Yield lines that describe a corpus: the size of both splits, and what was left out, of each source."""
    for part, manifest in zip(corpus.parts, corpus.manifests, strict=True):
        train = manifest["train"]
        counts = SourceCounts.from_json(manifest["counts"])
        name = f"{part.name}: " if len(corpus.parts) > 1 else ""
        size = f"{plural(train['documents'], 'document')}, {plural(train['tokens'], 'token')}"
        held_out = text_size(manifest["validation"]["bytes"])
        if "turns" in train:
            kind = "responses" if train["prompts"] else "conversations"
            text = (
                f"{text_size(train['bytes'])} of {kind} to train on ({plural(train['documents'], 'conversation')} with "
                f"{plural(train['turns'], 'turn')} of the assistant, {plural(train['tokens'], 'token')}, prompts "
                "included)"
            )
            held_out = f"{plural(manifest['validation']['documents'], 'conversation')} with {held_out}"
        elif train["prompts"]:
            text = f"{text_size(train['bytes'])} of responses to train on ({size}, prompts included)"
        else:
            rate = train["bytes"] / train["tokens"]
            text = f"{text_size(train['bytes'])} to train on ({size}, {rate:.2f} bytes per token)"
        yield f"{name}{text}, {held_out} held out"
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
