"""`python -m tokenizer compare`: bytes per token and speed beside other tokenizers, on the user's own text."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizer import rivals
from tokenizer.errors import TokenizerError
from tokenizer.hybrid import HybridTokenizer

_BLOCK = 1 << 14


@dataclass(frozen=True)
class Row:
    """One line of the comparison; speeds in MB of UTF-8 text per second of processor time."""

    name: str
    bytes_per_token: float
    encode_first: float
    encode_again: float
    decode: float


def read_texts(paths: list[str]) -> list[str]:
    """The texts of UTF-8 files. Raises TokenizerError when one cannot be read."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_bytes().decode("utf-8"))
        except OSError as error:
            raise TokenizerError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 text (byte {error.start})") from None
    return texts


def hold_out(texts: list[str], share: int = 10) -> tuple[list[str], list[str]]:
    """(to learn from, to measure with): blocks of 16 k characters, about one in `share` chosen by its hash."""
    learn: list[str] = []
    measure: list[str] = []
    for text in texts:
        for start in range(0, len(text), _BLOCK):
            block = text[start : start + _BLOCK]
            digest = hashlib.sha256(block.encode("utf-8", "surrogatepass")).digest()
            (measure if digest[0] % share == 0 else learn).append(block)
    return learn, measure


def measure(
    name: str, fresh: Callable[[], tuple[Callable[[str], Any], Callable[[Any], str]]], text: str, rounds: int = 3
) -> Row:
    """Time one tokenizer on a text: each round on a fresh one, first and second pass; the median counts."""
    size = len(text.encode("utf-8", "surrogatepass")) / 1e6
    first, again, back = [], [], []
    for _ in range(rounds):
        encode, decode = fresh()
        first.append(_seconds(partial(encode, text)))
        again.append(_seconds(partial(encode, text)))
        ids = encode(text)
        decode(ids)
        back.append(_seconds(partial(decode, ids)))
    middle = [size / max(sorted(times)[rounds // 2], 1e-9) for times in (first, again, back)]
    return Row(name, size * 1e6 / max(1, len(ids)), *middle)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _same(rival: rivals.Rival) -> tuple[Callable[[str], Any], Callable[[Any], str]]:
    return rival.encode, rival.decode


def compare(paths: list[str], vocab_size: int, ready: list[str], say: Callable[[str], None]) -> list[Row]:
    """Learn from nine tenths of the files with every tokenizer there is, measure on the rest."""
    learn, measured = hold_out(read_texts(paths))
    text = "".join(measured)
    if not learn or not text:
        raise TokenizerError("too little text to compare on: give files of together at least 500 kB")
    say(f"learning {vocab_size} entries from {sum(map(len, learn))} characters, measuring on {len(text)} others")
    own = HybridTokenizer()
    for block in learn:
        own.add_text(block)
    own.freeze_vocab(vocab_size=vocab_size)
    vocabularies = {"HybridTokenizer": own._vocabulary}
    vocabularies.update({f"HybridTokenizer {name}": HybridTokenizer.pretrained(name)._vocabulary for name in ready})

    def renew(vocabulary: Any) -> tuple[Callable[[str], Any], Callable[[Any], str]]:
        tokenizer = HybridTokenizer.from_vocabulary(vocabulary)
        tokenizer.encode_array("load its tables " * 100)
        return tokenizer.encode_array, tokenizer.decode

    rows = [measure(name, partial(renew, vocabulary), text) for name, vocabulary in vocabularies.items()]
    others = []
    present = rivals.installed()
    if "Hugging Face tokenizers" in present:
        trained = rivals.train_hugging_face(learn, vocab_size)
        others.append(rivals.hugging_face(trained))
        if "tiktoken" in present:
            others.append(rivals.tiktoken_of(trained))
    if "sentencepiece" in present:
        try:
            others.append(rivals.train_sentencepiece(learn, vocab_size))
        except RuntimeError as error:  # it wants an entry for every character, for example
            say(f"sentencepiece is not compared: {str(error).splitlines()[0]}")
    for other in others:
        rows.append(measure(other.name, partial(_same, other), text))
    missing = {"Hugging Face tokenizers", "tiktoken", "sentencepiece"} - set(present)
    if missing:
        say(f"not installed, hence not compared: {', '.join(sorted(missing))}")
    if "tiktoken" in present and "Hugging Face tokenizers" not in present:
        say("tiktoken is not compared: its merges are learned with Hugging Face tokenizers, which are not installed")
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a table."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  bytes/token  encode MB/s: first pass  again  decode MB/s"]
    lines += [
        f"{row.name:{width}}  {row.bytes_per_token:11.3f}  {row.encode_first:23.1f}  {row.encode_again:5.1f}"
        f"  {row.decode:11.1f}"
        for row in rows
    ]
    return "\n".join(lines)
