"""Counting the keys of a corpus of any size in bounded memory, in one process or several with the same result.

Text is counted shard by shard (a text given by hand, or a stretch of a file), and shards are added up in their
order, so that the number of processes cannot matter.

Memory: when there are more than `MAX_KEYS` different keys, the rarest half of them or more is dropped, all up to one
count (after the lossy counting of Manku and Motwani, 2002). What that costs: a key that was dropped and comes again
is counted too low, never too high, and by no more than `KeyCounts.undercount`, the sum of the counts up to which keys
were dropped. A text of nothing but new words adds about one to it for each 32 MB shard: some 3,000 for 100 GB, of
which an entry of the vocabulary occurs hundreds of thousands of times; ordinary text, in which new words become
rare, adds much less. The peak is reached while a shard is added to a full table: see `MAX_KEYS`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizer.encoding.encoder import (
    PIECE,
    RUN_SIGNS,
    WHITE,
    blocks,
    long_form,
    split_any,
    split_first_word,
    split_plain,
)
from tokenizer.errors import TokenizerError
from tokenizer.units import MAX_KEY, cut_long_key

MAX_KEYS = 4_000_000
"""Different keys held at most, about 130 bytes each, 300 where they are long and rare characters.

Measured peaks of a process that counts only new words, shard by shard: 1.04 GB (10 letters), 0.79 GB (6 letters),
1.18 GB (30 characters beyond U+FFFF, 3.5 million keys held). Every further counting process takes up to 0.6 GB.
"""
SHARD_BYTES = 32 << 20
"""Bytes of a file that are counted at once."""
STRETCH = 8 << 20
"""Characters whose keys are counted before they are added to the others: what is held twice."""
SAMPLE_CHARACTERS = 24_000_000
"""Characters of running text kept for learning phrases; from larger corpora a sample spread over all of it."""
SAMPLE_BLOCK = 1 << 15


@dataclass
class KeyCounts:
    """Counted keys and a sample of the text. `limit` bounds the number of different keys (`MAX_KEYS`)."""

    limit: int = MAX_KEYS
    sample_limit: int = SAMPLE_CHARACTERS
    keys: Counter[str] = field(default_factory=Counter)
    sample: list[tuple[bytes, str]] = field(default_factory=list)
    characters: int = 0
    undercount: int = 0
    """No count is lower than the truth by more than this; 0 when nothing was dropped."""

    def add_text(self, text: str) -> None:
        """Count the keys of one text."""
        self.characters += len(text)
        word, rest = split_first_word(text)
        if word:
            self._add_key(word, 1)
        for stretch in blocks(rest, STRETCH) if rest else ():
            self._add_stretch(stretch)
            self._bound_keys()
        for block in blocks(text, SAMPLE_BLOCK):
            digest = hashlib.blake2b(block.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self.sample.append((digest, block))
        self._bound_sample()

    def _add_stretch(self, stretch: str) -> None:
        """Count the keys of a text that begins with white space."""
        short: Counter[str] = Counter()
        for piece in blocks(stretch, PIECE):
            keys = split_plain(piece)
            if not RUN_SIGNS.isdisjoint(keys):
                keys = split_any(piece)
            short.update(keys)
        for key in [key for key in short if len(key) >= MAX_KEY]:
            self._add_key(long_form(key), short.pop(key))
        counts = self.keys
        for key, count in short.items():
            full = key if key[:1] in WHITE else " " + key
            counts[full] = counts.get(full, 0) + count

    def _add_key(self, key: str, count: int) -> None:
        if len(key) > MAX_KEY:
            for part in cut_long_key(key):
                self.keys[part] += count
        else:
            self.keys[key] += count

    def merge(self, other: KeyCounts) -> None:
        """Add the counts of a later shard."""
        self.characters += other.characters
        self.undercount += other.undercount
        if self.keys:
            self.keys.update(other.keys)
        else:
            self.keys = other.keys
        self.sample += other.sample
        self._bound_keys()
        self._bound_sample()

    def _bound_keys(self) -> None:
        if len(self.keys) <= self.limit:
            return
        left, least = len(self.keys), 0
        for count, keys in sorted(Counter(self.keys.values()).items()):
            if left <= self.limit // 2:
                break
            left, least = left - keys, count
        self.undercount += least
        self.keys = Counter({key: count for key, count in self.keys.items() if count > least})

    def _bound_sample(self) -> None:
        size = sum(len(block) for _, block in self.sample)
        if size > self.sample_limit:
            self.sample.sort()
            while size > self.sample_limit:
                size -= len(self.sample.pop()[1])


def count_shard(path: str, start: int, stop: int) -> KeyCounts:
    """Count the bytes [start, stop) of a UTF-8 file, whose ends lie where a key begins."""
    counts = KeyCounts()
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


def shards_of(path: str) -> Iterator[tuple[str, int, int]]:
    """The stretches in which a file is counted: cut before a space or newline that follows something else."""
    size = Path(path).stat().st_size
    start = 0
    with Path(path).open("rb") as file:
        while size - start > SHARD_BYTES:
            file.seek(start + SHARD_BYTES)
            window = file.read(1 << 16)
            cut = next(
                (at for at in range(1, len(window)) if window[at] in b" \n" and window[at - 1] not in b" \n"), None
            )
            if cut is None:  # no white space in 64 KiB: cut at a character
                cut = next((at for at in range(len(window)) if window[at] & 0xC0 != 0x80), 0)
            stop = start + SHARD_BYTES + cut
            yield path, start, stop
            start = stop
    if start < size:
        yield path, start, size


def count_files(
    paths: Iterable[str], processes: int = 1, progress: Callable[[int, int], None] | None = None
) -> Iterator[KeyCounts]:
    """The counts of each shard of the files, in order, whatever the number of processes."""
    try:
        shards = [shard for path in paths for shard in shards_of(path)]
    except OSError as error:
        raise TokenizerError(f"cannot read {error.filename}: {error.strerror}") from None
    total = sum(stop - start for _, start, stop in shards)
    done = 0
    for (_, start, stop), counts in zip(shards, _counted(shards, processes), strict=True):
        done += stop - start
        if progress is not None:
            progress(done, total)
        yield counts


def _counted(shards: list[tuple[str, int, int]], processes: int) -> Iterator[KeyCounts]:
    try:
        if processes == 1 or len(shards) < 2:
            for shard in shards:
                yield count_shard(*shard)
            return
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        # "spawn": a forked child of a program with threads (JAX has many) can hang.
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = []
            for shard in shards:
                waiting.append(pool.submit(count_shard, *shard))
                if len(waiting) > 2 * processes:  # bounds the counts that wait in memory
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()
    except OSError as error:
        raise TokenizerError(f"cannot read {error.filename}: {error.strerror}") from None
