"""Encoded texts: the token ids of a text, with what the corpus stores about it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from slm_jax.data.corpus.encode import Item
from slm_jax.data.corpus.marks import is_marked, mark_of, to_stored, token_dtype
from slm_jax.data.corpus.splitting import SplitText
from slm_jax.data.corpus.stream import byte_table
from slm_jax.data.sources.documents import Split
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer, document_prefix


class EncodedText(NamedTuple):
    """A text that has been encoded.

    Attributes:
        split: The split.
        digest: See `SplitText.digest`.
        ends: See `SplitText.ends`.
        size: Characters of the text, and of the response if it has one; of a conversation, of all messages.
        ids: Token ids without <EOS>, but with the id before a text that a foreign tokenizer has, uint16 or uint32 [T];
            as they are stored, with the marks of a conversation.
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

    def __init__(self, tokenizer: TextTokenizer, loss_on: str, marked: bool = False):
        """Read the sizes of the tokens.

        Args:
            tokenizer: The tokenizer that the ids are of.
            loss_on: See `data.loss_on`.
            marked: Whether the corpus has conversations, whose ids have marks.
        """
        self._loss_on = loss_on
        self._marked = marked
        self._dtype = token_dtype(tokenizer, marked)
        self._byte_table = byte_table(tokenizer)
        self._prefix = np.array(document_prefix(tokenizer), np.int32)

    def encoded(self, text: SplitText, ids: Iterator[np.ndarray]) -> EncodedText:
        """Return a text with its token ids.

        Args:
            text: The text.
            ids: The token ids of its `encoded_items`, which are taken from here.

        Raises:
            UserError: It is a conversation, but the corpus has none.
        """
        if text.messages is not None:
            return self._conversation(text, next(ids))
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
        num_bytes = _num_bytes(predicted_text)
        rest = num_bytes - int(self._byte_table.take(predicted_ids).sum())
        return EncodedText(
            text.split, text.digest, text.ends, text.size, all_ids.astype(self._dtype), num_bytes, prompt_size, rest
        )

    def _conversation(self, text: SplitText, ids: np.ndarray) -> EncodedText:
        """Return a conversation with its ids, int32 [T] with marks."""
        assert text.messages is not None
        if not self._marked:
            raise UserError(
                "conversations begin after more than 50 MB of other text: give them as a source of their own, with "
                "--data.mix"
            )
        is_response_only = self._loss_on == "response"
        predicted_ids = ids[ids >= 0] if is_response_only else ids & 0x7FFFFFFF
        contents = [each.content for each in text.messages if each.role == "assistant" or not is_response_only]
        num_bytes = sum(map(_num_bytes, contents))
        rest = num_bytes - int(self._byte_table.take(predicted_ids).sum())
        is_predicted = ids >= 0
        before = int(is_predicted.argmax()) if is_predicted.any() else ids.size  # tokens before the first response
        prompt_size = before if is_response_only else 0
        stored = to_stored(ids, self._dtype)
        return EncodedText(text.split, text.digest, text.ends, text.size, stored, num_bytes, prompt_size, rest)


def _num_bytes(text: str) -> int:
    """Return the number of UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def end_of(text: EncodedText, eos_id: int, marked: bool) -> np.ndarray:
    """Return the <EOS> after a text, in the form in which it is stored; empty if there is none.

    A conversation ends with the end of its last turn, which the template predicts; the <EOS> after it separates
    documents and is marked. If the template ends turns with <EOS>, there is no second one.

    Args:
        text: The text.
        eos_id: The id of <EOS>.
        marked: Whether the corpus has conversations, whose ids have marks.
    """
    dtype = text.ids.dtype
    if not text.ends or (marked and text.ids.size and int(text.ids[-1]) == eos_id):
        return np.zeros(0, dtype)
    is_conversation = marked and bool(is_marked(text.ids[:1]).any())
    return np.array([eos_id | mark_of(dtype) if is_conversation else eos_id], dtype)


def encoded_items(texts: Iterable[SplitText | EncodedText]) -> list[Item]:
    """Return what of texts is to be encoded, in order; an instruction has two strings, prompt and response."""
    items: list[Item] = []
    for text in texts:
        if not isinstance(text, SplitText):
            continue
        if text.messages is not None:
            items.append(text.messages)
        else:
            items += [part for part in (text.text, text.response) if part is not None]
    return items
