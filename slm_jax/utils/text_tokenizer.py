"""The interface of a tokenizer that training, evaluation, generation, serving and export use, and how it is saved.

Two classes have it: `HybridTokenizer`, the project's own, and `ForeignTokenizer`, any `tokenizer.json`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from slm_jax.utils.tokenizer_files import FOREIGN_FILE, HYBRID_FILE
from tokenizer import HybridTokenizer

if TYPE_CHECKING:  # the help of the commands needs no NumPy
    import numpy as np
    from numpy.typing import NDArray


class StreamDecoder(Protocol):
    """Decoder that takes ids one by one."""

    def push(self, id_: int, /) -> str:
        """Return the text that an id completes; empty within a character."""

    def finish(self) -> str:
        """Return the text of an incomplete character at the end."""


class TextTokenizer(Protocol):
    """A tokenizer of a run."""

    @property
    def vocab_size(self) -> int:
        """The number of ids, V."""

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""

    @property
    def start_id(self) -> int:
        """The id before a text that begins a document: `eos_id` unless the tokenizer begins texts with another one."""

    @property
    def pad_id(self) -> int | None:
        """The id of padding, None without one."""

    @property
    def stop_ids(self) -> Sequence[int]:
        """Ids that end a generated text, `eos_id` among them."""

    @property
    def suppressed_ids(self) -> Sequence[int]:
        """Ids that generation never draws."""

    @property
    def token2id(self) -> Mapping[str, int]:
        """Ids by name."""

    @property
    def id2token(self) -> Mapping[int, str]:
        """Names by id."""

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of each id on its own, [V]; empty for special tokens."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal); equal fingerprints mean equal ids for every text."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens at its ends."""

    def encode_arrays(self, texts: Sequence[str]) -> "list[NDArray[np.int32]]":
        """Return the ids of each text, int32 [T]."""

    def decode(self, ids: Iterable[int], /) -> str:
        """Return the text of ids; special tokens are left out."""

    def stream_decoder(self, context_ids: Sequence[int] = ()) -> StreamDecoder:
        """Return a decoder that takes ids one by one.

        Args:
            context_ids: Ids before them, whose text is not returned. SentencePiece omits the space before the first
                word of a text, but not the one before the first word of a continuation.

        Returns:
            The decoder. The texts it returns, joined, are `decode` of all ids, or what they add to that of the context.
        """

    def save(self, path: Path, /) -> None:
        """Save the tokenizer to one file, atomically."""


def restores_text(tokenizer: TextTokenizer) -> bool:
    """Return whether a tokenizer decodes the ids of every text to this text, which third-party tokenizers may not."""
    return isinstance(tokenizer, HybridTokenizer)


def document_prefix(tokenizer: TextTokenizer) -> list[int]:
    """Return the ids between the end of a document and the text of the next: the id that begins texts, if it is own."""
    return [] if tokenizer.start_id == tokenizer.eos_id else [tokenizer.start_id]


def decode_continuation(tokenizer: TextTokenizer, context_ids: Sequence[int], ids: Iterable[int]) -> str:
    """Return the text that ids add to the text of the ids before them."""
    decoder = tokenizer.stream_decoder(context_ids)
    parts = [decoder.push(id_) for id_ in ids]
    return "".join(parts) + decoder.finish()


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> Path:
    """Save a tokenizer in a folder under the name of its kind.

    Returns:
        The file.

    Raises:
        TokenizerError: The file cannot be written.
    """
    path = folder / (HYBRID_FILE if isinstance(tokenizer, HybridTokenizer) else FOREIGN_FILE)
    tokenizer.save(path)
    return path
