"""Validation of a mixture: every source is scored, and weighs as much as its held-out text."""

import math

import numpy as np
import pytest

from slm_jax.data.corpus.corpus import Corpus, MixturePart
from slm_jax.data.corpus.stream import DOCUMENT_DTYPE, Shard, TokenStream, heads
from slm_jax.run.metrics import scores_text, source_scores
from slm_jax.training import validation
from slm_jax.utils.batch import IGNORE_INDEX
from tests.helpers import tiny_config


def stream_of(token, documents, length=50):
    ends = [(length * (i + 1), 0, length - 1, 0, 0, 0) for i in range(documents)]
    tokens = np.full(documents * length, token, np.uint16)
    return TokenStream([Shard(tokens, np.array(ends, DOCUMENT_DTYPE))], np.ones(10, np.int32))


def corpus_of(**documents):
    streams = [stream_of(token, count) for token, count in enumerate(documents.values(), 1)]
    joined = TokenStream([shard for stream in streams for shard in stream.shards], np.ones(10, np.int32))
    parts = tuple(MixturePart(stream, 1.0, name) for name, stream in zip(documents, streams, strict=True))
    manifests = tuple({"validation": {"shards": [{}]}} for _ in streams)
    return Corpus(joined, joined, parts, "", None, manifests)


def sums(batch):
    """Return a loss of as many nats as the number of the token: 1 for the first source, 2 for the second."""
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX]
    return 0.0, float(labels.sum()), float((labels == 1).sum()), float(labels.size)


@pytest.mark.parametrize("mode", ["packed", "segmented", "padded"])
def test_each_source_is_scored_and_counts_by_its_held_out_text(mode):
    config = tiny_config(**{"data.mode": mode, "train.sequence_length": 16})
    corpus = corpus_of(small=2, large=18)
    unlimited = validation.scores(config, corpus.held_out(), sums)
    limited = validation.scores(config, corpus.held_out(500), sums)
    assert unlimited["count"] == 1000
    assert limited["count"] == 500  # one document of ten of the first source, nine of the second
    for scores in (unlimited, limited):
        assert scores["loss"] == pytest.approx(1.9)
        assert scores["perplexity"] == pytest.approx(math.exp(1.9))
        assert scores["accuracy"] == pytest.approx(0.1)
        assert scores["bits_per_byte"] == pytest.approx(1.9 / math.log(2))
        assert {"loss/small": 1.0, "loss/large": 2.0}.items() <= scores.items()
        assert scores["bits_per_byte/large"] == pytest.approx(2 / math.log(2))
    few = validation.scores(config, corpus.held_out(60), sums)
    assert (few["count"], few["loss/small"], few["loss/large"]) == (100, 1.0, 2.0)  # a document of each


def test_single_source_has_the_scores_of_its_whole_text_only():
    config = tiny_config(**{"train.sequence_length": 16})
    scores = validation.scores(config, corpus_of(only=3).held_out(), sums)
    assert set(scores) == {"loss", "perplexity", "accuracy", "bits_per_byte", "count"}
    assert heads([stream_of(1, 3)], 100)[0].num_documents == 2


def test_scores_of_sources_are_shown():
    row = {"val_loss": 1.9, "val_perplexity": 6.7, "val_accuracy": 0.1, "val_bits_per_byte": 2.7}
    assert scores_text(row).endswith("2.700 bits per byte")
    row |= {"val_bits_per_byte/a/b": 1.0, "val_bits_per_byte/c": 3.0, "val_loss/c": None}
    assert scores_text(row).endswith("2.700 bits per byte (a/b 1.000, c 3.000)")
    assert source_scores(row, "val_loss") == {}
