"""Token streams: the documents of a split, one after another, in memory-mapped shards."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from slm_jax.data.corpus.marks import is_marked, without_marks
from slm_jax.data.corpus.verification import ShardVerifier
from slm_jax.utils.text_tokenizer import TextTokenizer

DOCUMENT_DTYPE = np.dtype(
    [
        ("end", "<i8"),  # index in the shard after its <EOS>, or after the last token of one that was cut
        ("digest", "<u8"),  # see `Document.digest`; of the whole document, also where it was cut
        ("bytes", "<u4"),  # UTF-8 bytes of the text that is predicted
        ("prompt", "<u4"),  # number of its first tokens that are not predicted
        ("rest", "<i4"),  # bytes beyond those that `byte_table` gives to its tokens; nearly always 0
        ("unused", "<u4"),  # TURNS; this name is a part of the file format
    ]
)
TURNS = "unused"
"""The field with the number of the assistant's turns; 0 unless the document is a conversation."""


class Shard(NamedTuple):
    """A part of a token stream.

    Attributes:
        tokens: Token ids as they are stored, uint16 or uint32 [N].
        documents: DOCUMENT_DTYPE [D].
        prompts: Whether a document has tokens that are not predicted.
        verifier: Verifies what is read for the first time; None: that was done, or is not wanted.
        marked: Whether the ids have marks, see `marks`.
    """

    tokens: np.ndarray
    documents: np.ndarray
    prompts: bool = False
    verifier: ShardVerifier | None = None
    marked: bool = False

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Return token ids without marks: a view of the memory map unless they have marks."""
        tokens = self.tokens[start:stop]
        return without_marks(tokens) if self.marked else tokens

    def verified_documents(self) -> np.ndarray:
        """Return the documents.

        Raises:
            UserError: They are damaged.
        """
        if self.verifier is not None:
            self.verifier.verify_documents()
        return self.documents


class TokenStream:
    """The N tokens of the D documents of a split, over one or more shards; `stream[a:b]` reads token ids.

    Attributes:
        shards: The shards.
        has_prompts: Whether some tokens are not predicted.
        has_conversations: Whether it has conversations, whose turns of the assistant `response_mask` returns.
    """

    def __init__(self, shards: Sequence[Shard], byte_table: np.ndarray | None = None):
        """Join shards to a stream.

        Args:
            shards: The shards in order.
            byte_table: See the function `byte_table`; needed by `num_bytes_between`.
        """
        self.shards = list(shards)
        self.has_prompts = any(shard.prompts for shard in self.shards)
        self.has_conversations = any(shard.marked for shard in self.shards)
        self._byte_table = byte_table
        self._starts = np.cumsum([0, *(shard.tokens.size for shard in self.shards)])  # first token of each shard, and N

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(len(self))
        arrays = [self.shards[i].ids(a, b) for i, a, b in self._spans(start, stop)]
        if len(arrays) == 1:
            return arrays[0]
        return np.concatenate([np.zeros(0, np.uint16), *arrays])

    @property
    def num_documents(self) -> int:
        """D."""
        return sum(shard.documents.size for shard in self.shards)

    @property
    def num_turns(self) -> int:
        """Turns of the assistant in conversations."""
        return sum(int(shard.verified_documents()[TURNS].sum()) for shard in self.shards if shard.marked)

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all text that is predicted."""
        return sum(int(shard.verified_documents()["bytes"].sum()) for shard in self.shards)

    @property
    def ends(self) -> np.ndarray:
        """int64 [D]: the index after the <EOS> of each document."""
        ends = [
            shard.verified_documents()["end"] + start for shard, start in zip(self.shards, self._starts, strict=False)
        ]
        return np.concatenate([np.zeros(0, np.int64), *ends])

    @property
    def documents(self) -> np.ndarray:
        """DOCUMENT_DTYPE [D]; `end` counts from the beginning of the document's shard."""
        return np.concatenate([np.zeros(0, DOCUMENT_DTYPE), *(shard.verified_documents() for shard in self.shards)])

    def part(self, first: int, last: int) -> "TokenStream":
        """Return the stream of the shards first..last-1."""
        return TokenStream(self.shards[first:last], self._byte_table)

    def head(self, max_tokens: int) -> "TokenStream":
        """Return the first documents of the stream.

        Args:
            max_tokens: As many documents as fit in this many tokens, at least one; 0: all.
        """
        if not max_tokens or len(self) <= max_tokens:
            return self
        kept: list[Shard] = []
        for shard, start in zip(self.shards, self._starts, strict=False):
            count = int(np.searchsorted(shard.verified_documents()["end"] + start, max_tokens, side="right"))
            if not kept:
                count = max(count, 1)
            if count:
                documents = shard.documents[:count]
                kept.append(shard._replace(tokens=shard.tokens[: documents["end"][-1]], documents=documents))
            if count < shard.documents.size:
                break
        return TokenStream(kept, self._byte_table)

    def prompt_mask(self, start: int, stop: int) -> np.ndarray | None:
        """Return which of the tokens start..stop-1 are not predicted: those of prompts, and in a conversation those
        outside the turns of the assistant.

        Returns:
            bool [stop - start]; None if all tokens of the stream are predicted.
        """
        if not self.has_prompts:
            return None
        mask = np.zeros(stop - start, bool)
        for index, span_start, span_stop in self._spans(start, stop):
            shard = self.shards[index]
            if not shard.prompts:
                continue
            shard_start = self._starts[index] - start  # in the mask
            if shard.marked:
                at = shard_start + span_start
                mask[at : at + span_stop - span_start] = is_marked(shard.tokens[span_start:span_stop])
            for first, prompt, end in self._overlapping(index, span_start, span_stop):
                prompt_end = min(first + prompt, end)
                mask[max(first + shard_start, 0) : max(prompt_end + shard_start, 0)] = True
        return mask

    def response_mask(self, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens start..stop-1 are responses, also where all tokens are predicted.

        Returns:
            bool [stop - start]: in conversations the turns of the assistant, else what is predicted.
        """
        prompt = self.prompt_mask(start, stop)
        mask = np.ones(stop - start, bool) if prompt is None else ~prompt
        for index, span_start, span_stop in self._spans(start, stop):
            shard = self.shards[index]
            if shard.marked:
                at = int(self._starts[index]) + span_start - start
                mask[at : at + span_stop - span_start] &= ~is_marked(shard.tokens[span_start:span_stop])
        return mask

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return the indices of those of the tokens start..stop-1 with which a document begins, int64 [n]."""
        starts = [np.zeros(0, np.int64)]
        for index, span_start, span_stop in self._spans(start, stop):
            ends = self.shards[index].documents["end"]
            first, last = np.searchsorted(ends, (span_start, span_stop))
            if span_start == 0:
                starts.append(self._starts[index : index + 1])
            starts.append(ends[first:last] + self._starts[index])  # a document begins where another one ends
        return np.concatenate(starts).astype(np.int64)

    def num_bytes_between(self, start: int, stop: int) -> int:
        """Return the UTF-8 bytes of text that the tokens start..stop-1 encode, without prompts.

        Summed over all tokens of a document, this is exactly the length of its predicted text.
        """
        assert self._byte_table is not None
        tokens = self[start:stop]
        prompt = self.prompt_mask(start, stop)
        if prompt is not None:
            tokens = tokens[~prompt]
        total = int(self._byte_table[tokens].sum())
        for index, span_start, span_stop in self._spans(start, stop):
            documents = self.shards[index].documents
            first, last = np.searchsorted(documents["end"], (span_start, span_stop), side="right")
            total += int(documents["rest"][first:last].sum())  # counted with the <EOS>
        return total

    def _overlapping(self, index: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first token, prompt tokens, end) of the documents of a shard that overlap start..stop-1."""
        documents = self.shards[index].documents
        first = int(np.searchsorted(documents["end"], start, side="right"))
        last = int(np.searchsorted(documents["end"], stop, side="left")) + 1
        begin = int(documents["end"][first - 1]) if first else 0
        ends = documents["end"][first:last].tolist()
        prompts = documents["prompt"][first:last].tolist()
        for end, prompt in zip(ends, prompts, strict=True):
            yield begin, prompt, end
            begin = end

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, start, stop within the shard) of the spans that make up start..stop-1.

        Raises:
            UserError: Tokens or documents that are read for the first time are damaged.
        """
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            shard_start = int(self._starts[index])
            end = min(stop, int(self._starts[index + 1]))
            verifier = self.shards[index].verifier
            if verifier is not None:
                verifier.verify(start - shard_start, end - shard_start)
            yield index, start - shard_start, end - shard_start
            start = end
            index += 1


def heads(streams: Sequence[TokenStream], max_tokens: int) -> list[TokenStream]:
    """Return the first documents of each stream, in proportion to the lengths of the streams.

    Args:
        streams: The streams, such as the held-out texts of a mixture.
        max_tokens: As many documents as fit in this many tokens of all streams together, at least one of each; 0: all.
    """
    total = sum(map(len, streams))
    if not max_tokens or total <= max_tokens:
        return list(streams)
    return [stream.head(max(1, max_tokens * len(stream) // total)) for stream in streams]


def byte_table(tokenizer: TextTokenizer) -> np.ndarray:
    """Return the UTF-8 bytes of the text of each token on its own, int32 [V]; 0 for special tokens and case marks."""
    return np.array(list(map(len, tokenizer.token_bytes)), np.int32)
