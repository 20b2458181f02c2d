"""Tokenizers of published models: any `tokenizer.json`, read with the package `tokenizers`.

Ids, special tokens and the chat template stay as they are. A run keeps the files in one archive (ZIP, with a
CRC-32 of each file), from which an export restores them byte for byte. Nothing in them is executed.
"""

import functools
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from slm_jax.utils.files import replace_file
from slm_jax.utils.tokenizer_files import FOREIGN_JSON, TOKENIZER_FILES
from tokenizer import TokenizerError
from tokenizer.vocabulary import MAX_ENTRIES

_CONFIG_FILES = ("generation_config.json", "config.json")  # of the model: ids of special tokens
_IDS_FILE = "slm_jax.json"  # in the archive: the ids of special tokens
_MAX_ARCHIVE_BYTES = 256 << 20  # of all files, decompressed
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,  # an encrypted file, an unknown compression
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ForeignTokenizer:
    """A `tokenizer.json` with the interface of `text_tokenizer.TextTokenizer`.

    Attributes:
        files: The files of the tokenizer by name.
        vocab_size: The number of ids, V: one more than the largest id.
        eos_id: The id that ends a document.
        start_id: The id before a text that begins a document: what the tokenizer itself puts there, else `eos_id`.
        pad_id: The id of padding; None if the tokenizer has none.
        stop_ids: Ids that end a generated text, `eos_id` first.
        suppressed_ids: Ids that stand for no token.
        fingerprint: SHA-256 (hexadecimal) of `tokenizer.json`, `eos_id` and `start_id`.
    """

    def __init__(self, files: Mapping[str, bytes], ids: Mapping[str, Any]):
        """Create a tokenizer.

        Args:
            files: The files of the tokenizer by name, `tokenizer.json` among them.
            ids: `eos_id`, `start_id`, `pad_id` and `stop_ids`.

        Raises:
            TokenizerError: `tokenizer.json` is damaged, newer than the package `tokenizers`, or has too many ids; or an
                id of `ids` is not among them.
        """
        self.files = dict(files)
        self._tokenizer = _parse(self.files[FOREIGN_JSON])
        self.token2id: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.id2token = {id_: name for name, id_ in self.token2id.items()}
        self.vocab_size = max(self.id2token, default=-1) + 1
        if not 0 < self.vocab_size <= MAX_ENTRIES:  # before lists of this length are made
            limit = f"it must have 1 to {MAX_ENTRIES:,}"
            raise TokenizerError(f"the vocabulary of {FOREIGN_JSON} has {self.vocab_size:,} ids: {limit}")
        _check_ids(ids, self.vocab_size)
        self.eos_id: int = ids["eos_id"]
        self.start_id: int = ids["start_id"]
        self.pad_id: int | None = ids["pad_id"]
        self.stop_ids: list[int] = list(ids["stop_ids"])
        self.suppressed_ids = [id_ for id_ in range(self.vocab_size) if id_ not in self.id2token]
        content = hashlib.sha256(self.files[FOREIGN_JSON])
        content.update(json.dumps([self.eos_id, self.start_id]).encode())
        self.fingerprint = content.hexdigest()

    @classmethod
    def load(cls, path: Path) -> "ForeignTokenizer":
        """Load an archive written by `save`, or a `tokenizer.json` with the files next to it.

        Raises:
            TokenizerError: A file is missing or damaged, or nothing says which token ends a text.
        """
        if path.suffix == ".zip":
            return cls._load_archive(path)
        files = {}
        try:
            for name in (*TOKENIZER_FILES, *_CONFIG_FILES):
                source = path if name == FOREIGN_JSON else path.parent / name
                if name == FOREIGN_JSON or source.is_file():
                    files[name] = source.read_bytes()
        except OSError as error:
            raise TokenizerError(f"cannot read {source}: {error.strerror}") from None
        configs = {name: _json(files[name], path.parent / name) for name in files if name.endswith("_config.json")}
        configs |= {name: _json(files.pop(name), path.parent / name) for name in _CONFIG_FILES if name in files}
        special = _json(files.get("special_tokens_map.json", b"{}"), path.parent / "special_tokens_map.json")
        ids = _special_ids(_parse(files[FOREIGN_JSON], path), configs, special, path)
        return cls(files, ids)

    @classmethod
    def _load_archive(cls, path: Path) -> "ForeignTokenizer":
        try:
            with zipfile.ZipFile(path) as archive:
                _check_entries(archive)
                files = {info.filename: _read_entry(archive, info) for info in archive.infolist()}
            ids = json.loads(files.pop(_IDS_FILE))
            return cls(files, ids)
        except FileNotFoundError:
            raise TokenizerError(f"there is no tokenizer {path}") from None
        except _ARCHIVE_ERRORS as error:
            raise TokenizerError(f"the tokenizer {path} is damaged ({error}): restore it from a backup") from None

    def save(self, path: Path) -> None:
        """Save the tokenizer to one archive, atomically; equal tokenizers give equal bytes.

        Raises:
            TokenizerError: The file cannot be written.
        """
        ids = {"eos_id": self.eos_id, "start_id": self.start_id, "pad_id": self.pad_id, "stop_ids": self.stop_ids}
        contents = {**self.files, _IDS_FILE: json.dumps(ids).encode()}
        try:
            with replace_file(Path(path)) as partial, zipfile.ZipFile(partial, "w") as archive:
                for name, content in sorted(contents.items()):
                    info = zipfile.ZipInfo(name)  # dated 1980
                    archive.writestr(info, content, zipfile.ZIP_DEFLATED)
        except OSError as error:
            raise TokenizerError(f"cannot write {path}: {error.strerror}") from None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text as AutoTokenizer gives them with `add_special_tokens=False`.

        Names of special tokens in the text become these tokens, as in a chat template.
        """
        return self._tokenizer.encode(_without_surrogates(text), add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return `encode` of a text, int32 [T], and the characters [start, end) of each id, int64 [T, 2]."""
        encoded = self._tokenizer.encode(_without_surrogates(text), add_special_tokens=False)
        return np.array(encoded.ids, np.int32), np.array(encoded.offsets, np.int64).reshape(-1, 2)

    @property
    def added_tokens(self) -> dict[str, bool]:
        """{name: whether it is special} of the tokens that are recognized by name in any text."""
        return {token.content: token.special for token in self._tokenizer.get_added_tokens_decoder().values()}

    def with_json(self, content: bytes) -> "ForeignTokenizer":
        """Return a copy with another `tokenizer.json`, in which the special ids are the same.

        Raises:
            TokenizerError: The content is not a tokenizer with these ids.
        """
        ids = {"eos_id": self.eos_id, "start_id": self.start_id, "pad_id": self.pad_id, "stop_ids": self.stop_ids}
        return ForeignTokenizer({**self.files, FOREIGN_JSON: content}, ids)

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text, int32 [T]."""
        clean = [_without_surrogates(text) for text in texts]
        encoded = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(item.ids, np.int32) for item in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are left out.

        Raises:
            TokenizerError: An id is outside the vocabulary.
        """
        plain = [int(id_) for id_ in ids]
        for id_ in plain:
            if not 0 <= id_ < self.vocab_size:
                raise TokenizerError(f"{id_} is not an id of this tokenizer: its ids are 0 to {self.vocab_size - 1}")
        return self._tokenizer.decode(plain, skip_special_tokens=True)

    def stream_decoder(self, context_ids: Sequence[int] = ()) -> "ForeignStreamDecoder":
        """Return a decoder that takes ids one by one.

        Args:
            context_ids: Ids before them, whose text is not returned.

        Returns:
            The decoder. The texts it returns, joined, are `decode` of all ids, or what they add to that of the context.
        """
        return ForeignStreamDecoder(self, self._context(context_ids))

    def _context(self, ids: Sequence[int]) -> list[int]:
        """Return the last of ids whose text is complete and independent of the next id; else what has a text at all.

        One id is enough for a text that has begun. Bytes at the end are left out: those of an incomplete character
        would become part of the new text.
        """
        known = [int(id_) for id_ in ids if 0 <= id_ < self.vocab_size]
        for id_ in reversed(known):
            if not self.joins_next(id_) and "\ufffd" not in self.decode([id_]):
                return [id_]
        return [] if "\ufffd" in self.decode(known) else known

    def joins_next(self, id_: int) -> bool:
        """Return whether the text of an id depends on the next: a byte of SentencePiece, or a token left out."""
        return bool(_BYTE_TOKEN.fullmatch(self.id2token.get(id_, ""))) or not self.token_bytes[id_]

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id on its own, [V]; empty for special tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        decoder = _decoder(self.files[FOREIGN_JSON])
        to_bytes = _bytes_of_characters() if "ByteLevel" in json.dumps(decoder) else None
        inner = "##" if isinstance(decoder, dict) and decoder.get("type") == "WordPiece" else ""
        result = []
        for id_ in range(self.vocab_size):
            if id_ in added:
                result.append(b"" if added[id_].special else added[id_].content.encode())
            else:
                result.append(_bytes_of(self.id2token.get(id_, "").removeprefix(inner), to_bytes))
        return result


