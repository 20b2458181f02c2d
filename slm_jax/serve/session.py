"""A conversation of one user with an engine in the same process: `python -m slm_jax.chat`."""

import contextlib
import logging
import queue
from collections.abc import Iterator

from slm_jax.chat.messages import Message
from slm_jax.generation.settings import Sampling
from slm_jax.serve.conversation import ChatPrompt, encode_chat
from slm_jax.serve.engine import Engine
from slm_jax.serve.requests import Chunk, Request
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)


class ChatSession:
    """A conversation that grows turn by turn.

    Attributes:
        messages: All messages so far, also those that the context has no room for any more.
    """

    def __init__(self, engine: Engine, sampling: Sampling, max_tokens: int = 0, system: str = ""):
        """Begin a conversation.

        Args:
            engine: A started engine.
            sampling: Sampling settings; answer n of the session has the seed + n.
            max_tokens: Maximum number of tokens of an answer; 0: what the context has room for.
            system: The system message; empty: none.

        Raises:
            UserError: The tokenizer has no chat template.
        """
        if engine.chat_template is None:
            raise UserError(f"{engine.name} cannot chat: {engine.no_chat_reason}")
        self.messages: list[Message] = []
        self._engine = engine
        self._template = engine.chat_template
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._answers = 0
        self._left_out = 0  # messages at the beginning that the context has no room for
        self.set_system(system)

    def set_system(self, text: str) -> None:
        """Replace the system message; an empty text removes it."""
        rest = self.turns
        self.messages = [*([Message("system", text)] if text else []), *rest]

    @property
    def turns(self) -> list[Message]:
        """The messages without the system message."""
        return [message for message in self.messages if message.role != "system"]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages if message.role == "system"]
        self._left_out = 0

    def retry(self) -> Iterator[str]:
        """Answer the last message of the user again, with another seed.

        Raises:
            UserError: There is none.
        """
        if not self.turns:
            raise UserError("there is no message to answer again")
        user = next(message for message in reversed(self.messages) if message.role == "user")
        while self.messages.pop() != user:
            pass
        return self.answer(user.content)

    def answer(self, text: str) -> Iterator[str]:
        """Answer a message of the user.

        If the iterator is closed, or Ctrl-C is pressed, the answer ends there. An answer without any text is dropped
        together with the message.

        Args:
            text: The message.

        Yields:
            The text of the answer as it is generated.

        Raises:
            UserError: The message is too long for the context, or the engine has failed.
        """
        self.messages.append(Message("user", text))
        parts: list[str] = []
        try:
            for part in self._stream(self._fit()):
                parts.append(part)
                yield part
        except UserError:
            self.messages.pop()
            raise
        finally:
            if parts:
                self.messages.append(Message("assistant", "".join(parts)))
                with contextlib.suppress(UserError):  # the template hides where responses are: no prefix is kept
                    self._engine.compute_ahead(*encode_chat(self._template, self._seen(), generation_prompt=False))
            elif self.messages and self.messages[-1] == Message("user", text):
                self.messages.pop()

    def _seen(self) -> list[Message]:
        """Return the messages that the context has room for."""
        system = [message for message in self.messages if message.role == "system"]
        return [*system, *self.turns[self._left_out :]]

    def _fit(self) -> ChatPrompt:
        """Return the prompt; leave out the oldest turns if an answer would have no room after it, and log that."""
        context = self._engine.context
        room = min(self._max_tokens or context // 4, context // 4)
        before = self._left_out
        prompt = encode_chat(self._template, self._seen())
        while len(prompt.ids) + room > context and len(self.turns) - self._left_out > 2:
            self._left_out += 2
            prompt = encode_chat(self._template, self._seen())
        if len(prompt.ids) >= context:
            self._left_out = before
            raise UserError(f"the message is too long: {len(prompt.ids):,} tokens, the context has {context:,}")
        if self._left_out > before:
            turns = (self._left_out - before) // 2
            logger.info(
                "note: the context of %d tokens is full: the model no longer sees the %s",
                context,
                "oldest turn" if turns == 1 else f"{turns} oldest turns",
            )
        return prompt

    def _stream(self, prompt: ChatPrompt) -> Iterator[str]:
        """Yield the text of an answer; the engine's slot is free when this ends, however it does."""
        chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        rest = self._engine.context - len(prompt.ids)
        max_tokens = min(self._max_tokens or rest, rest)
        sampling = self._sampling.with_seed_offset(self._answers)
        request = Request(prompt.ids, max_tokens, sampling, chunks.put, boundaries=prompt.boundaries)
        self._answers += 1
        decoder = self._engine.run.tokenizer.stream_decoder(prompt.ids)
        self._engine.submit([request])
        last = ""
        try:
            while not last:
                chunk = chunks.get()
                last = chunk.finish_reason
                if text := "".join(map(decoder.push, chunk.ids)):
                    yield text
            if last == "error":
                raise UserError(f"the engine has failed: {self._engine.failure}")
            if text := decoder.finish():
                yield text
        finally:
            request.finish("cancelled")
            while not last:
                last = chunks.get().finish_reason
