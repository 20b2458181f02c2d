"""Flags of XLA, of which an unknown one ends the process."""

import os
import subprocess
import sys

import pytest

from tests.xla_flags import is_known_flag


@pytest.mark.parametrize(
    "flag", ["--xla_dump_to=/tmp", "--xla_backend_optimization_level=0", "--xla_force_host_platform_device_count=8"]
)
def test_flags_in_use_are_known(flag):
    assert is_known_flag(flag)


@pytest.mark.parametrize("flag", ["--xla_dump_t", "--xla_no_such_flag=1", "--la_dump_to"])
def test_a_part_of_a_name_is_no_flag(flag):
    assert not is_known_flag(flag)


def test_xla_takes_the_flags_that_the_tests_set():
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    assert subprocess.run(command, env=os.environ, timeout=60).returncode == 0
