"""From a config to a tokenizer and a corpus: found in the run or in the shared cache, or made."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slm_jax.config.schema import Config, TokenizerConfig
from slm_jax.data.corpus import cache
from slm_jax.data.corpus.build import Options, build_corpus, write_json
from slm_jax.data.corpus.corpus import FORMAT, Corpus, open_corpus
from slm_jax.data.corpus.splitting import SourceCounts, SourceSample, SplitAssigner, make_plan, read_sample
from slm_jax.data.sources.documents import Document, InvalidRow, Reader, Source
from slm_jax.data.sources.registry import make_sources
from slm_jax.run.directory import Run, find_run
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural, text_size
from tokenizer import HybridTokenizer, TokenizerError

Say = Callable[[str], None]
_TRIED, _SHORT = 50, 32  # documents, and tokens of each, that `example_prompt` looks at; characters that it takes


@dataclass
class Input:
    """A source with its weight, and its head once that is read."""

    source: Source
    weight: float
    head: tuple[Reader, SourceSample, Iterator[Document | InvalidRow]] | None = None

    def read_sample(self, options: Options) -> list[Document]:
        """The documents of the head, read once."""
        if self.head is None:
            reader = self.source.read()
            self.head = (reader, *read_sample(reader, options.max_documents, options.max_tokens))
        return self.head[1].documents()


def prepare(config: Config, run: Run, say: Say = print) -> tuple[HybridTokenizer, Corpus]:
    """The run's tokenizer and corpus: found, or made from the config's text. Raises UserError.

    Only training text is seen by the tokenizer that is learned.
    """
    if run.corpus.is_dir():
        tokenizer = load_tokenizer(str(run.tokenizer))
        corpus = open_corpus(run.corpus, tokenizer)
        if _has_changed(config, corpus):
            say("note: the text has changed since this run began; it goes on with the text that it began with")
        return tokenizer, corpus
    # A run on another file system than the cache links to it; if that was emptied, the corpus is made again.
    lost = run.corpus.is_symlink() and run.tokenizer.is_file()
    tokenizer, entries = prepare_cached(config, say, str(run.tokenizer) if lost else resolve_tokenizer(config))
    _check_size(config, [open_corpus(entry, tokenizer) for entry, _ in entries])
    tokenizer.save(run.tokenizer)
    _give(entries, run.corpus)
    corpus = open_corpus(run.corpus, tokenizer)
    for line in describe_corpus(corpus):
        say(line)
    return tokenizer, corpus


def prepare_cached(config: Config, say: Say, tokenizer_path: str) -> tuple[HybridTokenizer, list[tuple[Path, Input]]]:
    """The tokenizer, and the folders in the shared cache that hold the corpora of the config's sources."""
    inputs = [Input(source, weight) for source, weight in make_sources(config.data)]
    folder = cache.cache_folder(config.data.cache)
    if tokenizer_path:
        tokenizer = load_tokenizer(tokenizer_path)
    else:
        tokenizer = _learned(config, [(each, _options(config)) for each in inputs], folder, say)
    return tokenizer, [(_corpus(config, each, tokenizer, folder, say), each) for each in inputs]


def learn_tokenizer(configs: Sequence[Config], say: Say) -> HybridTokenizer:
    """The tokenizer that is learned from the sources of several configs, each source once, as the first config says."""
    inputs: dict[str, tuple[Input, Options]] = {}
    for config in configs:
        for source, weight in make_sources(config.data):
            options = _options(config)
            inputs.setdefault(cache.key_of([source.describe(), asdict(options)]), (Input(source, weight), options))
    return _learned(configs[0], list(inputs.values()), cache.cache_folder(configs[0].data.cache), say)


