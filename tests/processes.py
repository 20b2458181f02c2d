"""Commands in processes of their own: their environment, waiting for what they do, and killing them."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


class Process(subprocess.Popen):
    """A process that a test starts: killed if its `with` block raises, and when the test ends.

    `subprocess.Popen` waits for the end of the process in both cases, or leaves it behind.
    """

    started: ClassVar[list["Process"]] = []

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.started.append(self)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *rest)


@contextlib.contextmanager
def ended_processes() -> Iterator[None]:
    """Kill the processes that were started in the block and are running at its end."""
    count = len(Process.started)
    try:
        yield
    finally:
        for process in Process.started[count:]:
            with process:
                process.kill()  # does nothing to one that has ended
        del Process.started[count:]


def command_environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """Return the environment of a command with its own data cache and `devices` CPU devices.

    Programs are compiled as conftest.py says, and shared with all other processes of the session.
    """
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags, "XDG_CACHE_HOME": str(cache)}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | None, seconds: float = 120.0) -> None:
    """Wait until the condition holds; the process must not end before that."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.001)


def kill_at(command: Sequence[str], instants: Iterable[Callable[[], bool]], environment: dict[str, str]) -> None:
    """Start a command once for each instant, and kill it with SIGKILL when the condition of the instant holds."""
    for instant in instants:
        process = Process(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(instant, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL


def kill_at_random_instants(
    start: Callable[[], subprocess.Popen],
    seconds: tuple[float, float],
    kills: int,
    begin_again: Callable[[], object],
) -> None:
    """Start processes one after the other and kill each at a random instant, until `kills` were killed.

    Args:
        start: Starts a process that continues the work of the killed ones.
        seconds: The earliest and the latest instant, in seconds after the start.
        kills: The number of kills, and the seed of the instants.
        begin_again: Removes the results of a process that ended before its kill.
    """
    random = np.random.default_rng(kills)
    killed = 0
    while killed < kills:
        process = start()
        try:  # any instant, from the first import to the last write
            process.wait(timeout=random.uniform(*seconds))
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        if process.returncode == 0:
            begin_again()
        else:
            killed += 1
