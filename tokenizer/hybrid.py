"""HybridTokenizer: count text, freeze a vocabulary, encode, decode and inspect."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tokenizer import storage
from tokenizer.codec import Codec, check_text
from tokenizer.decoding.decoder import raise_unknown_id
from tokenizer.errors import TokenizerError
from tokenizer.once import made_once
from tokenizer.vocabulary import SPECIAL_TOKENS, TurnIds, Vocabulary

if TYPE_CHECKING:  # the methods that need these modules import them
    from tokenizer.inspect.results import Explanation, Merges, Segments, Status
    from tokenizer.learning.counting import PretokenCounts
    from tokenizer.learning.options import ProgressCallback

DEFAULT_VOCAB_SIZE = 8192


class HybridTokenizer(Codec):
    """A lossless tokenizer of words, merges and bytes that can explain its tokens.

    Count text (`add_text`, `add_file`, `add_files`), call `freeze_vocab` once, then `encode` and `decode`:
    ``decode(encode(s)) == s`` for every str. Alternatively, start from `load` or `pretrained`. A frozen tokenizer is
    immutable and safe to use from several threads.

    Args:
        lowercase: Share one entry between "the", "The" and "THE" by case marks, losslessly; False keeps case in the
            entries.
        byte_limit: Maximum length of a base token in UTF-8 bytes, 1 to 16.
        portable: Segment as a stock ``tokenizer.json`` does, so that other programs give the same ids: whole words
            first, then merges of bytes. There are no case marks (`lowercase` becomes False), and base tokens are whole
            words of any length (`byte_limit` has no effect).

    Raises:
        TokenizerError: An option is invalid.
    """

    def __init__(self, lowercase: bool = True, byte_limit: int = 4, portable: bool = False) -> None:
        if not isinstance(byte_limit, int) or isinstance(byte_limit, bool) or not 1 <= byte_limit <= 16:
            raise TokenizerError(f"byte_limit is {byte_limit!r}: it must be an integer from 1 to 16")
        if not isinstance(lowercase, bool):
            raise TokenizerError(f"lowercase is {lowercase!r}: it must be True or False")
        if not isinstance(portable, bool):
            raise TokenizerError(f"portable is {portable!r}: it must be True or False")
        self.portable = portable
        self.lowercase = lowercase and not portable
        self.byte_limit = byte_limit
        self._counts: PretokenCounts | None = None
        self._frozen: Vocabulary | None = None

    # Counting

    def add_text(self, text: str) -> None:
        """Count a text.

        Raises:
            TokenizerError: The vocabulary is frozen, or `text` is not a str.
        """
        check_text(text, "add_text")
        self._open_counts().add_text(text)

    def add_file(self, path: str | os.PathLike[str], progress: ProgressCallback | None = None) -> None:
        """Count a UTF-8 text file of any size.

        Args:
            path: The file.
            progress: Called as progress(description, bytes counted, bytes in total).

        Raises:
            TokenizerError: The vocabulary is frozen, or the file cannot be read or is not UTF-8.
        """
        self._add_paths([os.fspath(path)], 1, progress)

    def add_files(
        self, patterns: str | Iterable[str], processes: int = 1, progress: ProgressCallback | None = None
    ) -> list[str]:
        """Count the UTF-8 text files that match one or several paths or glob patterns.

        Args:
            patterns: Paths or patterns; ``**`` matches folders of any depth.
            processes: Number of processes that count; the result does not depend on it.
            progress: Called as progress(description, bytes counted, bytes in total).

        Returns:
            The paths of the files.

        Raises:
            TokenizerError: The vocabulary is frozen, a pattern matches no file, all files are empty, or a file cannot
                be read or is not UTF-8.
        """
        from tokenizer.learning.text_files import find_files

        if not isinstance(processes, int) or processes < 1:
            raise TokenizerError(f"processes is {processes!r}: it must be an integer of at least 1")
        paths = find_files(patterns)
        self._add_paths(paths, processes, progress)
        return paths

    def _add_paths(self, paths: list[str], processes: int, progress: ProgressCallback | None) -> None:
        from tokenizer.learning.counting import count_files

        counts = self._open_counts()
        report = None if progress is None else partial(progress, "bytes counted")
        for shard in count_files(paths, processes, report, self.portable):
            counts.merge(shard)

    def _open_counts(self) -> PretokenCounts:
        if self._frozen is not None:
            raise TokenizerError("the vocabulary is frozen: create a new HybridTokenizer to count more text")
        if self._counts is None:
            from tokenizer.learning.counting import PretokenCounts

            self._counts = PretokenCounts(portable=self.portable)
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
        turn_tokens: bool = True,
        note: str = "",
        progress: ProgressCallback | None = None,
    ) -> None:
        """Learn the vocabulary from the counted text, once; afterwards the tokenizer encodes and decodes.

        Args:
            k_bases: Number of base tokens: the most common words of at most `byte_limit` bytes, fewer if the text has
                fewer. By default, every learned entry that is such a word counts as one. Not with `portable`, where
                words become bases if their parts are not worth an entry.
            max_merges: Maximum number of merges, phrases included.
            vocab_size: Total number of ids, special tokens and bytes included; by default 8192 unless `max_merges` is
                given. Fewer result if the text does not contain enough candidates.
            min_freq: Occurrences that a base token or merge needs, at least 1.
            score: Ranking of merges. "freq": frequency of the pair (best). "freq_pmi": frequency times the square root
                of the pointwise mutual information. "pmi": PMI × log(1 + frequency), which prefers rare pairs; for
                comparison only.
            phrases: Share (0 to 0.5) of the learned entries that are phrases, which span words (and, with
                boundaries="spaces", anything else). Text takes fewer tokens, but each stands for more different things.
                About 0.15 shortens text the most at 8,192 ids, 0.3 at 32,768.
            boundaries: Where merges stop. "words": between letters, digits and punctuation. "spaces": only at white
                space, so that "him," can be one token; 3 to 5 % fewer tokens, but small models trained on them end
                worse (1.43 instead of 1.40 bits per byte after the same number of steps).
            turn_tokens: Have special tokens for the turns of conversations: ``<|system|>``, ``<|user|>``,
                ``<|assistant|>`` and ``<|end|>``, which no text encodes to.
            note: A line stored in the file, for example about the training text.
            progress: Called as progress(description, done, total).

        Raises:
            TokenizerError: The vocabulary is frozen already, nothing was counted, or an option is invalid.
        """
        from tokenizer.learning.learn import learn_vocabulary
        from tokenizer.learning.options import LearnOptions

        counts = self._open_counts()
        if not counts.pretokens:
            raise TokenizerError("nothing was counted: call add_text, add_file or add_files before freeze_vocab")
        if vocab_size is None and max_merges is None:
            vocab_size = DEFAULT_VOCAB_SIZE
        options = LearnOptions(
            lowercase=self.lowercase,
            byte_limit=self.byte_limit,
            vocab_size=vocab_size,
            k_bases=k_bases,
            max_merges=max_merges,
            min_freq=min_freq,
            score=score,
            phrases=phrases,
            boundaries=boundaries,
            portable=self.portable,
            turn_tokens=turn_tokens,
        )
        if not isinstance(note, str):
            raise TokenizerError(f"note is {note!r}: it must be a str")
        vocabulary = learn_vocabulary(counts.pretokens, [text for _, text in counts.sample], options, progress)
        self._frozen = replace(vocabulary, note=note)
        self._counts = None

    # Inspection

    @property
    def is_frozen(self) -> bool:
        """True if the tokenizer has a vocabulary."""
        return self._frozen is not None

    @property
    def eos_id(self) -> int:
        """The id of ``<EOS>``, which ends a document."""
        return SPECIAL_TOKENS.index("<EOS>")

    @property
    def start_id(self) -> int:
        """The id before a text that begins a document: the ``<EOS>`` of the document before it."""
        return self.eos_id

    @property
    def pad_id(self) -> int:
        """The id of ``<PAD>``."""
        return SPECIAL_TOKENS.index("<PAD>")

    @property
    def turn_ids(self) -> TurnIds:
        """The ids that delimit turns: reserved special tokens in vocabularies without turn tokens."""
        return self._vocabulary.turn_ids

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a generated text: that of ``<EOS>``."""
        return [self.eos_id]

    @property
    def suppressed_ids(self) -> list[int]:
        """Ids of special tokens that no text contains: all but ``<EOS>``. Conversations contain the turn tokens."""
        return [id_ for id_ in self._vocabulary.special_ids if id_ != self.eos_id]

    @made_once
    def token2id(self) -> dict[str, int]:
        """{name: id}; names are the texts of entries, ``<PAD>`` and so on for special tokens, ``<0xE2>`` for bytes."""
        names = self._vocabulary.names
        return dict(zip(reversed(names), range(len(names) - 1, -1, -1), strict=True))

    @made_once
    def id2token(self) -> dict[int, str]:
        """{id: name}, the inverse of `token2id`."""
        return dict(enumerate(self._vocabulary.names))

    @made_once
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the content; equal fingerprints mean equal ids for every text."""
        return storage.fingerprint(self._vocabulary)

    @property
    def vocabulary(self) -> Vocabulary:
        """The frozen vocabulary: the content of a saved file."""
        return self._vocabulary

    @property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id on its own, [V]; empty for special tokens and case marks."""
        return self._vocabulary.data

    @made_once
    def kinds(self) -> list[str]:
        """The kind of each id, [V]; see `tokenizer.inspect.results.Segment`."""
        return [self._vocabulary.kind(id_) for id_ in range(self.vocab_size)]

    def segment(self, text: str) -> Segments:
        """Return the tokens of a text as (text, kind, id); `tokenizer.inspect.results.Segment` lists the kinds."""
        from tokenizer.inspect.explain import segment

        return segment(self._vocabulary, self._ids(text, "segment"))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return, for each id of `encode`, the characters [start, end) of the text that it stands for.

        A case mark has width 0. The byte tokens of one character all have the span of that character.
        """
        from tokenizer.inspect.explain import offsets

        return offsets(self._vocabulary, self._ids(text, "offsets"))

    def explain_token(self, token: str | int) -> Explanation:
        """Explain how a token is made, down to its bytes.

        Args:
            token: A name or an id. A text that is not one token is explained by the tokens that encode it.

        Raises:
            TokenizerError: There is no vocabulary yet, or the id is outside it.
        """
        from tokenizer.inspect.explain import explain

        if isinstance(token, str):
            id_ = self.token2id.get(token)
            ids = self._ids(token, "explain_token") if id_ is None else [id_]
        else:
            ids = [int(token)]
            if not 0 <= ids[0] < self.vocab_size:
                raise_unknown_id(ids[0], self.vocab_size)
        return explain(self._vocabulary, ids)

    def top_merges(self, n: int = 10) -> Merges:
        """Return the `n` merges and phrases that were used most on the training text, the most used first."""
        from tokenizer.inspect.explain import top_merges

        return top_merges(self._vocabulary, n)

    def db_status(self, preview: int = 10) -> Status:
        """Return a summary of the counted text or of the vocabulary; prints as a report.

        Args:
            preview: Number of most common pre-tokens, or of first entries, to include.
        """
        from tokenizer.inspect.explain import status

        return status(None if self.is_frozen else self._open_counts(), self._frozen, preview)

    # Saving and loading

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the frozen tokenizer to one compressed file, atomically.

        Raises:
            TokenizerError: There is no vocabulary yet, or the file cannot be written.
        """
        storage.write(self._vocabulary, path)

    def save_tokenizer_json(self, path: str | os.PathLike[str]) -> None:
        """Save a portable tokenizer as ``tokenizer.json``, which the package `tokenizers` and many programs read.

        Its ids are those of `encode`, except that it puts ``<EOS>`` before a text unless special tokens are turned off.

        Raises:
            TokenizerError: The tokenizer is not portable, or the file cannot be written.
        """
        if not self._vocabulary.portable:
            raise TokenizerError("no tokenizer.json gives the ids of this tokenizer: train one with portable=True")
        from tokenizer.portable.tokenizer_json import to_tokenizer_json

        storage.write_bytes(json.dumps(to_tokenizer_json(self._vocabulary)).encode(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HybridTokenizer:
        """Load a file written by `save`; nothing in it is executed.

        Raises:
            TokenizerError: The file is missing, damaged, not a tokenizer, or has a newer format.
        """
        return cls.from_vocabulary(storage.read(path))

    @classmethod
    def pretrained(cls, name: str) -> HybridTokenizer:
        """Load a pretrained tokenizer of the package; `tokenizer.pretrained_names()` lists them.

        Raises:
            TokenizerError: There is no pretrained tokenizer of that name.
        """
        from tokenizer.vocabularies import path_of

        return cls.load(path_of(name))

    @classmethod
    def import_pickle(cls, path: str | os.PathLike[str]) -> HybridTokenizer:
        """Import the word counts of a `tokenizer_state.pkl.gz` of my_slm; call `freeze_vocab` on the result.

        Nothing in the file is executed. Its ids are not kept.

        Raises:
            TokenizerError: The file cannot be read or is another pickle.
        """
        from tokenizer.learning.legacy_pickle import read_legacy_state

        state = read_legacy_state(path)
        tokenizer = cls(lowercase=state.lowercase, byte_limit=state.byte_limit)
        tokenizer._open_counts().pretokens.update({f" {word}": count for word, count in state.word_counts.items()})
        return tokenizer

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> HybridTokenizer:
        """Return a frozen tokenizer with this vocabulary."""
        tokenizer = cls(vocabulary.lowercase, vocabulary.byte_limit, vocabulary.portable)
        tokenizer._frozen = vocabulary
        return tokenizer

    def __repr__(self) -> str:
        state = f"vocab_size={self.vocab_size}" if self.is_frozen else "not frozen"
        if self.portable:
            return f"HybridTokenizer(portable=True, {state})"
        return f"HybridTokenizer(lowercase={self.lowercase}, byte_limit={self.byte_limit}, {state})"

    # Pickling leaves out the caches: they hold locks and are rebuilt on use.

    def __getstate__(self) -> dict[str, object]:
        return {
            "lowercase": self.lowercase,
            "byte_limit": self.byte_limit,
            "portable": self.portable,
            "_counts": self._counts,
            "_frozen": self._frozen,
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