def _learned(config: Config, pairs: Sequence[tuple[Input, Options]], folder: Path, say: Say) -> HybridTokenizer:
    """The tokenizer that is learned from sources: that of the cache, or a new one."""
    t, inputs = config.tokenizer, [each for each, _ in pairs]
    described = [[each.source.describe(), each.weight] for each in inputs]
    chosen = [asdict(options) for _, options in pairs]
    key = [FORMAT, described, t.vocab_size, t.lowercase, t.byte_limit, t.boundaries]
    key += chosen[:1] if all(each == chosen[0] for each in chosen) else [chosen]
    path = folder / "tokenizers" / f"{cache.slug(inputs[0].source.name)}-{cache.key_of(key)}.hybtok"
    with cache.only_one(path, f"the tokenizer of {inputs[0].source.name}"):
        if path.is_file():
            try:
                return HybridTokenizer.load(path)
            except TokenizerError as error:
                say(f"{error}; learning it again")
        say(f"reading {', '.join(each.source.name for each in inputs)}")
        texts = [text for each, options in pairs for text in _training_texts(each.read_sample(options), options)]
        say(f"learning a tokenizer of {t.vocab_size} entries")
        tokenizer = HybridTokenizer(lowercase=t.lowercase, byte_limit=t.byte_limit)
        for text in texts:
            tokenizer.add_text(text)
        try:
            tokenizer.freeze_vocab(vocab_size=t.vocab_size, boundaries=t.boundaries)
        except TokenizerError as error:
            raise UserError(f"tokenizer: {error}") from None
        tokenizer.save(path)
        return tokenizer


def _training_texts(head: list[Document], options: Options) -> Iterator[str]:
    assigner = SplitAssigner(make_plan(head, options.validation_fraction), options.validation_fraction)
    counts = SourceCounts()
    for document in head:
        for text in assigner.assign(document, counts):
            if text.split == "train":
                yield text.text + (text.response or "")


def _corpus(config: Config, each: Input, tokenizer: HybridTokenizer, folder: Path, say: Say) -> Path:
    """The folder in the cache with the corpus of one source, made if it is not there."""
    source, options = each.source, _options(config)
    key = cache.key_of([FORMAT, source.describe(), asdict(options), tokenizer.fingerprint])
    entry = folder / "corpora" / f"{cache.slug(source.name)}-{key}"
    with cache.only_one(entry, source.name):
        if entry.is_dir():
            try:
                open_corpus(entry, tokenizer)
                return entry
            except UserError as error:
                say(f"{str(error).partition(': remove')[0]}: making it again")
                cache.discard(entry)
        build_corpus(entry, source, tokenizer, options, each.head, config.data.workers, say)
    return entry


def _options(config: Config) -> Options:
    data = config.data
    return Options(data.validation_fraction, data.deduplicate, data.max_documents, data.max_tokens, data.loss_on)


def _check_size(config: Config, corpora: list[Corpus]) -> None:
    tokens = sum(len(corpus.train) for corpus in corpora)
    one_batch = config.train.batch_size * config.train.sequence_length
    if config.data.mode == "packed" and tokens < one_batch:
        raise UserError(
            f"the training text has {tokens:,} tokens, but one batch takes {one_batch:,}: "
            "add text, or lower --train.batch_size or --train.sequence_length"
        )


def _give(entries: list[tuple[Path, Input]], target: Path) -> None:
    """Put the corpora into a run's folder: one as it is, several in a folder each."""
    cache.discard(target)
    if len(entries) == 1:
        cache.give_to_run(entries[0][0], target)
        return
    partial = target.with_name(target.name + ".partial")
    cache.discard(partial)
    partial.mkdir()
    mix: list[dict[str, Any]] = []
    for number, (entry, each) in enumerate(entries):
        cache.give_to_run(entry, partial / str(number))
        mix.append({"folder": str(number), "name": each.source.name, "weight": each.weight})
    source = [each.source.describe() for _, each in entries]
    write_json(partial / "manifest.json", {"format": FORMAT, "mix": mix, "source": source})
    partial.rename(target)


def _has_changed(config: Config, corpus: Corpus) -> bool:
    try:
        described = [source.describe() for source, _ in make_sources(config.data)]
    except UserError:  # the files are gone
        return True
    return corpus.source != (described if len(described) > 1 else described[0])


