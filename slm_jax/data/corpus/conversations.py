"""Conversations on their way to a corpus: which of them the chat template of the tokenizer accepts."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

from slm_jax.chat.template import ChatTemplate
from slm_jax.data.sources.documents import Document, InvalidRow
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import HybridTokenizer

_OPENING = 60  # characters of a conversation that stand for its location
Other = TypeVar("Other")


def accepted(
    items: Iterable[Document | InvalidRow | Other], tokenizer: TextTokenizer
) -> Iterator[Document | InvalidRow | Other]:
    """Yield items, with conversations that the chat template rejects as invalid rows.

    Parsers check what the project's template does. The template of a published model may demand more (no system
    message, for example).

    Raises:
        UserError: There are conversations, and the tokenizer has no chat template.
    """
    if isinstance(tokenizer, HybridTokenizer):
        yield from items
        return
    template: ChatTemplate | None = None
    for item in items:
        if isinstance(item, Document) and item.messages is not None:
            template = template or ChatTemplate.of(tokenizer)
            try:
                template.encode(item.messages)
            except UserError as error:
                opening = item.messages[0].content[:_OPENING]
                yield InvalidRow(f"the chat template rejects a conversation: {error}", f"it begins {opening!r}")
                continue
        yield item


def template_digest(tokenizer: TextTokenizer) -> str:
    """Return the SHA-256 (hexadecimal) of the chat template of a tokenizer.

    Raises:
        UserError: It has none.
    """
    return hashlib.sha256(ChatTemplate.of(tokenizer).source.encode("utf-8", "surrogatepass")).hexdigest()
