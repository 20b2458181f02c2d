"""Marks of token ids: the top bit of a stored id says that it is not of a turn of the assistant.

Only corpora with conversations have marks. In memory, ids that come from encoding are int32, and marked ones have the
sign bit.
"""

import numpy as np

from slm_jax.chat.messages import EncodedChat
from slm_jax.utils.text_tokenizer import TextTokenizer

_SIGN = np.int32(-(2**31))


def token_dtype(tokenizer: TextTokenizer, marked: bool = False) -> np.dtype:
    """Return the type of the stored token ids.

    Args:
        tokenizer: The tokenizer.
        marked: Whether ids have marks.
    """
    limit = 2**15 if marked else 2**16
    return np.dtype(np.uint16 if tokenizer.vocab_size <= limit else np.uint32)


def mark_of(dtype: np.dtype) -> int:
    """Return the bit that marks an id of a type."""
    return 1 << (8 * dtype.itemsize - 1)


def marked_ids(chat: EncodedChat) -> np.ndarray:
    """Return the ids of a conversation with marks, int32 [T]."""
    return np.where(chat.predicted, chat.ids, chat.ids | _SIGN).astype(np.int32)


def to_stored(ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return ids with marks, int32 [T], in the form in which they are stored."""
    stored = (ids & ~_SIGN).astype(dtype)
    stored[ids < 0] |= dtype.type(mark_of(dtype))
    return stored


def is_marked(stored: np.ndarray) -> np.ndarray:
    """Return which of stored ids are marked, bool [T]."""
    return stored >= stored.dtype.type(mark_of(stored.dtype))


def without_marks(stored: np.ndarray) -> np.ndarray:
    """Return stored ids without their marks, of the same type."""
    return stored & stored.dtype.type(mark_of(stored.dtype) - 1)


def num_turns(stored: np.ndarray) -> int:
    """Return the number of the assistant's turns in the stored ids of a document that begins with another turn."""
    marked = is_marked(stored)
    return int(np.count_nonzero(marked[:-1] & ~marked[1:]))
