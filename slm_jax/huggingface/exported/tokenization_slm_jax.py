"""Tokenizer of models trained with slm_jax, for transformers (AutoTokenizer with trust_remote_code=True).

The ids of a text are exactly those that the model was trained with. Pure Python and NumPy; the vocabulary is a data
file and contains no code. No text can produce a special token: "<EOS>" in a text is five characters.
"""

import re
from array import array
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizer

from tokenizer.decoding.decoder import Decoder, raise_unknown_id
from tokenizer.encoding.encoder import Encoder
from tokenizer.encoding.phrases import PhraseJoiner
from tokenizer.encoding.reference import join_phrases
from tokenizer.once import made_once
from tokenizer.storage import read, write
from tokenizer.vocabulary import FIRST_LEARNED

ESCAPE = "\ufdd0"


class SlmJaxTokenizer(PreTrainedTokenizer):
    """Lossless tokenizer of words, merges and bytes.

    A text starts with <EOS>, as documents do in training, unless `add_special_tokens=False` is passed (or
    `begin_with_eos=False` to the constructor); then `decode(encode(s)) == s` for every str. Batches are padded on the
    left, as generation needs it.
    """

    vocab_files_names = {"vocab_file": "tokenizer.hybtok"}  # noqa: RUF012  # class attributes by the convention of transformers
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(self, vocab_file: str, begin_with_eos: bool = True, **kwargs):
        self._vocabulary = read(vocab_file)
        if self._vocabulary.portable:
            raise ValueError(f"{vocab_file} is a portable tokenizer: load the tokenizer.json that was exported with it")
        self._names = self._vocabulary.names
        self._ids = {name: id_ for id_, name in enumerate(self._names)}
        self.begin_with_eos = begin_with_eos
        names = {
            "pad_token": "<PAD>",
            "unk_token": "<UNK>",
            "cls_token": "<CLS>",
            "sep_token": "<SEP>",
            "mask_token": "<MASK>",
            "bos_token": "<EOS>",
            "eos_token": "<EOS>",
        }
        if "extra_special_tokens" not in kwargs:
            turn_tokens = [self._names[id_] for id_ in self._vocabulary.special_ids if id_ >= FIRST_LEARNED]
            kwargs.setdefault("additional_special_tokens", ["<RES>", *turn_tokens])
        super().__init__(begin_with_eos=begin_with_eos, **{**names, **kwargs})

    @made_once
    def _encoder(self) -> Encoder:
        return Encoder(self._vocabulary)

    @made_once
    def _decoders(self) -> tuple[Decoder, Decoder]:
        """Decoders that show the names of special tokens, and that leave them out."""
        return Decoder(self._vocabulary, show_special=True), Decoder(self._vocabulary)

    @made_once
    def _joiner(self) -> PhraseJoiner:
        return PhraseJoiner(self._vocabulary.phrase_table, self._vocabulary.caps)

    @property
    def vocab_size(self) -> int:
        """Number of ids, without added tokens."""
        return self._vocabulary.size

    def get_vocab(self) -> dict[str, int]:
        """Return the ids by token name, added tokens included."""
        return {**self._ids, **self._added()}

    def _added(self) -> dict[str, int]:
        """Return the tokens that the user added, the only ones that are searched for in a text."""
        return {name: id_ for name, id_ in self._added_tokens_encoder.items() if id_ >= self.vocab_size}

    def _update_trie(self, *_, **__) -> None:
        for name in self._added():
            self.tokens_trie.add(name)

    # Text to ids.

    def _encode_plus(self, *args, return_offsets_mapping: bool = False, **kwargs):
        if return_offsets_mapping:  # transformers ignores it for tokenizers in Python
            raise NotImplementedError(
                "return_offsets_mapping=True is not supported by tokenizers in Python; the package slm_jax has "
                "HybridTokenizer.load('tokenizer.hybtok').offsets(text)"
            )
        return super()._encode_plus(*args, **kwargs)

    def _text_ids(self, text: str) -> list[int]:
        data = self._encoder.ids(text)
        if self._vocabulary.phrases and len(data) > 4096:
            return self._joiner.join(np.frombuffer(data, dtype=np.int32)).tolist()
        ids = array("i")
        ids.frombytes(data)
        return join_phrases(ids.tolist(), self._vocabulary)

    def apply_chat_template(self, conversation, *args, tokenizer_kwargs: dict | None = None, **kwargs):
        """Render a conversation and encode it; special tokens are those of the template, never of a message."""
        tokenizer_kwargs = {"of_chat_template": True, **(tokenizer_kwargs or {})}
        return super().apply_chat_template(conversation, *args, tokenizer_kwargs=tokenizer_kwargs, **kwargs)

    def tokenize(self, text: str, of_chat_template: bool = False, **_) -> list[str]:
        """Return the names of the tokens of a text; special ones only in the text of a chat template."""
        if of_chat_template:
            special = [self._names[id_] for id_ in self._vocabulary.special_ids]
            parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
            # Names are at odd positions. The template puts an escape after each "<" of a message.
            plain = [self.tokenize(part.replace("<" + ESCAPE, "<")) for part in parts[::2]]
            names = [[name] for name in parts[1::2]]
            ordered = chain.from_iterable(zip_longest(plain, names, fillvalue=[]))
            return list(chain.from_iterable(ordered))
        added = self._added()
        if not added:
            return self._tokenize(text)
        parts = self.tokens_trie.split(text)
        return [name for part in parts for name in ([part] if part in added else self._tokenize(part))]

    def _tokenize(self, text: str, **_) -> list[str]:
        return [self._names[id_] for id_ in self._text_ids(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["<UNK>"])

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:  # a negative one would index from the end
            raise_unknown_id(index, len(self))
        return self._names[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        """Put <EOS> before the ids of one or two texts; each is a document of its own."""
        bos = [self.bos_token_id] if self.begin_with_eos else []
        return bos + list(token_ids_0) + ([] if token_ids_1 is None else bos + list(token_ids_1))

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False) -> list[int]:
        """Return 1 for ids added by `build_inputs_with_special_tokens`, 0 for ids of the text."""
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(id_ in special) for id_ in token_ids_0]
        bos = [1] if self.begin_with_eos else []
        return bos + [0] * len(token_ids_0) + ([] if token_ids_1 is None else bos + [0] * len(token_ids_1))

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None) -> list[int]:
        """Return zeros: the model has no token types."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    # Ids to text.

    def _decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False, *_, **__) -> str:
        decoder = self._decoders[skip_special_tokens]
        ids = [int(token_ids)] if isinstance(token_ids, int) else [int(id_) for id_ in token_ids]
        if max(ids, default=0) < self.vocab_size:
            return decoder.to_text(ids)
        for id_ in ids:
            if id_ < 0 or (id_ >= self.vocab_size and id_ not in self._added_tokens_decoder):
                raise_unknown_id(id_, len(self))
        special = set(self.all_special_ids) if skip_special_tokens else set()
        parts: list[str | list[int]] = []
        for id_ in ids:
            if id_ >= self.vocab_size:
                parts.append("" if id_ in special else self._added_tokens_decoder[id_].content)
            elif parts and isinstance(parts[-1], list):
                parts[-1].append(id_)
            else:
                parts.append([id_])
        return "".join(part if isinstance(part, str) else decoder.to_text(part) for part in parts)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens given by name."""
        return self._decode([self._convert_token_to_id_with_added_voc(token) for token in tokens])

    # Saving.

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the vocabulary file into a folder and return its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        write(self._vocabulary, path)
        return (str(path),)

    def __getstate__(self) -> dict:
        lazy = ("_encoder", "_decoders", "_joiner")  # recreated on first use; their locks cannot be pickled
        return {key: value for key, value in self.__dict__.items() if key not in lazy}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
