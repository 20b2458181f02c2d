"""Free memory of this machine."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    # Limit, usage, statistics, and the statistic of pages of files that were not used lately.
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),  # version 2
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),  # version 1
)


def free_host_memory() -> int:
    """Return the bytes that this process could still allocate, within the limit of its container.

    Memory that the system can take back from its cache of files counts as free, in the container as outside of it.
    """
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: half of the physical memory
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for limit_file, usage_file, statistics_file, cache in _CGROUP_FILES:
        try:
            limit, usage = ((_CGROUP / name).read_text().strip() for name in (limit_file, usage_file))
        except OSError:
            continue
        if limit.isdigit():  # "max": no limit
            free = min(free, int(limit) - int(usage) + _statistic(_CGROUP / statistics_file, cache))
    return max(free, 1)


def _statistic(file: Path, name: str) -> int:
    """Return a value of a file of lines `name value`, 0 if it is not there."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
        return next((int(words[1]) for words in lines if words[:1] == [name]), 0)
    except (OSError, ValueError, IndexError):
        return 0
