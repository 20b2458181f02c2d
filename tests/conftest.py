"""Eight simulated devices for every test, set before JAX starts; compiled programs that the commands' tests share."""

import atexit
import os
import shutil
import tempfile

from tests.programs import PROGRAMS

# Compiling is most of the time of these tests, and with the least effort two fifths faster. Commands that they start
# run as users run them; with XLA_FLAGS=--xla_backend_optimization_level=3 in the environment so does everything.
_FLAGS = os.environ.get("XLA_FLAGS", "")
_EFFORT = "" if "optimization_level" in _FLAGS else "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8 {_EFFORT}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

if PROGRAMS not in os.environ:
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="slm_jax_programs_")
    atexit.register(shutil.rmtree, os.environ[PROGRAMS], ignore_errors=True)

from hypothesis import settings  # noqa: E402  # it may load plugins that load JAX

settings.register_profile("long", max_examples=25_000)  # pytest -m slow --hypothesis-profile long
