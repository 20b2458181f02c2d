"""From a config to a run's tokenizer and corpus, each made once."""

from collections.abc import Callable
from pathlib import Path

from slm_jax.config import Config
from slm_jax.data.corpus import Corpus, open_corpus, split_documents, write_corpus
from slm_jax.data.sources import describe_source, documents
from slm_jax.errors import UserError
from slm_jax.run import Run
from tokenizer import HybridTokenizer, TokenizerError


def prepare(config: Config, run: Run, say: Callable[[str], None] = print) -> tuple[HybridTokenizer, Corpus]:
    """The run's tokenizer and corpus: found, or made from the config's text. Raises UserError.

    Only training text is seen by the tokenizer that is learned.
    """
    if run.corpus.is_dir():
        tokenizer = _load(str(run.tokenizer))
        corpus = open_corpus(run.corpus, tokenizer)
        if corpus.source != describe_source(config.data):
            say("note: the text has changed since this run began; it goes on with the text that it began with")
        return tokenizer, corpus
    say(f"reading {config.data.source if config.data.source != 'files' else ', '.join(config.data.files)}")
    sides = split_documents(documents(config.data), config.data.validation_fraction)
    if config.tokenizer.path:
        tokenizer = _load(config.tokenizer.path)
    else:
        say(f"learning a tokenizer of {config.tokenizer.vocab_size} entries")
        tokenizer = _learn(config, sides[0])
    tokenizer.save(run.tokenizer)
    one_batch = config.train.batch_size * config.train.sequence_length
    write_corpus(run.corpus, sides, tokenizer, at_least=one_batch, source=describe_source(config.data))
    corpus = open_corpus(run.corpus, tokenizer)
    train, held_out = corpus.train, corpus.validation
    say(
        f"{train.num_bytes / 1e6:.2f} MB to train on ({len(train.ends)} documents, {train.tokens.size:,} tokens, "
        f"{train.num_bytes / train.tokens.size:.2f} bytes per token), {held_out.num_bytes / 1e6:.2f} MB held out"
    )
    return tokenizer, corpus


def _learn(config: Config, texts: list[str]) -> HybridTokenizer:
    tokenizer = HybridTokenizer(lowercase=config.tokenizer.lowercase, byte_limit=config.tokenizer.byte_limit)
    for text in texts:
        tokenizer.add_text(text)
    try:
        tokenizer.freeze_vocab(vocab_size=config.tokenizer.vocab_size, boundaries=config.tokenizer.boundaries)
    except TokenizerError as error:
        raise UserError(f"tokenizer: {error}") from None
    return tokenizer


def _load(name: str) -> HybridTokenizer:
    """A saved tokenizer by path, or a ready-made one by name."""
    try:
        return HybridTokenizer.load(name) if Path(name).exists() else HybridTokenizer.pretrained(name)
    except TokenizerError as error:
        raise UserError(f"tokenizer.path: {error}") from None
