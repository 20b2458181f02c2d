"""The text of ids as they come: whole characters only, cut at the first stop string, with where each token stands."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from slm_jax.serve.engine import Place
from tokenizer import HybridTokenizer


class Token(NamedTuple):
    """One id of a text: what it added, and from which character of the text on."""

    id: int
    text: str
    place: Place | None
    offset: int


class Written:
    """A text that grows by ids and is handed out as far as it is certain.

    Certain is what no further id can change: no half of a character, and nothing that a stop string may begin with.
    """

    def __init__(self, tokenizer: HybridTokenizer, stops: Sequence[str] = (), offset: int = 0):
        self._decoder = tokenizer.stream_decoder()
        self._stops = stops
        self._tokens: deque[Token] = deque()
        self._pending = ""
        self._handed_out = offset  # characters
        self._decoded = offset
        self.stopped = False

    def push(self, ids: Sequence[int], places: Sequence[Place | None] = ()) -> None:
        """Take the next ids, with what the model thought of each place; after a stop string they are dropped."""
        for i, id_ in enumerate(ids):
            if self.stopped:
                return
            text = self._decoder.push(id_)
            self._tokens.append(Token(id_, text, places[i] if places else None, self._decoded))
            self._append(text)

    def _append(self, text: str) -> None:
        self._pending += text
        self._decoded += len(text)
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._pending = self._pending[: min(found)]
            end = self._handed_out + min(found)
            self._tokens = deque(token for token in self._tokens if token.offset < end)

    def finish(self) -> None:
        """No more ids will come."""
        if not self.stopped:
            self._append(self._decoder.finish())

    def take(self, whole: bool = False) -> tuple[str, list[Token]]:
        """What is certain and was not handed out before; whole: all that there is."""
        held = 0
        if not (whole or self.stopped):
            longest = min(max(map(len, self._stops), default=0) - 1, len(self._pending))
            ends = (n for n in range(longest, 0, -1) if any(s.startswith(self._pending[-n:]) for s in self._stops))
            held = next(ends, 0)
        text, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        self._handed_out += len(text)
        tokens = []
        while self._tokens and (
            whole or self.stopped or self._tokens[0].offset + len(self._tokens[0].text) <= self._handed_out
        ):
            tokens.append(self._tokens.popleft())
        return text, tokens
