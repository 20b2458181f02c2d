"""How well a model predicts a held-out text, in the batches that its run validates in."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from slm_jax.config.schema import Config
from slm_jax.data.batches.arrays import Arrays
from slm_jax.data.batches.modes import validation_batches
from slm_jax.data.corpus.stream import TokenStream


def scores(config: Config, split: TokenStream, sums: Callable[[Arrays], Any]) -> dict[str, float]:
    """loss (nats per token), perplexity, accuracy, bits_per_byte, and count of predicted tokens, of all of a split.

    sums: `LossSums` of a batch. Added up in float64.
    """
    totals, num_bytes = np.zeros(4), 0
    for batch, size in validation_batches(config, split, config.train.batch_size // config.train.grad_accum_steps):
        num_bytes += size
        totals += np.array(sums(batch), np.float64)
    _, nll, correct, count = totals.tolist()
    return {
        "loss": nll / count,
        "perplexity": math.exp(min(nll / count, 700.0)),  # beyond: no float64
        "accuracy": correct / count,
        "bits_per_byte": nll / math.log(2) / num_bytes,
        "count": int(count),
    }
