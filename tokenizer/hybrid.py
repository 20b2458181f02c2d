"""HybridTokenizer: count text, freeze a vocabulary, encode, decode, look inside."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, overload

from tokenizer import storage
from tokenizer.decoding.decoder import Decoder, StreamDecoder, raise_unknown_id
from tokenizer.encoding.encoder import Encoder
from tokenizer.encoding.segment import join_phrases
from tokenizer.errors import TokenizerError
from tokenizer.forms import MANY, checked_text, flat_ids, run_lengths
from tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:  # NumPy takes longer to import than a saved tokenizer to load: only what needs it imports it
    import numpy as np

    from tokenizer.encoding.phrases import PhraseJoiner
    from tokenizer.inspect.reports import Explanation, Merges, Segments, Status
    from tokenizer.learning.counting import KeyCounts

DEFAULT_VOCAB_SIZE = 8192
Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total) now and then during long work."""


class HybridTokenizer:
    """A lossless tokenizer of words, merges and bytes that can explain itself.

    Count text (`add_text`, `add_file`, `add_files`), `freeze_vocab` once, then `encode` and `decode`:
    ``decode(encode(s)) == s`` for every str. Or start from `load` or `pretrained`. A frozen tokenizer never changes
    and may be used from several threads.

    Args:
        lowercase: share one entry between "the", "The" and "THE" by case marks, losslessly; False keeps case in the
            entries.
        byte_limit: UTF-8 bytes of the longest base token, 1 to 16.
    """

    def __init__(self, lowercase: bool = True, byte_limit: int = 4) -> None:
        if not isinstance(byte_limit, int) or isinstance(byte_limit, bool) or not 1 <= byte_limit <= 16:
            raise TokenizerError(f"byte_limit is {byte_limit!r}: it must be a whole number from 1 to 16")
        if not isinstance(lowercase, bool):
            raise TokenizerError(f"lowercase is {lowercase!r}: it must be True or False")
        self.lowercase = lowercase
        self.byte_limit = byte_limit
        self._counts: KeyCounts | None = None
        self._frozen: Vocabulary | None = None

    # Counting

    def add_text(self, text: str) -> None:
        """Count a text. Raises TokenizerError when the vocabulary is frozen or `text` is no str."""
        if not isinstance(text, str):
            raise TokenizerError(f"add_text takes a str, not {type(text).__name__}")
        self._open_counts().add_text(text)

    def add_file(self, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
        """Count a UTF-8 text file of any size. Raises TokenizerError when it cannot be read."""
        self._add_paths([os.fspath(path)], 1, progress)

    def add_files(
        self, patterns: str | Iterable[str], processes: int = 1, progress: Progress | None = None
    ) -> list[str]:
        """Count the files that a glob pattern (``**`` reaches all folders below) or several match; return their paths.

        `processes` > 1 counts in so many processes, with the same result. Raises TokenizerError when nothing matches
        or all files are empty.
        """
        from tokenizer.files import matching_files

        if not isinstance(processes, int) or processes < 1:
            raise TokenizerError(f"processes is {processes!r}: it must be 1 or more")
        paths = matching_files(patterns)
        self._add_paths(paths, processes, progress)
        return paths

    def _add_paths(self, paths: list[str], processes: int, progress: Progress | None) -> None:
        from tokenizer.learning.counting import count_files

        counts = self._open_counts()
        report = None if progress is None else (lambda done, total: progress("bytes counted", done, total))
        for shard in count_files(paths, processes, report):
            counts.merge(shard)

    def _open_counts(self) -> KeyCounts:
        if self._frozen is not None:
            raise TokenizerError("the vocabulary is frozen: make a new HybridTokenizer to count more text")
        if self._counts is None:
            from tokenizer.learning.counting import KeyCounts

            self._counts = KeyCounts()
        return self._counts

    # Learning

    def freeze_vocab(
        self,
        k_bases: int | None = None,
        max_merges: int | None = None,
        *,
        vocab_size: int | None = None,
        min_freq: int = 2,
        score: str = "freq",
        phrases: float = 0.0,
        boundaries: str = "words",
        note: str = "",
        progress: Progress | None = None,
    ) -> None:
        """Learn the vocabulary from what was counted, once; afterwards the tokenizer encodes and decodes.

        Args:
            k_bases: take so many of the most common words of at most `byte_limit` bytes as base tokens (fewer when
                there are fewer); by default every entry that is such a word counts as one.
            max_merges: learn at most so many merges, phrases included.
            vocab_size: ids in all, special tokens and bytes included; by default 8192 unless `max_merges` says
                otherwise. Fewer come out when the text does not offer so many.
            min_freq: occurrences that a base token or merge needs, at least 1.
            score: "freq" (how often a pair occurs; best), "freq_pmi" (times the root of the pointwise mutual
                information), "pmi" (PMI × log(1 + freq), which prefers rare pairs: for comparison).
            phrases: the share (0 to 0.5) of the learned entries that are phrases, entries that span words (and, with
                boundaries="spaces", anything else): fewer tokens for the same text, but each stands for more
                different things; 0 for none. About 0.15 shortens most at 8,192 ids, 0.3 at 32,768.
            boundaries: where merges stop. "words": between letters, digits and punctuation. "spaces": only at white
                space, so that "him," can be one token; 3 to 5 % fewer tokens, but small models trained on them end
                worse (1.43 against 1.40 bits per byte in the same steps).
            note: a line kept in the file, for example about the text it was learned from.
            progress: called as progress(what, done, total).

        Raises:
            TokenizerError: frozen already, nothing counted, or options that are impossible.
        """
        from tokenizer.learning.learn import LearnOptions, learn_vocabulary

        counts = self._open_counts()
        if not counts.keys:
            raise TokenizerError("nothing was counted: call add_text, add_file or add_files before freeze_vocab")
        if vocab_size is None and max_merges is None:
            vocab_size = DEFAULT_VOCAB_SIZE
        options = LearnOptions(
            self.lowercase, self.byte_limit, vocab_size, k_bases, max_merges, min_freq, score, phrases, boundaries
        )
        options.check()
        if not isinstance(note, str):
            raise TokenizerError(f"note is {note!r}: it must be a str")
        vocabulary = learn_vocabulary(counts.keys, [text for _, text in counts.sample], options, progress)
        self._frozen = replace(vocabulary, note=note)
        self._counts = None

    # Encoding

    @overload
    def encode(self, text: str, mode: Literal["flat"] = "flat") -> list[int]: ...

    @overload
    def encode(self, text: str, mode: Literal["rle"]) -> list[tuple[int, int]]: ...

    def encode(self, text: str, mode: str = "flat") -> list[int] | list[tuple[int, int]]:
        """The ids of a text: "flat" is list[int], "rle" list[(id, how often in a row)]; never special tokens."""
        if mode not in ("flat", "rle"):
            raise TokenizerError(f"mode is {mode!r}: it must be 'flat' or 'rle'")
        ids = self._ids(text)
        return ids if mode == "flat" else run_lengths(ids)

    def _ids(self, text: str) -> list[int]:
        data = self._encoder.ids(checked_text(text, "encode"))
        if len(data) > 4 * MANY and self._vocabulary.phrases:
            return self._joined(data).tolist()
        ids = array("i")
        ids.frombytes(data)
        return join_phrases(ids.tolist(), self._vocabulary)

    def _joined(self, data: bytes) -> np.ndarray:
        """The ids in these bytes as an array, phrases joined."""
        import numpy as np

        ids = np.frombuffer(data, dtype=np.int32)
        return self._joiner.join(ids) if self._vocabulary.phrases else ids

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text as int32 [T]: the fast way for long texts."""
        import numpy as np

        return np.array(self._joined(self._encoder.ids(checked_text(text, "encode_array"))), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str], max_len: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The ids of several texts: int32 [B, T], padded with <PAD> at the end, and the mask bool [B, T], True at ids.

        T is `max_len`, to which longer texts are cut, or without it the length of the longest text.
        """
        import numpy as np

        if max_len is not None and (not isinstance(max_len, int) or max_len < 1):
            raise TokenizerError(f"max_len is {max_len!r}: it must be a whole number of at least 1")
        flat, lengths = self._flat_ids_of(texts, "encode_batch")
        width = max_len or int(lengths.max(initial=0))
        mask = np.arange(width) < lengths[:, None]
        ids = np.zeros(mask.shape, dtype=np.int32)
        places = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids[mask] = flat[places < width]
        return ids, mask

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of several texts, each int32 [T]: `encode_array` of each, in less time where texts are short."""
        import numpy as np

        flat, lengths = self._flat_ids_of(texts, "encode_arrays")
        return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []

    def _flat_ids_of(self, texts: Sequence[str], method: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of several texts one behind another (int32), and how many each text has (int64)."""
        import numpy as np

        if isinstance(texts, str):
            raise TokenizerError(f"{method} takes several texts: put the one text in a list")
        rows = self._encoder.ids_of_many([checked_text(text, method) for text in texts])
        lengths = np.array([len(row) // 4 for row in rows], dtype=np.int64)
        flat = np.frombuffer(b"".join(rows), dtype=np.int32)
        if self._vocabulary.phrases:
            flat, lengths = self._joiner.join_rows(flat, lengths, border=self.vocab_size)
        return flat, lengths

    def count(self, text: str) -> int:
        """How many ids `encode` gives for a text."""
        return len(self._ids(text))

    # Decoding

    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        """The text of ids: flat (list, tuple, int array [T]) or run-length pairs. The exact inverse of `encode`.

        Special tokens are left out, or shown by name with ``skip_special_tokens=False``. Bytes that are no UTF-8,
        which a model may produce, become U+FFFD. Raises TokenizerError for what is no id.
        """
        decoder = self._decoder if skip_special_tokens else self._showing_decoder
        size = self._vocabulary.size
        flat = flat_ids(ids)
        for id_ in (min(flat), max(flat)) if isinstance(flat, list) and flat else ():
            if not 0 <= id_ < size:
                raise_unknown_id(id_, size)
        if isinstance(flat, list):
            return decoder.to_text(flat)
        for id_ in (int(flat.min()), int(flat.max())):
            if not 0 <= id_ < size:
                raise_unknown_id(id_, size)
        return decoder.array_to_text(flat)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes ids one by one: the texts it returns, joined, are `decode` of all ids."""
        return StreamDecoder(self._decoder)

    # Looking inside

    @property
    def is_frozen(self) -> bool:
        """Whether there is a vocabulary."""
        return self._frozen is not None

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self._vocabulary.size

    @cached_property
    def token2id(self) -> dict[str, int]:
        """{name: id}; names are the texts of the entries, ``<PAD>`` … for special tokens, ``<0xE2>`` for bytes."""
        names = self._vocabulary.names
        return dict(zip(reversed(names), range(len(names) - 1, -1, -1), strict=True))

    @cached_property
    def id2token(self) -> dict[int, str]:
        """{id: name}, the inverse of `token2id`."""
        return dict(enumerate(self._vocabulary.names))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the content: equal means the same ids for every text."""
        return storage.fingerprint(self._vocabulary)

    @cached_property
    def kinds(self) -> list[str]:
        """The kind of each id, [V]; see `tokenizer.reports.Segment`."""
        return [self._vocabulary.kind(id_) for id_ in range(self.vocab_size)]

    def segment(self, text: str) -> Segments:
        """The tokens of a text as (kind, text, id); see `tokenizer.reports.Segment` for the kinds."""
        from tokenizer.inspect.inspection import segment

        return segment(self._vocabulary, self._ids(text))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """For each id of `encode` the characters [start, end) of the text that it stands for.

        A case mark has no width. Byte tokens that make up one character together all have the place of that character.
        """
        from tokenizer.inspect.inspection import offsets

        return offsets(self._vocabulary, self._ids(text))

    def explain_token(self, token: str | int) -> Explanation:
        """How a token (name or id), or any text, is made, down to the bytes."""
        from tokenizer.inspect.inspection import explain

        if isinstance(token, str):
            id_ = self.token2id.get(token)
            ids = [id_] if id_ is not None else self._ids(token)
        else:
            token = int(token)
            if not 0 <= token < self.vocab_size:
                raise_unknown_id(token, self.vocab_size)
            ids = [token]
        return explain(self._vocabulary, ids)

    def top_merges(self, n: int = 10) -> Merges:
        """The `n` merges and phrases that were used most on the training text, the most used first."""
        from tokenizer.inspect.inspection import top_merges

        return top_merges(self._vocabulary, n)

    def db_status(self, preview: int = 10) -> Status:
        """What was counted or learned, with the first `preview` keys or entries; prints as a report."""
        from tokenizer.inspect.inspection import status

        return status(None if self.is_frozen else self._open_counts(), self._frozen, preview)

    # Keeping

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the frozen tokenizer to one compressed file."""
        storage.write(self._vocabulary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HybridTokenizer:
        """Read a file of `save`. Raises TokenizerError when it is missing, damaged, foreign or newer."""
        return cls.from_vocabulary(storage.read(path))

    @classmethod
    def pretrained(cls, name: str) -> HybridTokenizer:
        """A ready-made tokenizer of the package; `tokenizer.pretrained_names()` lists them."""
        from tokenizer.vocabularies import path_of

        return cls.load(path_of(name))

    @classmethod
    def import_pickle(cls, path: str | os.PathLike[str]) -> HybridTokenizer:
        """The word counts of an old `tokenizer_state.pkl.gz` of the original project, to be frozen anew.

        Nothing in the file is run. Its ids are not kept. Raises TokenizerError for any other pickle.
        """
        from tokenizer.legacy import read_word_counts

        words, lowercase, byte_limit = read_word_counts(path)
        tokenizer = cls(lowercase, byte_limit)
        tokenizer._open_counts().keys.update({f" {word}": count for word, count in words.items()})
        return tokenizer

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> HybridTokenizer:
        """A frozen tokenizer around a vocabulary."""
        tokenizer = cls(vocabulary.lowercase, vocabulary.byte_limit)
        tokenizer._counts, tokenizer._frozen = None, vocabulary
        return tokenizer

    @property
    def _vocabulary(self) -> Vocabulary:
        if self._frozen is None:
            raise TokenizerError("there is no vocabulary yet: call freeze_vocab first, or load a saved tokenizer")
        return self._frozen

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._vocabulary)

    @cached_property
    def _joiner(self) -> PhraseJoiner:
        from tokenizer.encoding.phrases import PhraseJoiner

        return PhraseJoiner(self._vocabulary.phrase_table, self._vocabulary.caps)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self._vocabulary)

    @cached_property
    def _showing_decoder(self) -> Decoder:
        return Decoder(self._vocabulary, show_special=True)

    def __repr__(self) -> str:
        state = f"vocab_size={self.vocab_size}" if self.is_frozen else "not frozen"
        return f"HybridTokenizer(lowercase={self.lowercase}, byte_limit={self.byte_limit}, {state})"

    def __getstate__(self) -> dict[str, object]:
        return {
            "content": self._frozen,
            "counts": self._counts,
            "options": (self.lowercase, self.byte_limit),
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(_frozen=state["content"], _counts=state["counts"])
        self.lowercase, self.byte_limit = state["options"]  # type: ignore[misc]
