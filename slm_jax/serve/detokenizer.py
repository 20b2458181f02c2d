"""Incremental detokenization: text of ids as they arrive, cut at the first stop string, with offsets of tokens."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from slm_jax.serve.requests import TokenLogprob
from slm_jax.utils.text_tokenizer import TextTokenizer


class Token(NamedTuple):
    """A token of a text.

    Attributes:
        id: Its id.
        text: The text that it added; empty for an incomplete character.
        logprob: The model's prediction at this position, if it was asked for.
        offset: Index of its first character in the text.
    """

    id: int
    text: str
    logprob: TokenLogprob | None
    offset: int


class IncrementalDetokenizer:
    """Decode ids as they arrive and release the text that no further id can change.

    Incomplete characters are held back, and so is text that may be the beginning of a stop string.

    Attributes:
        stopped: Whether a stop string has occurred. The text ends before it, and further ids are ignored.
        count: Number of ids of the text so far, those of the stop string included and later ones not.
    """

    def __init__(
        self, tokenizer: TextTokenizer, stops: Sequence[str] = (), offset: int = 0, context_ids: Sequence[int] = ()
    ):
        """Start a text.

        Args:
            tokenizer: The tokenizer.
            stops: Stop strings, none empty.
            offset: Number of characters before this text, added to the offsets of its tokens.
            context_ids: Ids before this text, which it continues.
        """
        self._decoder = tokenizer.stream_decoder(context_ids)
        self._stops = stops
        self._tokens: deque[Token] = deque()
        self._pending = ""
        self._released = offset  # characters
        self._decoded = offset
        self.stopped = False
        self.count = 0

    def append(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Append ids; those after a stop string are ignored.

        Args:
            ids: The next ids.
            logprobs: One per id, or empty.
        """
        for i, id_ in enumerate(ids):
            if self.stopped:
                return
            self.count += 1
            text = self._decoder.push(id_)
            self._tokens.append(Token(id_, text, logprobs[i] if logprobs else None, self._decoded))
            self._append_text(text)

    def _append_text(self, text: str) -> None:
        self._pending += text
        self._decoded += len(text)
        matches = [index for stop in self._stops if (index := self._pending.find(stop)) >= 0]
        if matches:
            self.stopped = True
            self._pending = self._pending[: min(matches)]
            end = self._released + min(matches)
            self._tokens = deque(token for token in self._tokens if token.offset < end)

    def finish(self) -> None:
        """Decode the remainder after the last id."""
        if not self.stopped:
            self._append_text(self._decoder.finish())

    def release(self, final: bool = False) -> tuple[str, list[Token]]:
        """Return the text that is certain and was not returned before, with its tokens.

        Args:
            final: Return all remaining text, certain or not.
        """
        everything = final or self.stopped
        length = len(self._pending) - (0 if everything else self._held_back())
        text = self._pending[:length]
        self._pending = self._pending[length:]
        self._released += len(text)
        tokens = []
        while self._tokens:
            token = self._tokens[0]
            if not everything and token.offset + len(token.text) > self._released:
                break
            tokens.append(self._tokens.popleft())
        return text, tokens

    def _held_back(self) -> int:
        """Return the number of characters at the end of the pending text that may be the start of a stop string."""
        longest = min(max(map(len, self._stops), default=0) - 1, len(self._pending))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stops):
                return length
        return 0
