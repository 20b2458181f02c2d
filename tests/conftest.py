"""Eight simulated devices for every test, compiled programs that all processes share, one worker per processor."""

import atexit
import gc
import os
import shutil
import tempfile
import time
from pathlib import Path

from tests.processes import ended_processes
from tests.xla_flags import is_known_flag

# Compiling is most of the time of these tests. With the least effort, without the emitters of fused operations written
# in MLIR, and with one piece of code for LLVM instead of one per thread, it takes a quarter; flags of the environment,
# such as --xla_backend_optimization_level=3, come last and count. XLA ends the process at flags that it does not know,
# which may be so in later versions.
EFFORT = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit them
    flags = [flag for flag in EFFORT if is_known_flag(flag)]
    os.environ["XLA_FLAGS"] = " ".join(
        [*flags, "--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")]
    )

# JAX's persistent compilation cache, also for the processes that tests start. Its folder is that of the environment,
# so that sessions can share it, or a new one for this session; the workers of pytest-xdist inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="slm_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("thorough", max_examples=300)  # in .ci/run; the default is 100
settings.register_profile("long", max_examples=25_000)  # pytest -m slow --hypothesis-profile long

MAX_WORKERS = 8
"""Each takes about 2 GB."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Distribute the whole suite to one worker per processor, unless -n is given; run single files in this process."""
    if hasattr(config, "workerinput") or not hasattr(config.option, "numprocesses"):
        return  # a worker, which must not have workers of its own; or no pytest-xdist
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    workers = min(_processors(), MAX_WORKERS)
    if workers > 1 and config.option.numprocesses is None and not (config.option.usepdb or config.option.collectonly):
        config.option.numprocesses = workers
        config.option.dist = "worksteal"  # neighbors, which share fixtures, stay together


def _processors():
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pytest_collection_finish():
    """Exempt imported modules from garbage collections, and collect less often: they took a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


NO_TIME = "no time left"


def pytest_addoption(parser):
    """Add options for the slow tests of .ci/run: a limited time, in which each commit begins elsewhere."""
    parser.addoption("--until", type=float, help="begin no test after this time (seconds since 1970)")
    parser.addoption("--first", type=int, default=0, help="begin with this test, modulo their number")


def pytest_collection_modifyitems(config, items):
    """Rotate the order of the tests."""
    if items:
        first = config.option.first % len(items)
        items[:] = items[first:] + items[:first]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what comes after the given time."""
    until = item.config.option.until
    if until is not None and time.time() > until:
        pytest.skip(NO_TIME)


def pytest_terminal_summary(terminalreporter, config):
    """Name the tests for which there was no time, and say so if they could have run in several processes."""
    skipped = terminalreporter.stats.get("skipped", [])
    not_run = [report.nodeid for report in skipped if NO_TIME in str(report.longrepr)]
    if not_run:
        terminalreporter.section(f"{len(not_run)} tests not run: {NO_TIME}")
        for name in not_run:
            terminalreporter.write_line(name)
    if not hasattr(config.option, "numprocesses"):
        terminalreporter.write_line("in one process only: pytest-xdist, which is not installed, runs one per processor")


MEMORY = 2 << 30
"""Bytes in use after a module from which on this process forgets its compiled programs; the cache keeps them."""


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Kill the processes that a test has started and that are running at its end, because it failed."""
    with ended_processes():
        yield


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Keep the memory of a long session bounded."""
    yield
    if _memory_in_use() > MEMORY:
        jax.clear_caches()


def _memory_in_use():
    """Return the resident memory of this process in bytes, or 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
