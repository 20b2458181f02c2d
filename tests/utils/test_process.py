"""What a command sets for its own process."""

import os
import subprocess
import sys

PROGRAM = """
import jax
from slm_jax.utils.process import tune_process
tune_process()
print(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8))))
"""


def test_a_program_that_a_kill_cut_short_is_kept_anew(tmp_path):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def run():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == "512.0\n"
        return done.stderr

    assert run() == ""
    (path,) = tmp_path.glob("jit__lambda*-cache")
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    assert run() == "a kept program (jit__lambda) is damaged: it is compiled again\n"
    assert path.stat().st_size == whole
    assert run() == ""
