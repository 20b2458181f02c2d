"""Texts to token ids on all cores: worker processes that know nothing but the tokenizer.

They are plain processes that talk through pipes (`python -m slm_jax.data.corpus.encode TOKENIZER`), so that neither the
caller's threads (JAX has many) nor its main module matter to them.
"""

import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TypeVar

import numpy as np

from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer

_ALONE = 8 << 20  # characters; less is encoded sooner than workers have started
Group = TypeVar("Group")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_groups(
    groups: Iterable[tuple[Group, Sequence[str]]], tokenizer: HybridTokenizer, saved: Path, workers: int = 0
) -> Generator[tuple[Group, list[np.ndarray]]]:
    """Each group with the ids (int32 [T]) of its texts, in order. Reads ahead by a few groups.

    saved: the tokenizer's file, for the workers. workers: processes; 0: one for each core, 1: this one alone.
    """
    workers = workers or usable_cores()
    groups, done = iter(groups), 0
    while workers == 1 or done < _ALONE:
        group, texts = next(groups, (None, None))
        if texts is None:
            return
        yield group, tokenizer.encode_arrays(texts)  # type: ignore[misc]
        done += sum(map(len, texts))
    yield from _encode_in_workers(groups, saved, workers)


def _encode_in_workers(
    groups: Iterator[tuple[Group, Sequence[str]]], saved: Path, workers: int
) -> Iterator[tuple[Group, list[np.ndarray]]]:
    command = [sys.executable, "-m", "slm_jax.data.corpus.encode", str(saved.absolute())]
    home = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
    processes = []

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        process = free.get()
        try:
            return _ask(process, texts)
        finally:
            free.put(process)

    pending: deque[tuple[Group, Future[list[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            environment = {**os.environ, "PYTHONPATH": path}
            processes.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
                )
            )
            free.put(processes[-1])
        for group, texts in groups:
            pending.append((group, pool.submit(encode, texts)))
            if len(pending) > 2 * workers:
                first, found = pending.popleft()
                yield first, found.result()
        while pending:
            first, found = pending.popleft()
            yield first, found.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.communicate()


def _ask(process: "subprocess.Popen[bytes]", texts: Sequence[str]) -> list[np.ndarray]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _send(process.stdin, [text.encode("utf-8", "surrogatepass") for text in texts])
        return [np.frombuffer(data, np.int32) for data in _receive(process.stdout)]
    except (BrokenPipeError, EOFError):
        raise UserError(
            f"a process that encodes text has ended (status {process.wait()}), perhaps for want of memory: "
            "give the same command again, with --data.workers 1 if it happens again"
        ) from None


def _send(pipe: IO[bytes], items: Sequence[bytes]) -> None:
    """The number of items, their lengths (uint64 each), the items."""
    pipe.write(struct.pack(f"<{len(items) + 1}Q", len(items), *map(len, items)))
    pipe.write(b"".join(items))
    pipe.flush()


def _receive(pipe: IO[bytes]) -> list[bytes]:
    """What `_send` wrote. Raises EOFError at the end."""
    (count,) = struct.unpack("<Q", _read(pipe, 8))
    lengths = struct.unpack(f"<{count}Q", _read(pipe, 8 * count))
    data, items, start = _read(pipe, sum(lengths)), [], 0
    for length in lengths:
        items.append(data[start : start + length])
        start += length
    return items


def _read(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _work(path: str) -> None:
    tokenizer = HybridTokenizer.load(path)
    while True:  # until the caller is gone, however it ended
        texts = [data.decode("utf-8", "surrogatepass") for data in _receive(sys.stdin.buffer)]
        _send(sys.stdout.buffer, [ids.tobytes() for ids in tokenizer.encode_arrays(texts)])


if __name__ == "__main__":
    try:
        _work(sys.argv[1])
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody listens any more
