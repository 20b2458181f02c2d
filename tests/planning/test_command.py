"""The command `python -m slm_jax.plan` where no compiler is needed: options, errors, the check of a config."""

import json
import subprocess
import sys

import pytest

from slm_jax.checks import planned
from slm_jax.checks.finding import FAIL, OK, SKIPPED
from slm_jax.cli import check as check_command
from slm_jax.cli import plan as plan_command
from slm_jax.config.schema import Config
from slm_jax.planning import compilers
from slm_jax.planning.presets import PresetTarget
from slm_jax.utils.errors import UserError


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--device is missing"),
        (["--device", "v9"], "--device v9: should be one of 'h100'"),
        (["--device", "h100", "--batch", "-1"], "--batch -1: should be 0 or more"),
        (["--device", "h100", "--model.dimm", "3"], "perhaps you meant --model.dim"),
    ],
)
def test_invalid_options_are_reported(args, words):
    with pytest.raises(UserError, match=words):
        plan_command.main(args)


@pytest.mark.parametrize(("device", "extra"), [("v5e", "plan-tpu"), ("l4", "plan-gpu")])
def test_a_missing_compiler_is_named_with_the_extra(device, extra, monkeypatch):
    monkeypatch.setattr(compilers, "is_installed", lambda kind: False)
    with pytest.raises(UserError) as raised:
        plan_command.main(["--device", device, "--config", "gpu_30m"])
    assert f"--device {device} needs" in str(raised.value)
    assert f"pip install -e '.[{extra}]'" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_check_compiles_for_the_first_device_of_the_preset(monkeypatch):
    def targets(*args):
        options, overrides = check_command.read_options_and_config(check_command.Options, args, "check")
        config = check_command.make_config(overrides, options.config)
        return check_command._plan_targets(options, config)

    assert targets("--config", "gpu_125m") == [PresetTarget("gpu_125m", "l4")]
    assert targets("--config", "h100_8", "--device", "v5e") == [PresetTarget("h100_8", "v5e", 8)]
    assert targets("--config", "h100_8", "--device", "none") == targets("--config", "minute") == targets() == []
    with pytest.raises(UserError, match="--device v9: should be one of h100"):
        targets("--config", "minute", "--device", "v9")


def test_the_plan_is_a_finding(monkeypatch):
    config = Config.load("minute")
    target = PresetTarget("minute", "v5e", 8)
    monkeypatch.setattr(planned, "is_installed", lambda kind: False)
    found = planned.plan_fit(config, target)
    assert (found.verdict, found.name, found.found) == (
        SKIPPED,
        "plan for 8 x TPU v5e",
        "needs pip install -e '.[plan-tpu]' (in a clone of slm_jax)",
    )
    monkeypatch.setattr(planned, "is_installed", lambda kind: True)
    sizes = {"rows": 4, "sequence_length": 128, "grad_accum_steps": 2, "needed_bytes": 2e9, "limit_bytes": 3e9}
    report = json.dumps({**sizes, "fits": True})
    results = [
        subprocess.CompletedProcess([], 0, report, ""),
        subprocess.CompletedProcess([], 2, "", "error: too large\n"),
    ]
    commands = []
    monkeypatch.setattr(planned.subprocess, "run", lambda command, **_: commands.append(command) or results.pop(0))
    found = planned.plan_fit(config, target)
    assert (found.verdict, found.expected) == (OK, "at most 3 GB")
    assert found.found == "4 x 128 tokens at once, 2 microbatches, 2 GB of a device"
    found = planned.plan_fit(config, target)
    assert (found.verdict, found.found) == (FAIL, "error: too large")
    assert commands[0][:4] == [sys.executable, "-m", "slm_jax.plan", "--json"]
    assert commands[0][-4:] == ["--device", "v5e", "--devices", "8"]