class ForeignStreamDecoder:
    """Decoder that takes ids one by one.

    The text of new ids is the difference between two decoded texts that begin at the same id, since a decoder may treat
    the first token of a text in another way (Hugging Face text-generation-inference does the same).
    """

    def __init__(self, tokenizer: ForeignTokenizer, context: Sequence[int] = ()):
        """Start a text, or continue that of the ids `context`."""
        self._tokenizer = tokenizer
        self._ids: list[int] = list(context)
        self._first = 0  # id that both texts begin at
        self._done = len(self._ids)  # ids whose text has been returned

    def push(self, id_: int) -> str:
        """Return the text that an id completes; empty within a character."""
        self._ids.append(int(id_))
        if self._tokenizer.joins_next(self._ids[-1]):
            return ""
        text = self._rest()
        if not text or text.endswith("\ufffd"):  # perhaps the beginning of a character
            return ""
        self._first = self._done
        self._done = len(self._ids)
        return text

    def finish(self) -> str:
        """Return the text of an incomplete character at the end."""
        text = self._rest()
        self._first = self._done = len(self._ids)
        return text

    def _rest(self) -> str:
        earlier = self._tokenizer.decode(self._ids[self._first : self._done])
        return self._tokenizer.decode(self._ids[self._first :])[len(earlier) :]


