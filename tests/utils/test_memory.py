"""Free memory within the limit of a container, whose cache of files can be taken back."""

import pytest

from slm_jax.utils import memory

FILES = {
    2: ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    1: (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
}


def write(folder, version, limit, usage, cached):
    *names, statistic = FILES[version]
    (folder / "memory").mkdir()
    for name, text in zip(names, (limit, usage, f"anon 5\n{statistic} {cached}\nfile 7"), strict=True):
        (folder / name).write_text(f"{text}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_cache_of_files_in_a_container_is_free(tmp_path, monkeypatch, version):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    write(tmp_path, version, limit=2_000_000, usage=1_900_000, cached=600_000)
    assert memory.free_host_memory() == 700_000
    (tmp_path / FILES[version][2]).unlink()
    assert memory.free_host_memory() == 100_000


def test_a_container_without_a_limit_has_the_memory_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    write(tmp_path, 2, limit="max", usage=10**15, cached=0)
    assert memory.free_host_memory() > 10_000_000
