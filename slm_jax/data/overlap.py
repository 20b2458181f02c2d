"""Measure how much held-out text also occurs in training text: whole documents, and passages of 50 characters and more.

All windows of 50 characters of the held-out text are hashed; the training text is read once, block by block, and each
of its windows is looked up. What is found is verified character by character. Runs of white space count as one space.
"""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.data.corpus.corpus import Corpus, open_corpus
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.data.turns import Piece, boundary_ids, stream_pieces
from slm_jax.utils.files import replace_text
from slm_jax.utils.formatting import plural
from slm_jax.utils.text_tokenizer import TextTokenizer
from slm_jax.utils.text_windows import code_points, normalize_space, window_hashes

logger = logging.getLogger(__name__)

WINDOW = 50  # characters of the shortest match
OVERLAP = "overlap.json"  # in the folder of a corpus
_MAX_HELD_OUT = 4_000_000  # bytes of held-out text that are compared; of more, documents at equal distances
_BLOCK = 1 << 18  # tokens of training text that are decoded together
_LARGE = 20_000_000  # tokens of training text that take more than a few seconds
_TABLE_BITS = 24


class HeldOutText(NamedTuple):
    """A held-out document.

    Attributes:
        text: The text; for an instruction, prompt and response; for a conversation, the contents of its messages.
        predicted: The text that is predicted: all of it, or the end of it, the response.
        spans: For a conversation, the responses instead: start and end of each in the text with single spaces.
    """

    text: str
    predicted: str
    spans: tuple[tuple[int, int], ...] | None = None


class Overlap(NamedTuple):
    """Held-out text that also occurs in training text.

    Attributes:
        documents: Held-out documents that were compared.
        whole: Documents of these that a training document contains; if shorter than 50 characters, is equal to.
        characters: Characters of their predicted text, each run of white space counted as one.
        matched: Characters of these in passages of at least 50 characters that occur in training text.
        held_out: All held-out documents.
    """

    documents: int
    whole: int
    characters: int
    matched: int
    held_out: int

    def summary(self) -> str:
        """Return one line."""
        sample = ""
        if self.documents < self.held_out:
            sample = f" (measured on {self.documents:,} of {plural(self.held_out, 'held-out document')})"
        return (
            f"held-out text that is also in training text: {self.whole / max(self.documents, 1):.1%} of the documents, "
            f"{self.matched / max(self.characters, 1):.1%} of the characters in matches of {WINDOW} and more{sample}"
        )


