"""Count the pre-tokens of a corpus of any size in bounded memory, with the same result in one or several processes.

Text is counted shard by shard (a text passed by the caller, or part of a file), and shards are added up in order, so
the number of processes cannot affect the result.

Memory: when there are more than `MAX_PRETOKENS` distinct pre-tokens, at least the rarest half of them is dropped, by
count (after the lossy counting of Manku and Motwani, 2002). A pre-token that was dropped and occurs again is counted
too low, never too high, and by at most `PretokenCounts.undercount`, the sum of the counts up to which pre-tokens were
dropped. A text of nothing but new words adds about 1 to it per 32 MB shard: about 3,000 for 100 GB, in which an entry
of the vocabulary occurs hundreds of thousands of times. Ordinary text, in which new words become rare, adds much less.
Memory peaks while a shard is added to a full table: see `MAX_PRETOKENS`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tokenizer.encoding.pretokenization import (
    MAX_PRETOKEN,
    UNSPLIT_RUNS,
    expand,
    split_any,
    split_blocks,
    split_first_word,
    split_long_pretoken,
    split_plain,
)
from tokenizer.errors import TokenizerError

MAX_PRETOKENS = 4_000_000
"""Maximum number of distinct pre-tokens, about 130 bytes each, or 300 for long ones of rare characters.

Measured peaks of a process that counts only new words, shard by shard: 1.04 GB (10 letters), 0.79 GB (6 letters),
1.18 GB (30 characters beyond U+FFFF, 3.5 million pre-tokens). Every further counting process takes up to 0.6 GB.
"""
SHARD_BYTES = 32 << 20
"""Bytes of a file that are counted at once."""
CHUNK_CHARACTERS = 8 << 20
"""Characters whose pre-tokens are counted before they are added to the others; this part is held twice."""
SAMPLE_CHARACTERS = 24_000_000
"""Characters of running text kept for learning phrases; of larger corpora, a sample spread over all of it."""
_SAMPLE_BLOCK = 1 << 15
_SPLIT_BLOCK = 1 << 12
"""Characters that are split at once: the pieces are then still in the processor's cache."""
_BOUNDARY_WINDOW = 1 << 16
"""Bytes that are searched for a boundary between pre-tokens at the end of a shard."""


class Shard(NamedTuple):
    """The bytes [start, stop) of a file."""

    path: str
    start: int
    stop: int


