"""Learn a tokenizer from the training text of a config's sources, once for all runs."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slm_jax.config.schema import Config
from slm_jax.data.corpus import cache
from slm_jax.data.corpus.build import CorpusOptions
from slm_jax.data.corpus.corpus import FORMAT
from slm_jax.data.corpus.splitting import SourceCounts, SourceSample, SplitAssigner, SplitText
from slm_jax.data.sources.documents import Source
from slm_jax.data.sources.registry import make_sources
from slm_jax.utils.errors import UserError
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
        for source in weighted_sources(config):
            key = cache.cache_key([source.source.describe(), asdict(source.options)])
            sources.setdefault(key, source)
    return learned_tokenizer(configs[0], list(sources.values()), cache.cache_folder(configs[0].data.cache))


def weighted_sources(config: Config) -> list[WeightedSource]:
    """Return the sources of a config.

    Raises:
        UserError: A source does not exist.
    """
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


def learned_tokenizer(config: Config, sources: Sequence[WeightedSource], folder: Path) -> HybridTokenizer:
    """Return the tokenizer that is learned from the samples of sources, from the cache if it is there.

    Args:
        config: The options of the tokenizer.
        sources: The sources.
        folder: The folder of the cache.

    Raises:
        UserError: The text cannot be read or is too small, or the cache cannot be written to.
    """
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
        tokenizer = HybridTokenizer(options.lowercase, options.byte_limit, options.portable)
        for text in texts:
            tokenizer.add_text(text)
        try:
            boundaries = "words" if options.portable else options.boundaries
            tokenizer.freeze_vocab(vocab_size=options.vocab_size, boundaries=boundaries)
        except TokenizerError as error:
            raise UserError(f"tokenizer: {error}") from None
        tokenizer.save(path)
        return tokenizer


def _tokenizer_key(config: Config, sources: Sequence[WeightedSource]) -> str:
    """Return a hash of all that a learned tokenizer depends on."""
    t = config.tokenizer
    described = [[source.source.describe(), source.weight] for source in sources]
    options = [asdict(source.options) for source in sources]
    key: list[Any] = ["turn tokens", FORMAT, described, t.vocab_size, t.lowercase, t.byte_limit, t.boundaries]
    if t.portable:
        key.append("portable")
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
                yield from text.strings if text.messages is not None else ("".join(text.strings),)


def _split_sample(source: WeightedSource) -> list[SplitText]:
    """Return the documents of a source's sample with their splits."""
    sample = source.read_sample()
    options = source.options
    plan = sample.plan(options.validation_fraction)
    assigner = SplitAssigner(plan, max_held_out=options.max_validation_characters)
    counts = SourceCounts()
    return [text for document in sample.documents() for text in assigner.assign(document, counts)]