class _Index:
    """The windows of held-out documents, and which of them were found."""

    def __init__(self, documents: Sequence[HeldOutText]):
        texts = [normalize_space(document.text) for document in documents]
        arrays = [code_points(text) for text in texts]
        self.points = np.concatenate([np.zeros(0, np.uint32), *arrays])
        self.ends = np.cumsum([array.size for array in arrays], dtype=int)
        self.lengths = np.diff(self.ends, prepend=0)
        self.predicted = np.zeros(self.points.size, bool)
        for document, end, length in zip(documents, self.ends.tolist(), self.lengths.tolist(), strict=True):
            spans = document.spans
            if spans is None:
                spans = ((length - len(normalize_space(document.predicted)), length),)
            for start, stop in spans:
                self.predicted[end - length + start : end - length + stop] = True
        hashes, starts = _windows(self.points, self.ends)
        self.hashes, first, self._inverse, counts = np.unique(
            hashes, return_index=True, return_inverse=True, return_counts=True
        )
        self._starts = starts
        self._example = starts[first]  # a window with each hash
        self.found = np.zeros(self.hashes.size, bool)
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[_slots(self.hashes)] = True
        self.whole = np.zeros(len(texts), bool)
        self._short: dict[str, list[int]] = {}  # documents without a window
        for number, text in enumerate(texts):
            if len(text) < WINDOW:
                self._short.setdefault(text, []).append(number)
        self._anchors = self._find_anchors(counts)

    def _find_anchors(self, counts: np.ndarray) -> dict[int, list[tuple[int, int]]]:
        """Return {hash: [(document, offset)]} with the rarest window of each document, by which it is searched for."""
        anchors: dict[int, list[tuple[int, int]]] = {}
        rarity = counts[self._inverse]
        bounds = np.searchsorted(self._starts, [0, *self.ends])
        for number, (a, b) in enumerate(itertools.pairwise(bounds)):
            if a < b:
                at = int(a + np.argmin(rarity[a:b]))
                begin = int(self.ends[number] - self.lengths[number])
                anchor = (number, int(self._starts[at]) - begin)
                anchors.setdefault(int(self._inverse[at]), []).append(anchor)
        return anchors

    def search(self, texts: Sequence[str]) -> None:
        """Mark what occurs in training documents."""
        normalized = [normalize_space(text) for text in texts]
        for text in normalized:
            if len(text) < WINDOW and text in self._short:
                self.whole[self._short[text]] = True
        points = np.concatenate([np.zeros(0, np.uint32), *map(code_points, normalized)])
        ends = np.cumsum([len(text) for text in normalized], dtype=int)
        hashes, starts = _windows(points, ends)
        if not (hashes.size and self.hashes.size):
            return
        hits = np.flatnonzero(self._table[_slots(hashes)])
        at = np.minimum(np.searchsorted(self.hashes, hashes[hits]), self.hashes.size - 1)
        is_equal = self.hashes[at] == hashes[hits]
        hits, at = hits[is_equal], at[is_equal]
        self._search_whole(points, ends, starts[hits], at)
        new = np.flatnonzero(~self.found[at])
        at, first = np.unique(at[new], return_index=True)
        columns = np.arange(WINDOW)
        for part in np.array_split(np.arange(at.size), at.size // 100_000 + 1):
            held_out = self.points[self._example[at[part], None] + columns]
            trained = points[starts[hits[new[first[part]]]][:, None] + columns]
            self.found[at[part]] = (held_out == trained).all(axis=1)

    def _search_whole(self, points: np.ndarray, ends: np.ndarray, starts: np.ndarray, at: np.ndarray) -> None:
        """Mark the documents that are in training documents as a whole, from the windows that occur in both."""
        is_anchor = np.isin(at, np.fromiter(self._anchors, int, len(self._anchors)))
        for start, window in zip(starts[is_anchor].tolist(), at[is_anchor].tolist(), strict=True):
            for number, offset in self._anchors[window]:
                begin, size = start - offset, int(self.lengths[number])
                document = int(np.searchsorted(ends, start, side="right"))
                is_inside = begin >= (ends[document - 1] if document else 0) and begin + size <= ends[document]
                if is_inside and not self.whole[number]:
                    end = int(self.ends[number])
                    self.whole[number] = np.array_equal(points[begin : begin + size], self.points[end - size : end])

    def matched(self) -> int:
        """Return the number of predicted characters in windows that were found."""
        starts = self._starts[self.found[self._inverse]]
        others = np.cumsum(np.append(0, ~self.predicted))  # characters before each that are not predicted
        starts = starts[others[starts + WINDOW] == others[starts]]
        change = np.zeros(self.points.size + 1, int)
        np.add.at(change, starts, 1)
        np.add.at(change, starts + WINDOW, -1)
        return int(np.count_nonzero(np.cumsum(change)))


def _slots(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)


def _windows(points: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (hashes, starts) of the windows within one document."""
    hashes = window_hashes(points, WINDOW)
    document = np.repeat(np.arange(ends.size), np.diff(ends, prepend=0))
    starts = np.flatnonzero(document[: hashes.size] == document[document.size - hashes.size :])
    return hashes[starts], starts


def measure_overlap(
    held_out: Sequence[HeldOutText], train: Iterable[Sequence[str]], total: int | None = None
) -> Overlap:
    """Measure how much of held-out documents occurs in training documents.

    Args:
        held_out: The held-out documents; all are held in memory.
        train: Blocks of training documents.
        total: The number of held-out documents, if these are a sample.
    """
    index = _Index(held_out)
    for texts in train:
        index.search(texts)
    characters = int(np.count_nonzero(index.predicted))
    whole = int(np.count_nonzero(index.whole))
    return Overlap(len(held_out), whole, characters, index.matched(), len(held_out) if total is None else total)


def corpus_overlap(corpora: Sequence[Corpus], tokenizer: TextTokenizer, earlier: Sequence[Corpus] = ()) -> Overlap:
    """Measure how much held-out text of corpora occurs in the training text of any of them, or of earlier ones.

    Args:
        corpora: The corpora of a run.
        tokenizer: The tokenizer of all corpora.
        earlier: The corpora of the runs that the weights come from.
    """
    size = sum(corpus.validation.num_bytes for corpus in corpora)
    step = max(1, -(-size // _MAX_HELD_OUT))
    held_out = [each for corpus in corpora for each in _held_out_documents(corpus.validation, tokenizer, step)]
    streams = [part.train for each in (*corpora, *earlier) for part in each.parts]
    if (tokens := sum(map(len, streams))) > _LARGE:
        logger.info("comparing %s of held-out text with %s", plural(len(held_out), "document"), plural(tokens, "token"))
    blocks = (texts for stream in streams for texts, _ in text_blocks(stream, tokenizer))
    return measure_overlap(held_out, blocks, sum(corpus.validation.num_documents for corpus in corpora))


def _held_out_documents(stream: TokenStream, tokenizer: TextTokenizer, step: int) -> Iterator[HeldOutText]:
    """Yield every `step`-th document of a stream."""
    ends = stream.ends
    prompts = stream.documents["prompt"].astype(int)
    boundaries = boundary_ids(tokenizer) if stream.has_conversations else ()
    for number in range(0, ends.size, step):
        if stream.has_conversations:
            start = int(ends[number - 1]) if number else 0
            yield _conversation(stream_pieces(stream, start, int(ends[number]), tokenizer, boundaries), stream)
            continue
        ids = stream[ends[number - 1] if number else 0 : ends[number]].tolist()
        text = _decode(ids, tokenizer)
        yield HeldOutText(text, _decode(ids[prompts[number] :], tokenizer) if prompts[number] else text)


def _conversation(texts: Sequence[Piece], stream: TokenStream) -> HeldOutText:
    spans = []
    text = ""
    end = 0
    for piece in texts:
        text = f"{text} {normalize_space(piece.text)}".strip()
        if len(text) > end and (piece.is_response or not stream.has_prompts):
            spans.append((end + 1 if end else 0, len(text)))
        end = len(text)
    return HeldOutText(text, text, tuple(spans))


def text_blocks(stream: TokenStream, tokenizer: TextTokenizer) -> Iterator[tuple[list[str], int]]:
    """Yield the documents of a stream in blocks, each with the number of tokens of the stream up to its end."""
    ends = stream.ends
    boundaries = boundary_ids(tokenizer) if stream.has_conversations else ()
    first = 0
    while first < ends.size:
        start = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, start + _BLOCK, side="right")))
        if stream.has_conversations:
            spans = itertools.pairwise([start, *ends[first:last].tolist()])
            texts = [stream_pieces(stream, a, b, tokenizer, boundaries) for a, b in spans]
            yield [" ".join(piece.text for piece in each) for each in texts], int(ends[last - 1])
            first = last
            continue
        ids = stream[start : int(ends[last - 1])]
        documents = np.split(ids, ends[first : last - 1] - start)
        yield [_decode(document.tolist(), tokenizer) for document in documents], int(ends[last - 1])
        first = last


def _decode(ids: list[int], tokenizer: TextTokenizer) -> str:
    """Return the text of a document, without its <EOS>."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids)


def stored_overlap(
    folder: Path, tokenizer: TextTokenizer, earlier: Sequence[Path] = (), max_tokens: int = 0
) -> Overlap | None:
    """Return the overlap of a corpus; it is measured if it is not stored yet, and stored in the folder of the corpus.

    Args:
        folder: The folder of the corpus or mixture.
        tokenizer: The tokenizer of all corpora.
        earlier: The folders of the corpora that the weights were trained on before.
        max_tokens: Measure only if there are at most this many training tokens; 0: always.

    Returns:
        None if there are too many training tokens.

    Raises:
        UserError: A corpus cannot be read.
    """
    corpora = [open_corpus(each, tokenizer, verify=False) for each in (folder, *earlier)]
    key = [corpus.fingerprint for corpus in corpora]
    try:
        saved = json.loads((folder / OVERLAP).read_text(encoding="utf-8"))
        if saved.pop("corpora") == key:
            return Overlap(**saved)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # not measured yet
    if max_tokens and sum(len(corpus.train) for corpus in corpora) > max_tokens:
        return None
    overlap = corpus_overlap(corpora[:1], tokenizer, corpora[1:])
    content: dict[str, Any] = {"corpora": key, **overlap._asdict()}
    try:
        replace_text(folder / OVERLAP, json.dumps(content, indent=1) + "\n")
    except OSError:  # a folder that cannot be written to: it is measured again next time
        return overlap
    return overlap
