"""Replies of a model to conversations: greedy, in batches, with the chat template of its tokenizer."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.data.turns import boundary_ids
from slm_jax.generation.decode import generate_ids
from slm_jax.generation.sampling import Sampling
from slm_jax.model.transformer import Transformer
from slm_jax.utils.text_tokenizer import TextTokenizer, decode_continuation

MAX_TOKENS = 96  # of a reply; answers of python-chat have at most about 60
_BATCH = 64  # conversations at a time


class Reply(NamedTuple):
    """The reply to a conversation.

    Attributes:
        text: Its text.
        ended: True if the model ended the turn itself.
        special: Number of tokens in it that begin or end a turn, besides the one that ends it.
        tokens: Number of its tokens, the one that ends it included.
    """

    text: str
    ended: bool
    special: int
    tokens: int


Conversation = tuple[Message, ...]
ReplyFunction = Callable[[Sequence[Conversation]], list[Reply]]


class Replier:
    """Generates replies, each conversation once: tasks that ask for the same ones share them."""

    def __init__(self, model: Transformer, tokenizer: TextTokenizer, context: int, max_tokens: int = MAX_TOKENS):
        """Prepare the template; nothing is computed.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            context: Maximum number of tokens that attention sees.
            max_tokens: Maximum number of tokens of a reply.

        Raises:
            UserError: The tokenizer has no chat template.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._template = ChatTemplate.of(tokenizer)
        self._boundaries = boundary_ids(tokenizer)
        self._context = context
        self._max_tokens = max_tokens
        self._replies: dict[Conversation, Reply] = {}

    def reply(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """Return the reply to each conversation; no token is suppressed, so misplaced role tokens show up.

        Args:
            conversations: Messages that end with one of the user.

        Raises:
            UserError: The order of roles is invalid.
        """
        missing = [each for each in dict.fromkeys(conversations) if each not in self._replies]
        prompts = [self._template.encode(each, generation_prompt=True).ids.tolist() for each in missing]
        order = sorted(range(len(missing)), key=lambda i: len(prompts[i]))  # little padding
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            padded = batch + batch[:1] * (_BATCH - len(batch))  # one shape to compile
            rows = generate_ids(
                self._model, [prompts[i] for i in padded], self._max_tokens, Sampling(temperature=0), self._context,
                stop=self._template.stop_ids,
            )  # fmt: skip
            for i, row in zip(batch, rows, strict=False):
                self._replies[missing[i]] = self._to_reply(prompts[i], row)
        return [self._replies[each] for each in conversations]

    def _to_reply(self, prompt: list[int], row: list[int]) -> Reply:
        ended = row[-1] in self._template.stop_ids
        kept = row[:-1] if ended else row
        special = sum(id_ in self._boundaries for id_ in kept)
        return Reply(decode_continuation(self._tokenizer, prompt, kept), ended, special, len(row))
