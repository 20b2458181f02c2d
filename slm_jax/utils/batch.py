"""A batch: the contract between data and model.

A dict of int32 arrays [B, T]:

input_ids       token ids
labels          the token after each input token (already shifted), IGNORE_INDEX where nothing is predicted
attention_mask  (optional) 1 for a real token, 0 for padding
segment_ids     (optional) attention stays inside a segment
positions       (optional) positions for the rotary angles; 0 to T-1 by default
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import jax

    Batch: TypeAlias = Mapping[str, jax.Array]
    """Arrays of a batch, by name."""
else:
    Batch = Mapping[str, Any]

Arrays: TypeAlias = dict[str, np.ndarray]
"""A batch [B, T] on the host, or one row of it [T]."""

IGNORE_INDEX = -100
"""Label of a position where nothing is predicted, as in PyTorch's cross entropy."""
