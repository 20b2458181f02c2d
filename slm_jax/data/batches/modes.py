"""The batches of a run, by the option `data.mode`: packed, segmented, best-fit or padded."""

from collections.abc import Iterator, Sequence

from slm_jax.config.schema import Config
from slm_jax.data.batches import packed, padded, pairs
from slm_jax.data.batches.best_fit import BestFitBatches, sequential_best_fit_batches
from slm_jax.data.batches.packed import PackedBatches, check_packed_size, sequential_batches
from slm_jax.data.batches.padded import PaddedBatches, check_padded_size, sequential_padded_batches
from slm_jax.data.corpus.corpus import Corpus, MixturePart
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.utils.batch import Arrays


def make_batches(config: Config, corpus: Corpus) -> PackedBatches | PaddedBatches:
    """Return the training batches of a config.

    Raises:
        UserError: There is too little text for one batch, see `check_size`.
    """
    train = config.train
    if config.data.mode == "padded":
        return PaddedBatches(corpus.parts, train.batch_size, train.sequence_length, train.seed)
    if config.data.mode == "best-fit":
        return BestFitBatches(corpus.parts, train.batch_size, train.sequence_length, train.seed)
    segments = config.data.mode == "segmented"
    return PackedBatches(corpus.parts, train.batch_size, train.sequence_length, train.seed, segments)


def empty_batch(config: Config) -> Arrays:
    """Return a batch without content, of the largest shape that the batches of a config have."""
    train = config.train
    if train.objective == "dpo":
        return pairs.empty_pairs(train.batch_size, train.sequence_length)
    if config.data.mode == "padded":
        return padded.empty_batch(train.batch_size, train.sequence_length)
    return packed.empty_batch(train.batch_size, train.sequence_length, config.data.mode != "packed")


def check_size(config: Config, parts: Sequence[MixturePart]) -> None:
    """Check that there is enough text for one batch of a config, as `make_batches` does.

    Args:
        config: The config.
        parts: The parts of a mixture, or the only corpus.

    Raises:
        UserError: There is too little.
    """
    if config.data.mode in ("padded", "best-fit"):
        check_padded_size(parts, config.train.sequence_length)
    if config.data.mode == "padded":
        return
    tokens = sum(len(part.train) for part in parts)
    check_packed_size(tokens, config.train.batch_size, config.train.sequence_length)


def validation_batches(config: Config, stream: TokenStream, batch_size: int) -> Iterator[tuple[Arrays, int]]:
    """Yield (batch, UTF-8 bytes of text that its labels encode): all of a stream once, in order.

    Args:
        config: The options `data.mode` and `train.sequence_length`.
        stream: The text.
        batch_size: Rows in a batch.
    """
    length = config.train.sequence_length
    if config.data.mode == "padded":
        yield from sequential_padded_batches(stream, batch_size, length)
        return
    if config.data.mode == "best-fit":
        yield from sequential_best_fit_batches(stream, batch_size, length)
        return
    segments = config.data.mode == "segmented"
    for number, batch in enumerate(sequential_batches(stream, batch_size, length, segments)):
        start = number * batch_size * length
        yield batch, stream.num_bytes_between(start, min(start + batch_size * length, len(stream)))
