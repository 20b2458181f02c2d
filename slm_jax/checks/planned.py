"""Check of the plan: the training step, compiled for the devices that a preset is for, fits them."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from slm_jax.checks.finding import Finding, finding, skipped
from slm_jax.config.schema import Config
from slm_jax.planning.compilers import compiler_command, is_installed
from slm_jax.planning.presets import PresetTarget
from slm_jax.planning.targets import TARGETS


def plan_fit(config: Config, each: PresetTarget) -> Finding:
    """Check that a microbatch fits, by `python -m slm_jax.plan` in a process of its own; skipped without its compiler.

    Args:
        config: The config.
        each: The devices.
    """
    target = TARGETS[each.device]
    name = f"plan for {each.devices} x {target.label}" if each.devices > 1 else f"plan for {target.label}"
    if not is_installed(target.kind):
        return skipped(name, f"needs {compiler_command(target.kind)}")
    with tempfile.TemporaryDirectory(prefix="slm_jax_plan") as folder:
        path = Path(folder) / "config.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        command = [sys.executable, "-m", "slm_jax.plan", "--json", "--config", str(path)]
        command += ["--device", each.device, "--devices", str(each.devices)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = "a step that fits"
    if done.returncode:
        return finding(name, False, (done.stderr.strip().splitlines() or ["no message"])[-1], expected)
    plan = json.loads(done.stdout)
    found = (
        f"{plan['rows']} x {plan['sequence_length']} tokens at once, {plan['grad_accum_steps']} microbatches, "
        f"{plan['needed_bytes'] / 1e9:.3g} GB of a device"
    )
    return finding(name, plan["fits"], found, f"at most {plan['limit_bytes'] / 1e9:.3g} GB")