@dataclass
class PretokenCounts:
    """Counts of pre-tokens and a sample of the running text.

    Attributes:
        portable: Whether the pre-tokens are those of portable tokenizers; then there is no sample of the text.
        limit: Maximum number of distinct pre-tokens.
        sample_limit: Maximum length of the sample in characters.
        pretokens: {pre-token: count}.
        sample: (hash, text) of blocks of the text; the blocks with the smallest hashes are kept.
        characters: Number of characters counted.
        undercount: No count is too low by more than this; 0 if nothing was dropped.
    """

    portable: bool = False
    limit: int = MAX_PRETOKENS
    sample_limit: int = SAMPLE_CHARACTERS
    pretokens: Counter[str] = field(default_factory=Counter)
    sample: list[tuple[bytes, str]] = field(default_factory=list)
    characters: int = 0
    undercount: int = 0

    def add_text(self, text: str) -> None:
        """Count the pre-tokens of one text."""
        self.characters += len(text)
        if self.portable:
            from tokenizer.portable.pretokens import count_pretokens  # compiles patterns, which others do not need

            for counts in count_pretokens(text):
                self.pretokens.update(counts)
                self._bound_pretokens()
            return
        word, rest = split_first_word(text)
        if word:
            self._add_pretoken(word, 1)
        if rest:
            for chunk in split_blocks(rest, CHUNK_CHARACTERS):
                self._add_chunk(chunk)
                self._bound_pretokens()
        for block in split_blocks(text, _SAMPLE_BLOCK):
            digest = hashlib.blake2b(block.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self.sample.append((digest, block))
        self._bound_sample()

    def _add_chunk(self, chunk: str) -> None:
        """Count the pre-tokens of a text that starts with white space."""
        short_counts: Counter[str] = Counter()
        for block in split_blocks(chunk, _SPLIT_BLOCK):
            pretokens = split_plain(block)
            if not UNSPLIT_RUNS.isdisjoint(pretokens):
                pretokens = split_any(block)
            short_counts.update(pretokens)
        for short in [short for short in short_counts if len(short) >= MAX_PRETOKEN]:
            self._add_pretoken(expand(short), short_counts.pop(short))
        counts = self.pretokens
        for short, count in short_counts.items():
            pretoken = expand(short)
            counts[pretoken] = counts.get(pretoken, 0) + count

    def _add_pretoken(self, pretoken: str, count: int) -> None:
        for part in split_long_pretoken(pretoken):
            self.pretokens[part] += count

    def merge(self, other: PretokenCounts) -> None:
        """Add the counts of a later shard."""
        self.characters += other.characters
        self.undercount += other.undercount
        if self.pretokens:
            self.pretokens.update(other.pretokens)
        else:
            self.pretokens = other.pretokens
        self.sample += other.sample
        self._bound_pretokens()
        self._bound_sample()

    def _bound_pretokens(self) -> None:
        """Drop all pre-tokens up to a count such that at most half of the limit remains."""
        if len(self.pretokens) <= self.limit:
            return
        remaining = len(self.pretokens)
        threshold = 0
        for count, pretokens in sorted(Counter(self.pretokens.values()).items()):
            if remaining <= self.limit // 2:
                break
            remaining -= pretokens
            threshold = count
        self.undercount += threshold
        self.pretokens = Counter({pretoken: count for pretoken, count in self.pretokens.items() if count > threshold})

    def _bound_sample(self) -> None:
        size = sum(len(block) for _, block in self.sample)
        if size > self.sample_limit:
            self.sample.sort()
            while size > self.sample_limit:
                size -= len(self.sample.pop()[1])


def count_files(
    paths: Iterable[str],
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
    portable: bool = False,
) -> Iterator[PretokenCounts]:
    """Yield the counts of each shard of the files, in order, independent of the number of processes.

    Args:
        paths: UTF-8 text files.
        processes: Number of processes that count.
        progress: Called as progress(bytes counted, bytes in total).
        portable: Count the pre-tokens of portable tokenizers.

    Raises:
        TokenizerError: A file cannot be read or is not UTF-8.
    """
    try:
        shards = [shard for path in paths for shard in split_file(path)]
    except OSError as error:
        raise TokenizerError(f"cannot read {error.filename}: {error.strerror}") from None
    total = sum(shard.stop - shard.start for shard in shards)
    done = 0
    for shard, counts in zip(shards, _count_shards(shards, processes, portable), strict=True):
        done += shard.stop - shard.start
        if progress is not None:
            progress(done, total)
        yield counts


def split_file(path: str) -> Iterator[Shard]:
    """Yield the shards of a file, split before a space or newline that follows another character."""
    size = Path(path).stat().st_size
    start = 0
    with Path(path).open("rb") as file:
        while size - start > SHARD_BYTES:
            file.seek(start + SHARD_BYTES)
            stop = start + SHARD_BYTES + _find_boundary(file.read(_BOUNDARY_WINDOW))
            yield Shard(path, start, stop)
            start = stop
    if start < size:
        yield Shard(path, start, size)


def _find_boundary(window: bytes) -> int:
    """Return the offset of the first pre-token boundary; without white space, of the first character boundary."""
    for offset in range(1, len(window)):
        if window[offset] in b" \n" and window[offset - 1] not in b" \n":
            return offset
    for offset in range(len(window)):
        if window[offset] & 0xC0 != 0x80:  # not a UTF-8 continuation byte
            return offset
    return 0


def count_shard(shard: Shard, portable: bool = False) -> PretokenCounts:
    """Count a shard, whose ends are boundaries between pre-tokens.

    Raises:
        TokenizerError: The file is not UTF-8.
    """
    path, start, stop = shard
    counts = PretokenCounts(portable=portable)
    with Path(path).open("rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    try:
        counts.add_text(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{path} is not UTF-8 text (byte {start + error.start}): "
            "convert it, for example with iconv, or leave it out"
        ) from None
    return counts


def _count_shards(shards: list[Shard], processes: int, portable: bool) -> Iterator[PretokenCounts]:
    try:
        if processes == 1 or len(shards) < 2:
            for shard in shards:
                yield count_shard(shard, portable)
            return
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        # "spawn": a forked child of a program with threads (JAX has many) can hang.
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            pending = []
            for shard in shards:
                pending.append(pool.submit(count_shard, shard, portable))
                if len(pending) > 2 * processes:  # bounds the number of results held in memory
                    yield pending.pop(0).result()
            for future in pending:
                yield future.result()
    except OSError as error:
        raise TokenizerError(f"cannot read {error.filename}: {error.strerror}") from None
