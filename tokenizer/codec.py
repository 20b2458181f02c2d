"""The codec of a tokenizer: text to ids and back, with a frozen vocabulary."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, overload

from tokenizer.decoding.decoder import Decoder, StreamDecoder
from tokenizer.decoding.id_formats import MIN_ARRAY_LENGTH, flatten_ids, run_length_encode
from tokenizer.encoding.encoder import Encoder
from tokenizer.encoding.reference import join_phrases
from tokenizer.errors import TokenizerError
from tokenizer.once import made_once
from tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:  # importing NumPy takes longer than loading a saved tokenizer: only methods that need it import it
    import numpy as np
    from numpy.typing import NDArray

    from tokenizer.decoding.id_formats import TokenIds
    from tokenizer.encoding.phrases import PhraseJoiner
    from tokenizer.portable.encoder import PortableEncoder


class Codec:
    """Encoding and decoding with a vocabulary that is frozen once; safe to use from several threads afterwards."""

    _frozen: Vocabulary | None = None

    @property
    def vocab_size(self) -> int:
        """The number of ids, V."""
        return self._vocabulary.size

    @property
    def _vocabulary(self) -> Vocabulary:
        if self._frozen is None:
            raise TokenizerError("there is no vocabulary yet: call freeze_vocab first, or load a saved tokenizer")
        return self._frozen

    # Encoding

    @overload
    def encode(self, text: str, mode: Literal["flat"] = "flat") -> list[int]: ...

    @overload
    def encode(self, text: str, mode: Literal["rle"]) -> list[tuple[int, int]]: ...

    def encode(self, text: str, mode: str = "flat") -> list[int] | list[tuple[int, int]]:
        """Encode a text. The result never contains special tokens other than ``<SP>`` and ``<NL>``, the ids of a space
        and a newline unless the tokenizer is portable.

        Args:
            text: Any str, lone surrogates included.
            mode: "flat" for ids, "rle" for run-length pairs.

        Returns:
            ``[id, …]`` or ``[(id, number of consecutive occurrences), …]``.

        Raises:
            TokenizerError: There is no vocabulary yet, or an argument is invalid.
        """
        if mode not in ("flat", "rle"):
            raise TokenizerError(f"mode is {mode!r}: it must be 'flat' or 'rle'")
        ids = self._ids(text, "encode")
        return ids if mode == "flat" else run_length_encode(ids)

    def encode_array(self, text: str) -> NDArray[np.int32]:
        """Encode a text to an int32 array [T]: the fast way for long texts.

        Raises:
            TokenizerError: There is no vocabulary yet, or `text` is not a str.
        """
        import numpy as np

        check_text(text, "encode_array")
        return np.array(self._join_phrases(self._encoder.ids(text)), dtype=np.int32)

    def encode_batch(
        self, texts: Sequence[str], max_len: int | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Encode several texts to one padded array.

        Args:
            texts: B texts.
            max_len: The length T of the rows, to which longer texts are truncated; by default, the length of the
                longest text.

        Returns:
            The ids, int32 [B, T], padded with ``<PAD>`` (0) at the end, and the mask, bool [B, T], True at ids.

        Raises:
            TokenizerError: There is no vocabulary yet, or an argument is invalid.
        """
        import numpy as np

        if max_len is not None and (not isinstance(max_len, int) or max_len < 1):
            raise TokenizerError(f"max_len is {max_len!r}: it must be an integer of at least 1")
        flat, lengths = self._encode_flat(texts, "encode_batch")
        width = max_len or int(lengths.max(initial=0))
        mask = np.arange(width) < lengths[:, None]
        ids = np.zeros(mask.shape, dtype=np.int32)
        position_in_text = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids[mask] = flat[position_in_text < width]
        return ids, mask

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encode several texts to one int32 array [T] each; faster than `encode_array` where texts are short.

        Raises:
            TokenizerError: There is no vocabulary yet, or `texts` is not a sequence of str.
        """
        import numpy as np

        flat, lengths = self._encode_flat(texts, "encode_arrays")
        if not len(lengths):
            return []
        return np.split(flat, np.cumsum(lengths)[:-1])

    def count(self, text: str) -> int:
        """Return the number of ids that `encode` gives for a text."""
        return len(self._ids(text, "count"))

    def _ids(self, text: str, method: str) -> list[int]:
        check_text(text, method)
        data = self._encoder.ids(text)
        if len(data) > 4 * MIN_ARRAY_LENGTH and self._vocabulary.phrases:
            return self._join_phrases(data).tolist()
        ids = array("i")
        ids.frombytes(data)
        return join_phrases(ids.tolist(), self._vocabulary)

    def _join_phrases(self, data: bytes) -> NDArray[np.int32]:
        """Convert the bytes of int32 ids to an array and join phrases."""
        import numpy as np

        ids = np.frombuffer(data, dtype=np.int32)
        return self._joiner.join(ids) if self._vocabulary.phrases else ids

    def _encode_flat(self, texts: Sequence[str], method: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the concatenated ids of several texts and the number of ids of each."""
        import numpy as np

        if isinstance(texts, str):
            raise TokenizerError(f"{method} takes several texts: put a single text into a list")
        texts = list(texts)
        for text in texts:
            check_text(text, method)
        rows = self._encoder.ids_of_many(texts)
        lengths = np.array([len(row) // 4 for row in rows], dtype=np.int64)
        flat = np.frombuffer(b"".join(rows), dtype=np.int32)
        if self._vocabulary.phrases:
            flat, lengths = self._joiner.join_rows(flat, lengths, separator=self.vocab_size)
        return flat, lengths

    # Decoding

    def decode(self, ids: TokenIds, *, skip_special_tokens: bool = True) -> str:
        """Decode ids: the exact inverse of `encode`.

        Args:
            ids: Flat ids (list, tuple or other iterable, integer array [T]) or run-length pairs.
            skip_special_tokens: Decode special tokens to nothing; False decodes them to their names.

        Returns:
            The text. Bytes that are not valid UTF-8, which a model can generate, become U+FFFD.

        Raises:
            TokenizerError: There is no vocabulary yet, `ids` has another format, or an id is outside the vocabulary.
        """
        decoder = self._decoder if skip_special_tokens else self._special_decoder
        flat = flatten_ids(ids)
        return decoder.to_text(flat) if isinstance(flat, list) else decoder.array_to_text(flat)

    def stream_decoder(self, context_ids: Iterable[int] = ()) -> StreamDecoder:
        """Return a decoder that takes ids one by one; the texts it returns, joined, are `decode` of all ids.

        Args:
            context_ids: Ids before them. They change nothing here; the text of a continuation depends on them for
                tokenizers of other kinds.
        """
        return StreamDecoder(self._decoder)

    # Parts, made on first use

    @made_once
    def _encoder(self) -> Encoder | PortableEncoder:
        if self._vocabulary.portable:
            from tokenizer.portable.encoder import PortableEncoder  # compiles patterns, which others do not need

            return PortableEncoder(self._vocabulary)
        return Encoder(self._vocabulary)

    @made_once
    def _joiner(self) -> PhraseJoiner:
        from tokenizer.encoding.phrases import PhraseJoiner

        return PhraseJoiner(self._vocabulary.phrase_table, self._vocabulary.caps)

    @made_once
    def _decoder(self) -> Decoder:
        return Decoder(self._vocabulary)

    @made_once
    def _special_decoder(self) -> Decoder:
        return Decoder(self._vocabulary, show_special=True)


def check_text(text: object, method: str) -> None:
    """Raise a TokenizerError about an argument that is not a str, and the method that takes it."""
    if not isinstance(text, str):
        raise TokenizerError(f"{method} takes a str, not {type(text).__name__}")