def describe_corpus(corpus: Corpus) -> Iterator[str]:
    """What there is, in a line for each source."""
    for part, manifest in zip(corpus.parts, corpus.manifests, strict=True):
        train, held_out, counts = manifest["train"], manifest["validation"], SourceCounts.from_json(manifest["counts"])
        name = f"{part.name}: " if len(corpus.parts) > 1 else ""
        rate = f"{train['bytes'] / train['tokens']:.2f} bytes per token"
        size = f"{plural(train['documents'], 'document')}, {plural(train['tokens'], 'token')}"
        yield (
            f"{name}{text_size(train['bytes'])} {'of responses ' * bool(train['prompts'])}to train on "
            f"({size}, {'prompts included' if train['prompts'] else rate}), {text_size(held_out['bytes'])} held out"
        )
        if counts.repeats:
            yield f"{name}{plural(counts.repeats, 'exact repeat')} left out"
        if counts.bad:
            yield f"{name}{counts.invalid_text()}"


def example_prompt(run: Run) -> str:
    """Two to four words that a held-out document of a run begins with, to try its model with; "The" if it has none."""
    try:
        tokenizer = load_tokenizer(str(run.tokenizer))
        split = open_corpus(run.corpus, tokenizer, verify=False).validation
    except UserError:  # a run may stand without its text
        return "The"
    ends = split.ends[:_TRIED].tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        line = tokenizer.decode(split[start : min(end - 1, start + _TRIED)].tolist()).strip().partition("\n")[0]
        words = line.split(" ")[:4]
        while len(words) > 2 and len(" ".join(words)) > _SHORT:
            words.pop()
        text = " ".join(words)
        if len(words) > 1 and len(text) <= _SHORT and text.isprintable():
            return text
    return "The"


def resolve_tokenizer(config: Config) -> str:
    """Path or name of the tokenizer that a config gives: of what it begins with, or `tokenizer.path`; empty: none.

    Raises UserError if something is named to begin with, and another tokenizer than its own is asked for.
    """
    asked, start = config.tokenizer, config.init.from_run
    if config.init.from_hf:
        return _tokenizer_of_folder(config)
    if not start:
        return asked.path
    run = find_run(start, trained=True)
    if asked.path:
        if load_tokenizer(asked.path).fingerprint != load_tokenizer(str(run.tokenizer)).fingerprint:
            raise UserError(
                f"tokenizer.path {asked.path} is not the tokenizer of {run.path}, whose weights know no other"
            )
    elif asked != TokenizerConfig():  # what was not asked for is that run's
        theirs, default = dict(run.read_config().tokenizer), dict(TokenizerConfig())
        wrong = {name: value for name, value in asked if value not in (theirs[name], default[name])}
        differ = [f"tokenizer.{name}: {theirs[name]!r} there, {value!r} here" for name, value in wrong.items()]
        if differ:
            raise UserError(
                f"the weights of {run.path} know no tokenizer but their own; leave tokenizer.* out: {'; '.join(differ)}"
            )
    return str(run.tokenizer)


def _tokenizer_of_folder(config: Config) -> str:
    """Path or name of the tokenizer that the weights of `init.from_hf` know. Raises UserError if another is given."""
    from slm_jax.huggingface.import_folder import find_tokenizer, open_folder  # with JAX, which the data do without

    folder, asked = open_folder(config.init.from_hf), config.tokenizer
    name = find_tokenizer(folder, asked.path)
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size != folder.vocab_size:
        raise UserError(
            f"the embedding in {folder.path} has {folder.vocab_size} rows, but the tokenizer {name} has "
            f"{tokenizer.vocab_size} ids: the weights know no other tokenizer than the one they were trained with"
        )
    if asked.path and load_tokenizer(asked.path).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"tokenizer.path {asked.path} is not the tokenizer of {folder.path}, whose weights know no other"
        )
    for field in ("vocab_size", "lowercase", "byte_limit"):
        here, there = getattr(asked, field), getattr(tokenizer, field)
        fits = here >= there if field == "vocab_size" else here == there  # at most so many ids
        if not fits and here != getattr(TokenizerConfig(), field):
            raise UserError(
                f"tokenizer.{field}: {there!r} in {folder.path}, {here!r} here; its weights know no other: leave it out"
            )
    return name


def load_tokenizer(name: str) -> HybridTokenizer:
    """A saved tokenizer by path, or a ready-made one by name. Raises UserError."""
    try:
        return HybridTokenizer.load(name) if Path(name).exists() else HybridTokenizer.pretrained(name)
    except TokenizerError as error:
        raise UserError(f"tokenizer.path: {error}") from None
