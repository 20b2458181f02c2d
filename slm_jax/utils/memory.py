"""Free memory of this machine."""

import os
from pathlib import Path

_CGROUP_FILES = (
    ("memory.max", "memory.current"),  # version 2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
)


def free_host_memory() -> int:
    """Return the bytes that this process could still allocate, within the limit of its container."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: half of the physical memory
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for limit_file, usage_file in _CGROUP_FILES:
        try:
            limit, usage = ((Path("/sys/fs/cgroup") / name).read_text().strip() for name in (limit_file, usage_file))
        except OSError:
            continue
        if limit.isdigit():  # "max": no limit
            free = min(free, int(limit) - int(usage))
    return max(free, 1)
