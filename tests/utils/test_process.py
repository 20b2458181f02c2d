"""Settings of a command's own process."""

import gc
import os
import platform
import subprocess
import sys

import pytest

from slm_jax.utils import process

PROGRAM = """
import jax
from slm_jax.utils.process import tune_process
tune_process()
print(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8))))
"""


def test_a_cached_program_that_was_cut_short_is_replaced(tmp_path):
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
    assert run() == "a cached program (jit__lambda) is damaged: it is compiled again\n"
    assert path.stat().st_size == whole
    assert run() == ""


FREED_MEMORY = """
import ctypes
from slm_jax.utils.process import _keep_freed_memory
_keep_freed_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 3 << 30  # address space only: nothing is written
block = libc.malloc(size)
assert block
libc.free(block)
print(libc.sbrk(0) >= block + size)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept_also_above_2_gib():
    done = subprocess.run([sys.executable, "-c", FREED_MEMORY], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_other_warnings_are_printed_and_the_import_has_no_side_effects(tmp_path):
    program = (
        "import sys, warnings\n"
        "show = warnings.showwarning\n"
        "import slm_jax.utils.process as process\n"
        "assert 'jax' not in sys.modules\n"
        "assert warnings.showwarning is show\n"
        "process.tune_process()\n"
        "warnings.warn('something else')\n"
    )
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "UserWarning: something else" in done.stderr


def test_no_garbage_is_collected_during_imports_and_what_they_define_is_exempt():
    before = gc.get_freeze_count()
    try:
        with process.without_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
        with pytest.raises(ImportError), process.without_garbage_collection():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
