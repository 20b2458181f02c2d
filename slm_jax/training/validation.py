"""Scores of a model on held-out text, in the batches that its run validates with."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from slm_jax.config.schema import Config
from slm_jax.data.batches.modes import validation_batches
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.utils.batch import Arrays


def scores(config: Config, split: TokenStream, sums: Callable[[Arrays], Any]) -> dict[str, float]:
    """Score a model on all of a text.

    Args:
        config: The config that says how the text is divided into batches.
        split: The held-out text.
        sums: Returns the `LossSums` of a batch. They are added up in float64.

    Returns:
        `loss` (nats per token), `perplexity`, `accuracy`, `bits_per_byte`, and `count` of predicted tokens.
    """
    rows = config.train.batch_size // config.train.grad_accum_steps
    totals = np.zeros(4)
    num_bytes = 0
    for batch, size in validation_batches(config, split, rows):
        num_bytes += size
        totals += np.array(sums(batch), np.float64)
    _, nll, correct, count = totals.tolist()
    return {
        "loss": nll / count,
        "perplexity": math.exp(min(nll / count, 700.0)),  # exp(710) overflows float64
        "accuracy": correct / count,
        "bits_per_byte": nll / math.log(2) / num_bytes,
        "count": int(count),
    }
