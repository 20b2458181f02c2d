"""`python -m tokenizer compare`: bytes per token and speed beside other tokenizers, on the user's own text."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizer.errors import TokenizerError
from tokenizer.files import matching_files
from tokenizer.hybrid import HybridTokenizer
from tokenizer.inspect import rivals

_BLOCK = 1 << 14
_LEAST = 1000
"""Characters of which a comparison needs at least so many."""
_TIMED = 200_000
"""Bytes from which on the time that a tokenizer takes says something."""


@dataclass(frozen=True)
class Row:
    """One line of the comparison; speeds in MB of UTF-8 text per second of processor time, None for too little text."""

    name: str
    bytes_per_token: float
    encode_first: float | None
    encode_again: float | None
    decode: float | None


def read_texts(patterns: list[str]) -> list[str]:
    """The texts of UTF-8 files, named by paths or globs. Raises TokenizerError when one cannot be read."""
    texts = []
    for path in matching_files(patterns):
        try:
            texts.append(Path(path).read_bytes().decode("utf-8"))
        except OSError as error:
            raise TokenizerError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 text (byte {error.start})") from None
    return texts


def hold_out(texts: list[str], share: int = 10) -> tuple[list[str], list[str]]:
    """(to learn from, to measure with): blocks of up to 16 k characters, about one in `share` chosen by its hash.

    At least one block is held out, and of small texts the blocks are small, that there be some of each.
    """
    size = min(_BLOCK, 1 + sum(map(len, texts)) // (4 * share))
    blocks = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
    digests = [hashlib.sha256(block.encode("utf-8", "surrogatepass")).digest()[0] for block in blocks]
    chosen = [digest % share == 0 for digest in digests]
    if blocks and not any(chosen):
        chosen[digests.index(min(digests))] = True
    learn = [block for block, held_out in zip(blocks, chosen, strict=True) if not held_out]
    return learn, [block for block, held_out in zip(blocks, chosen, strict=True) if held_out]


def measure(
    name: str, fresh: Callable[[], tuple[Callable[[str], Any], Callable[[Any], str]]], text: str, rounds: int = 3
) -> Row:
    """Time one tokenizer on a text: each round on a fresh one, first and second pass; the median counts."""
    size = len(text.encode("utf-8", "surrogatepass")) / 1e6
    if size * 1e6 < _TIMED:
        return Row(name, size * 1e6 / len(fresh()[0](text)), None, None, None)
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
    if len(text) + sum(map(len, learn)) < _LEAST:
        raise TokenizerError(f"too little text to compare on: give files of together at least {_LEAST} characters")
    say(f"learning {vocab_size} entries from {sum(map(len, learn))} characters, measuring on {len(text)} others")
    if len(text.encode("utf-8", "surrogatepass")) < _TIMED:
        say(f"too little text to measure speed: that takes files of about {10 * _TIMED / 1e6:.0f} MB or more")
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
    """The rows as a table; speeds only where they were measured."""
    width = max(len(row.name) for row in rows)
    head, lines = f"{'':{width}}  bytes/token", [f"{row.name:{width}}  {row.bytes_per_token:11.3f}" for row in rows]
    if all(row.decode is not None for row in rows):
        head += "  encode MB/s: first pass  again  decode MB/s"
        lines = [
            f"{line}  {row.encode_first:23.1f}  {row.encode_again:5.1f}  {row.decode:11.1f}"
            for line, row in zip(lines, rows, strict=True)
        ]
    return "\n".join([head, *lines])
