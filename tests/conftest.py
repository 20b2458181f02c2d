"""Eight simulated devices for every test, set before JAX starts; compiled programs that the commands' tests share."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.programs import PROGRAMS  # after the devices are set

if PROGRAMS not in os.environ:
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="slm_jax_programs_")
    atexit.register(shutil.rmtree, os.environ[PROGRAMS], ignore_errors=True)

from hypothesis import settings

settings.register_profile("long", max_examples=25_000)  # pytest -m slow --hypothesis-profile long
