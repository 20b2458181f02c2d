"""Encode texts on all cores, in worker processes that know nothing but the tokenizer.

The workers are plain processes that communicate through pipes (`python -m slm_jax.data.corpus.encode TOKENIZER`), not
forks or a `multiprocessing` pool: they are independent of the caller's threads (JAX has many) and of its main module.
"""

import json
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

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.data.corpus.marks import marked_ids
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer
from slm_jax.utils.tokenizer_loading import load_tokenizer

# Characters that are encoded in this process before workers start; less text takes less time than starting them.
MIN_PARALLEL = 8 << 20
_GROUPS_AHEAD = 2  # groups per worker that are read ahead
Group = TypeVar("Group")
Item = str | tuple[Message, ...]  # a text or a conversation
_TEXT, _CONVERSATION = b"t", b"c"


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ItemEncoder:
    """Encode texts and conversations."""

    def __init__(self, tokenizer: TextTokenizer):
        """Take the tokenizer; its chat template is read when it is needed."""
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None

    def encode(self, items: Sequence[Item]) -> list[np.ndarray]:
        """Return the ids of each item, int32 [T]; those of a conversation have marks (see `marks`).

        Raises:
            UserError: The tokenizer has no chat template, or its template rejects a conversation.
        """
        texts = iter(self._tokenizer.encode_arrays([item for item in items if isinstance(item, str)]))
        return [next(texts) if isinstance(item, str) else self._conversation(item) for item in items]

    def _conversation(self, messages: Sequence[Message]) -> np.ndarray:
        """Return the ids of a conversation; the <EOS> before it is that of the document before."""
        if self._template is None:
            self._template = ChatTemplate.of(self._tokenizer)
        ids = marked_ids(self._template.encode(messages))
        eos = self._tokenizer.eos_id
        begins_with_eos = self._tokenizer.start_id == eos and ids.size and ids[0] & 0x7FFFFFFF == eos
        return ids[1:] if begins_with_eos else ids


def encode_groups(
    groups: Iterable[tuple[Group, Sequence[Item]]], tokenizer: TextTokenizer, tokenizer_file: Path, workers: int = 0
) -> Generator[tuple[Group, list[np.ndarray]]]:
    """Encode groups of texts and conversations, reading ahead by a few groups.

    Args:
        groups: Pairs (group, items).
        tokenizer: The tokenizer.
        tokenizer_file: Where it is saved, for the workers.
        workers: Number of processes; 0: one per core; 1: this process only.

    Yields:
        Pairs (group, token ids int32 [T] of each item, see `ItemEncoder.encode`) in the order of the groups.

    Raises:
        UserError: A worker has died.
    """
    workers = workers or usable_cores()
    remaining = iter(groups)
    encoder = ItemEncoder(tokenizer)
    encoded = 0
    while workers == 1 or encoded < MIN_PARALLEL:
        group, items = next(remaining, (None, None))
        if items is None:
            return
        yield group, encoder.encode(items)  # type: ignore[misc]
        encoded += sum(map(_size, items))
    yield from _encode_in_workers(remaining, tokenizer_file, workers)


def _size(item: Item) -> int:
    return len(item) if isinstance(item, str) else sum(len(message.content) for message in item)


def _encode_in_workers(
    groups: Iterator[tuple[Group, Sequence[Item]]], tokenizer_file: Path, workers: int
) -> Iterator[tuple[Group, list[np.ndarray]]]:
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
    processes = []

    def encode(items: Sequence[Item]) -> list[np.ndarray]:
        process = idle.get()
        try:
            return _encode_remotely(process, items)
        finally:
            idle.put(process)

    pending: deque[tuple[Group, Future[list[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            process = _start_worker(tokenizer_file)
            processes.append(process)
            idle.put(process)
        for group, items in groups:
            pending.append((group, pool.submit(encode, items)))
            if len(pending) > _GROUPS_AHEAD * workers:
                first, result = pending.popleft()
                yield first, result.result()
        while pending:
            first, result = pending.popleft()
            yield first, result.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.communicate()


def _start_worker(tokenizer_file: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "slm_jax.data.corpus.encode", str(tokenizer_file.absolute())]
    root = str(Path(__file__).parents[3])
    python_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # A process is of one core; the package tokenizers would start a thread for each.
    environment = {**os.environ, "PYTHONPATH": python_path, "TOKENIZERS_PARALLELISM": "false"}
    # A process group of its own: Ctrl-C in the terminal reaches the caller only, which then ends the workers.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0)


def _encode_remotely(process: "subprocess.Popen[bytes]", items: Sequence[Item]) -> list[np.ndarray]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _send(process.stdin, list(map(_to_bytes, items)))
        return [np.frombuffer(data, np.int32) for data in _receive(process.stdout)]
    except (BrokenPipeError, EOFError):
        raise UserError(
            f"a process that encodes text has died (status {process.wait()}), perhaps out of memory: "
            "give the same command again, with --data.workers 1 if it happens again"
        ) from None


def _to_bytes(item: Item) -> bytes:
    if isinstance(item, str):
        return _TEXT + item.encode("utf-8", "surrogatepass")
    return _CONVERSATION + json.dumps(item).encode()


def _from_bytes(data: bytes) -> Item:
    if data.startswith(_TEXT):
        return data[1:].decode("utf-8", "surrogatepass")
    return tuple(Message(*message) for message in json.loads(data[1:]))


def _send(pipe: IO[bytes], items: Sequence[bytes]) -> None:
    """Write the number of items, their lengths (uint64 each), and the items."""
    pipe.write(struct.pack(f"<{len(items) + 1}Q", len(items), *map(len, items)))
    pipe.write(b"".join(items))
    pipe.flush()


def _receive(pipe: IO[bytes]) -> list[bytes]:
    """Read items written by `_send`; raises EOFError if the other side has closed the pipe."""
    (count,) = struct.unpack("<Q", _read(pipe, 8))
    lengths = struct.unpack(f"<{count}Q", _read(pipe, 8 * count))
    data = _read(pipe, sum(lengths))
    items = []
    start = 0
    for length in lengths:
        items.append(data[start : start + length])
        start += length
    return items


def _read(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _run_worker(tokenizer_file: str) -> None:
    encoder = ItemEncoder(load_tokenizer(tokenizer_file))
    while True:  # until the caller has closed the pipe or died
        items = list(map(_from_bytes, _receive(sys.stdin.buffer)))
        _send(sys.stdout.buffer, [ids.tobytes() for ids in encoder.encode(items)])


if __name__ == "__main__":
    try:
        _run_worker(sys.argv[1])
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody reads the output any more
