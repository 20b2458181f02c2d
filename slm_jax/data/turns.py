"""The texts of stored conversations, turn by turn."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from slm_jax.data.corpus.stream import TokenStream
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import HybridTokenizer


class Piece(NamedTuple):
    """A part of a document that is decoded by itself.

    Attributes:
        text: The text, without special tokens.
        is_response: Whether it is a turn of the assistant, or the response to a prompt.
    """

    text: str
    is_response: bool


def boundary_ids(tokenizer: TextTokenizer) -> frozenset[int]:
    """Return the ids of special tokens between the messages of a conversation, <EOS> among them."""
    if isinstance(tokenizer, HybridTokenizer):
        return frozenset([*tokenizer.turn_ids, tokenizer.eos_id])
    return frozenset([tokenizer.eos_id, *(id_ for id_, data in enumerate(tokenizer.token_bytes) if not data)])


def pieces(ids: np.ndarray, response: np.ndarray, tokenizer: TextTokenizer, boundaries: Iterable[int]) -> list[Piece]:
    """Return the texts of a document, divided at special tokens and where responses begin and end.

    Contents were encoded each by itself, so that their texts joined by anything but the template would be another text.

    Args:
        ids: Token ids [T].
        response: Which of them are responses, bool [T].
        tokenizer: The tokenizer.
        boundaries: See `boundary_ids`.
    """
    is_boundary = np.isin(ids, list(boundaries))
    changes = np.flatnonzero((response[1:] != response[:-1]) | is_boundary[1:] | is_boundary[:-1]) + 1
    result = []
    for run, is_response in zip(np.split(ids, changes), np.split(response, changes), strict=True):
        if run.size and (text := tokenizer.decode(run.tolist())):
            result.append(Piece(text, bool(is_response[0])))
    return result


def stream_pieces(
    stream: TokenStream, start: int, stop: int, tokenizer: TextTokenizer, boundaries: Iterable[int]
) -> list[Piece]:
    """Return the texts of the document at the tokens start..stop-1 of a stream."""
    return pieces(stream[start:stop], stream.response_mask(start, stop), tokenizer, boundaries)
