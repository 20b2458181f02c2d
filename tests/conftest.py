"""Eight simulated devices for every test, and compiled programs that all processes of a session share."""

import atexit
import os
import shutil
import tempfile

# Compiling is most of the time of these tests, and with the least effort two fifths faster. With
# XLA_FLAGS=--xla_backend_optimization_level=3 in the environment everything is compiled as users have it.
_FLAGS = os.environ.get("XLA_FLAGS", "")
_EFFORT = "" if "optimization_level" in _FLAGS else "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8 {_EFFORT}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# JAX's persistent compilation cache, also for the processes that tests start. Its folder is that of the environment,
# so that sessions can share it, or a new one for this session; the workers of pytest-xdist inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="slm_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from hypothesis import settings  # noqa: E402  # it may load plugins that load JAX

settings.register_profile("long", max_examples=25_000)  # pytest -m slow --hypothesis-profile long
