"""Encoded texts: the token ids of a text, with what the corpus stores about it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from slm_jax.data.corpus.splitting import SplitText
from slm_jax.data.corpus.stream import byte_table
from slm_jax.data.sources.documents import Split
from slm_jax.utils.text_tokenizer import TextTokenizer, document_prefix


class EncodedText(NamedTuple):
    """A text that has been encoded.

    Attributes:
        split: The split.
        digest: See `SplitText.digest`.
        ends: See `SplitText.ends`.
        size: Characters of the text, and of the response if it has one.
        ids: Token ids without <EOS>, but with the id before a text that a foreign tokenizer has, uint16 or uint32 [T].
        num_bytes: UTF-8 bytes of the text that is predicted.
        prompt_size: Number of its first tokens that are not predicted.
        rest: Bytes beyond those that `byte_table` gives to the predicted tokens.
    """

    split: Split
    digest: int
    ends: bool
    size: int
    ids: np.ndarray
    num_bytes: int
    prompt_size: int
    rest: int


class TextEncoder:
    """Combine texts with their token ids."""

    def __init__(self, tokenizer: TextTokenizer, loss_on: str):
        """Read the sizes of the tokens.

        Args:
            tokenizer: The tokenizer that the ids are of.
            loss_on: See `data.loss_on`.
        """
        self._loss_on = loss_on
        self._dtype = token_dtype(tokenizer)
        self._byte_table = byte_table(tokenizer)
        self._prefix = np.array(document_prefix(tokenizer), np.int32)

    def encoded(self, text: SplitText, ids: Iterator[np.ndarray]) -> EncodedText:
        """Return a text with its token ids.

        Args:
            text: The text.
            ids: The token ids of its `encoded_strings`, which are taken from here.
        """
        text_ids = np.concatenate([self._prefix, next(ids)]) if self._prefix.size else next(ids)
        response_ids = None if text.response is None else next(ids)
        all_ids = text_ids if response_ids is None else np.concatenate([text_ids, response_ids])
        if response_ids is not None and self._loss_on == "response":
            prompt_size = text_ids.size
            predicted_ids = response_ids
            predicted_text = text.response or ""
        else:
            prompt_size = 0
            predicted_ids = all_ids
            predicted_text = text.text + (text.response or "")
        num_bytes = len(predicted_text.encode("utf-8", "surrogatepass"))
        rest = num_bytes - int(self._byte_table[predicted_ids].sum())
        return EncodedText(
            text.split, text.digest, text.ends, text.size, all_ids.astype(self._dtype), num_bytes, prompt_size, rest
        )


def encoded_strings(texts: Iterable[SplitText | EncodedText]) -> list[str]:
    """Return the strings of texts that are to be encoded, in order; an instruction has two, prompt and response."""
    return [
        part for text in texts if isinstance(text, SplitText) for part in (text.text, text.response) if part is not None
    ]


def token_dtype(tokenizer: TextTokenizer) -> np.dtype:
    """Return the type of the stored token ids."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
