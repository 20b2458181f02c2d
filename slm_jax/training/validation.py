"""Scores of a model on held-out text, in the batches that its run validates with."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slm_jax.config.schema import Config
from slm_jax.data.batches.modes import validation_batches
from slm_jax.data.corpus.corpus import HeldOut
from slm_jax.utils.batch import Arrays


def scores(config: Config, parts: Sequence[HeldOut], sums: Callable[[Arrays], Any]) -> dict[str, float]:
    """Score a model on all of the held-out text of one source, or of several.

    Every predicted token counts the same, so that a source weighs as much as the text that is held out of it.

    Args:
        config: The config that says how the text is divided into batches.
        parts: The held-out text of each source, see `Corpus.held_out`. No batch holds text of two sources.
        sums: Returns the `LossSums` of a batch. They are added up in float64.

    Returns:
        `loss` (nats per token), `perplexity`, `accuracy`, `bits_per_byte`, and `count` of predicted tokens; with
        several sources also `loss/NAME` and `bits_per_byte/NAME` of each.
    """
    rows = config.train.batch_size // config.train.grad_accum_steps
    totals = np.zeros((len(parts), 4))
    num_bytes = np.zeros(len(parts), np.int64)
    for index, part in enumerate(parts):
        for batch, size in validation_batches(config, part.stream, rows):
            num_bytes[index] += size
            totals[index] += np.array(sums(batch), np.float64)
    result = _scores(totals.sum(0), int(num_bytes.sum()))
    if len(parts) > 1:
        for part, part_totals, size in zip(parts, totals, num_bytes.tolist(), strict=True):
            if part_totals[-1]:  # prompts may fill the rows of a source, and leave nothing to predict
                of_part = _scores(part_totals, size)
                result |= {f"{name}/{part.name}": of_part[name] for name in ("loss", "bits_per_byte")}
    return result


def _scores(totals: np.ndarray, num_bytes: int) -> dict[str, float]:
    """Return the scores from summed `LossSums`, float64 [4], and the UTF-8 bytes of the predicted text."""
    _, nll, correct, count = totals.tolist()
    return {
        "loss": nll / count,
        "perplexity": math.exp(min(nll / count, 700.0)),  # exp(710) overflows float64
        "accuracy": correct / count,
        "bits_per_byte": nll / math.log(2) / num_bytes,
        "count": int(count),
    }
