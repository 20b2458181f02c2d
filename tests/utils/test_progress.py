"""Log output of commands on stderr."""

import subprocess
import sys

import pytest

PROGRAM = """
import logging
{setup}
from slm_jax.utils.progress import show_log
show_log()
show_log()
logging.getLogger("slm_jax.x").info("hello")
logging.getLogger("slm_jax.x").debug("detail")
"""


@pytest.mark.parametrize(
    ("setup", "output"),
    [
        ("", "hello\n"),
        ("import orbax.checkpoint", "hello\n"),  # adds a handler to the root logger
        ("logging.basicConfig(level=logging.INFO)", "INFO:slm_jax.x:hello\n"),
        ("logging.basicConfig(format='%(message)s!', level=logging.WARNING)", ""),
        ("logging.getLogger('slm_jax').addHandler(logging.NullHandler())", ""),
    ],
)
def test_show_log_prints_messages_once_unless_logging_is_set_up(setup, output):
    command = [sys.executable, "-c", PROGRAM.format(setup=setup)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == output
