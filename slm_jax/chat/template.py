"""The chat template of a tokenizer: one way from messages to token ids for training, serving, export and evaluation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from slm_jax.chat.foreign_template import ForeignTemplate
from slm_jax.chat.messages import EncodedChat, Message
from slm_jax.chat.own_template import OwnTemplate
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import HybridTokenizer

if TYPE_CHECKING:  # needs the package tokenizers, an extra
    from slm_jax.utils.foreign_tokenizer import ForeignTokenizer

__all__ = ["ChatTemplate", "EncodedChat"]


class _Format(Protocol):
    source: str
    stop_ids: Sequence[int]

    def encode(self, messages: Sequence[Message], generation_prompt: bool = False) -> EncodedChat: ...


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        source: The Jinja template.
        stop_ids: Ids that end a response: the end of a turn, the end of a document, and those of the tokenizer.
    """

    def __init__(self, template: _Format):
        self._format = template
        self.source = template.source
        self.stop_ids: Sequence[int] = template.stop_ids

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> "ChatTemplate":
        """Return the template of a tokenizer: the project's turn format for its own, that of a published model else.

        Raises:
            UserError: The tokenizer of a published model has no chat template.
        """
        if isinstance(tokenizer, HybridTokenizer):
            return cls(OwnTemplate(tokenizer))
        return cls(ForeignTemplate(cast("ForeignTokenizer", tokenizer)))

    def encode(self, messages: Sequence[Message], generation_prompt: bool = False) -> EncodedChat:
        """Encode a conversation.

        Names of special tokens in a content are ordinary text.

        Args:
            messages: The conversation.
            generation_prompt: Append the beginning of a turn of the assistant.

        Returns:
            The ids and which of them are predicted.

        Raises:
            UserError: A role is unknown, or the order of roles is not one that the template accepts.
        """
        return self._format.encode(messages, generation_prompt)
