"""The memory of the compiled training step on accelerators, by their compilers; no chip is needed."""

import json
import subprocess
import sys

import pytest

from slm_jax.planning.compilers import is_installed
from slm_jax.planning.targets import TARGETS


@pytest.mark.slow
@pytest.mark.parametrize(("device", "limit"), [("h100", 35), ("v5e", 50)])
def test_temporary_bytes_of_a_token(device, limit):
    """At most so many bytes per token, layer and channel, compiled in at most 3 minutes.

    The bfloat16 activations that the backward pass of gpu_125m keeps take 23, the logits 6, weights and gradients 4.
    """
    if not is_installed(TARGETS[device].kind):
        pytest.skip(f"the compiler of {device} (extra plan-{TARGETS[device].kind}) is absent")
    command = [
        sys.executable,
        "-m",
        "slm_jax.plan",
        "--json",
        "--config",
        "gpu_125m",
        "--device",
        device,
        "--batch",
        "8",
    ]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["temp_bytes"] / (report["tokens"] * report["layers"] * report["width"]) <= limit
    assert report["compile_seconds"] <= 180
