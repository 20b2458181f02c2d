"""Compare with other tokenizers on the user's own text: bytes per token and speed (`python -m tokenizer compare`)."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizer.errors import TokenizerError
from tokenizer.hybrid import HybridTokenizer
from tokenizer.inspect import baselines
from tokenizer.inspect.baselines import Baseline
from tokenizer.learning.text_files import find_files, read_text
from tokenizer.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_BLOCK = 1 << 14
_MIN_CHARACTERS = 1000
"""Characters needed for a comparison."""
_MIN_TIMED_BYTES = 200_000
"""Bytes of held-out text from which times are meaningful."""


@dataclass(frozen=True)
class Measurement:
    """One line of the comparison.

    Attributes:
        name: The tokenizer.
        bytes_per_token: UTF-8 bytes per token on the held-out text.
        encode_first: MB of UTF-8 text per second of processor time, first pass. None if there is too little text, as
            for the next two.
        encode_again: The same for a second pass over the same text, with warm caches.
        decode: The same for decoding.
    """

    name: str
    bytes_per_token: float
    encode_first: float | None
    encode_again: float | None
    decode: float | None


def hold_out(texts: list[str], one_in: int = 10) -> tuple[list[str], list[str]]:
    """Split texts into blocks, and the blocks into training text and held-out text.

    Args:
        texts: Texts of any length. Blocks have up to 16,384 characters; those of short texts are smaller, so that both
            parts get some.
        one_in: About one block in this many is held out, chosen by its hash; at least one.

    Returns:
        (blocks to learn from, blocks to measure on).
    """
    size = min(_BLOCK, 1 + sum(map(len, texts)) // (4 * one_in))
    blocks = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
    digests = [hashlib.sha256(block.encode("utf-8", "surrogatepass")).digest()[0] for block in blocks]
    held_out = [digest % one_in == 0 for digest in digests]
    if blocks and not any(held_out):
        held_out[digests.index(min(digests))] = True
    learn = [block for block, held in zip(blocks, held_out, strict=True) if not held]
    measure_on = [block for block, held in zip(blocks, held_out, strict=True) if held]
    return learn, measure_on


def measure(name: str, create: Callable[[], Baseline], text: str, rounds: int = 3) -> Measurement:
    """Measure one tokenizer on a text: the median over rounds, each with a new instance.

    Args:
        name: The name in the table.
        create: Returns a tokenizer with empty caches.
        text: Held-out text.
        rounds: Number of rounds.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size < _MIN_TIMED_BYTES:
        return Measurement(name, size / len(create().encode(text)), None, None, None)
    first = []
    again = []
    decoding = []
    for _ in range(rounds):
        tokenizer = create()
        first.append(_seconds(partial(tokenizer.encode, text)))
        again.append(_seconds(partial(tokenizer.encode, text)))
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)  # builds its tables
        decoding.append(_seconds(partial(tokenizer.decode, ids)))

    def speed(times: list[float]) -> float:
        return size / 1e6 / max(sorted(times)[rounds // 2], 1e-9)

    return Measurement(name, size / max(1, len(ids)), speed(first), speed(again), speed(decoding))


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(patterns: list[str], vocab_size: int, pretrained: list[str]) -> list[Measurement]:
    """Train every available tokenizer on nine tenths of the text and measure it on the rest.

    What is measured, and libraries that are left out, are logged at level INFO.

    Args:
        patterns: Paths or glob patterns of UTF-8 text files.
        vocab_size: Number of ids that each tokenizer learns.
        pretrained: Names of pretrained tokenizers to measure as well.

    Raises:
        TokenizerError: A file cannot be read, there is too little text, or a name is unknown.
    """
    learn, measure_on = hold_out([read_text(path) for path in find_files(patterns)])
    text = "".join(measure_on)
    training_characters = sum(map(len, learn))
    if len(text) + training_characters < _MIN_CHARACTERS:
        raise TokenizerError(f"too little text to compare on: give files with at least {_MIN_CHARACTERS} characters")
    logger.info(
        "learning %d entries from %d characters, measuring on %d others", vocab_size, training_characters, len(text)
    )
    if len(text.encode("utf-8", "surrogatepass")) < _MIN_TIMED_BYTES:
        needed = 10 * _MIN_TIMED_BYTES / 1e6
        logger.info("too little text to measure speed: that takes files of about %.0f MB or more", needed)
    own = HybridTokenizer()
    for block in learn:
        own.add_text(block)
    own.freeze_vocab(vocab_size=vocab_size)
    vocabularies = {"HybridTokenizer": own._vocabulary}
    for name in pretrained:
        vocabularies[f"HybridTokenizer {name}"] = HybridTokenizer.pretrained(name)._vocabulary
    measurements = [
        measure(name, partial(_with_empty_cache, vocabulary), text) for name, vocabulary in vocabularies.items()
    ]
    for baseline in _train_baselines(learn, vocab_size):
        measurements.append(measure(baseline.name, partial(_same, baseline), text))
    return measurements


def _with_empty_cache(vocabulary: Vocabulary) -> Baseline:
    tokenizer = HybridTokenizer.from_vocabulary(vocabulary)
    tokenizer.encode_array("build the tables " * 100)
    return Baseline("HybridTokenizer", tokenizer.encode_array, tokenizer.decode)


def _same(baseline: Baseline) -> Baseline:
    return baseline


def _train_baselines(texts: list[str], vocab_size: int) -> list[Baseline]:
    """Train the tokenizers of the installed libraries; log the ones that are left out."""
    installed = baselines.installed_libraries()
    trained = []
    if baselines.HUGGING_FACE in installed:
        model: Any = baselines.train_hugging_face(texts, vocab_size)
        trained.append(baselines.hugging_face(model))
        if baselines.TIKTOKEN in installed:
            trained.append(baselines.tiktoken_from(model))
    if baselines.SENTENCEPIECE in installed:
        try:
            trained.append(baselines.train_sentencepiece(texts, vocab_size))
        except RuntimeError as error:  # for example: it needs an entry for every character
            logger.info("sentencepiece is left out: %s", str(error).splitlines()[0])
    missing = {baselines.HUGGING_FACE, baselines.TIKTOKEN, baselines.SENTENCEPIECE} - set(installed)
    if missing:
        logger.info("not installed and left out: %s", ", ".join(sorted(missing)))
    if baselines.TIKTOKEN in installed and baselines.HUGGING_FACE not in installed:
        logger.info("tiktoken is left out: its merges are learned with Hugging Face tokenizers, which is not installed")
    return trained


def format_table(measurements: list[Measurement]) -> str:
    """Format measurements as a table, with speeds only if all of them were measured."""
    width = max(len(row.name) for row in measurements)
    lines = [f"{'':{width}}  bytes/token"]
    with_speed = all(row.decode is not None for row in measurements)
    if with_speed:
        lines[0] += "  encode MB/s: first pass  again  decode MB/s"
    for row in measurements:
        line = f"{row.name:{width}}  {row.bytes_per_token:11.3f}"
        if with_speed:
            line += f"  {row.encode_first:23.1f}  {row.encode_again:5.1f}  {row.decode:11.1f}"
        lines.append(line)
    return "\n".join(lines)