def _parse(content: bytes, path: Path | str = FOREIGN_JSON) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the package raises plain exceptions
        raise TokenizerError(f"{path} is damaged, or newer than the package tokenizers: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_entries(archive: zipfile.ZipFile) -> None:
    """Raise TokenizerError for sizes and names that `save` does not write: an export uses the names as file names."""
    size = sum(info.file_size for info in archive.infolist())
    if size > _MAX_ARCHIVE_BYTES:
        raise TokenizerError(f"its files have {size:,} bytes; the limit is {_MAX_ARCHIVE_BYTES:,}")
    seen = set()
    for name in archive.namelist():
        if name not in (*TOKENIZER_FILES, _IDS_FILE):
            raise TokenizerError(f"it contains {name!r}, which is no file of a tokenizer")
        if name in seen:
            raise TokenizerError(f"it contains {name!r} twice")
        seen.add(name)


def _read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return the bytes of a file, no more than the archive states: `ZipFile.read` inflates all that there are."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others are inflated without a limit
        raise TokenizerError(f"{info.filename!r} has the unknown compression {info.compress_type}")
    with archive.open(info) as file:
        return file.read(info.file_size)


def _check_ids(ids: Mapping[str, Any], vocab_size: int) -> None:
    """Raise TokenizerError for special ids that are not in the vocabulary, or that do not end texts at `eos_id`."""
    stops = ids["stop_ids"]
    if not isinstance(stops, list | tuple):
        raise TokenizerError(f"stop_ids is {stops!r}: it must be a list of ids")
    named = [("eos_id", ids["eos_id"]), ("start_id", ids["start_id"]), *(("stop_ids", id_) for id_ in stops)]
    if ids["pad_id"] is not None:
        named.append(("pad_id", ids["pad_id"]))
    for name, id_ in named:
        if type(id_) is not int or not 0 <= id_ < vocab_size:  # True is not an id
            raise TokenizerError(f"{name} has {id_!r}: the ids of this tokenizer are 0 to {vocab_size - 1}")
    if ids["eos_id"] not in stops:
        raise TokenizerError(f"stop_ids is {stops!r}: eos_id, {ids['eos_id']}, must be among them")


def _json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is damaged: {error}") from None
    return value if isinstance(value, dict) else {}


def _special_ids(
    tokenizer: tokenizers.Tokenizer, configs: Mapping[str, dict[str, Any]], special: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Return the ids of special tokens: those that the tokenizer's files name, then those of the model's."""
    named = {**special, **configs.get("tokenizer_config.json", {})}

    def listed(name: str) -> list[int]:
        """Return the ids of a token in the first of the model's files that names any."""
        values = [configs.get(file, {}).get(f"{name}_token_id") for file in _CONFIG_FILES]
        value: Any = next((value for value in values if value is not None), [])
        listing = value if isinstance(value, list) else [value]
        ids = [id_ for id_ in listing if type(id_) is int and 0 <= id_ < 2**32]  # -1: none; the package takes 32 bits
        return [id_ for id_ in dict.fromkeys(ids) if tokenizer.id_to_token(id_)]

    def find(name: str) -> int | None:
        token = named.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        id_ = tokenizer.token_to_id(text) if isinstance(text, str) else None
        return id_ if id_ is not None else next(iter(listed(name)), None)

    eos_id = find("eos")
    if eos_id is None:
        raise TokenizerError(
            f"{path}: nothing says which token ends a text: give its eos_token in tokenizer_config.json next to it"
        )
    bos_id = find("bos")
    first = tokenizer.encode("", add_special_tokens=True).ids[:1]
    begins = bos_id is not None and (first == [bos_id] or named.get("add_bos_token") is True)
    return {
        "eos_id": eos_id,
        "start_id": bos_id if begins else eos_id,
        "pad_id": find("pad"),
        "stop_ids": list(dict.fromkeys([eos_id, *listed("eos")])),
    }


def _without_surrogates(text: str) -> str:
    """Return a text with lone surrogates, which the package refuses, as U+FFFD, which is as many bytes."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def _decoder(content: bytes) -> Any:
    return json.loads(content).get("decoder")


def _bytes_of(name: str, to_bytes: Mapping[str, int] | None) -> bytes:
    """Return the bytes of a token that is not an added one."""
    if to_bytes is not None and all(character in to_bytes for character in name):
        return bytes(to_bytes[character] for character in name)
    if match := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(match[1], 16)])
    return name.replace("\u2581", " ").encode("utf-8", "replace")  # SentencePiece


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE (GPT-2): printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + index): byte for index, byte in enumerate(others)}
