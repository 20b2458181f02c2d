"""The table of planned memory and speed in configs/README.md: python tests/benchmarks/plan.py [NAME …]

Runs `python -m slm_jax.plan` for each preset and each device that it is for (slm_jax/planning/presets.py), and prints a
row of Markdown for each. Needs the extras plan-tpu and plan-gpu, no chip. Nothing is run on a device: the figures are
those of the compiled programs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]
sys.path.insert(0, str(ROOT))

from slm_jax.planning.presets import PRESET_TARGETS, PresetTarget  # noqa: E402  # after the path is set

HEAD = "preset | devices | tokens at once | microbatches | state | temporary | usable | traffic | bound | compiled in"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="only these presets")
    presets = parser.parse_args().presets
    print(f"| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}", flush=True)
    for each in PRESET_TARGETS:
        if not presets or each.preset in presets:
            print(row(each), flush=True)


def row(each: PresetTarget) -> str:
    """Return the row of a preset on a kind of device; the error in its place if nothing fits."""
    options = [str(word) for name, value in each.options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "slm_jax.plan", "--json", "--config", each.preset, "--device", each.device]
    command += ["--devices", str(each.devices), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    device = f"{each.devices} x {each.device}" if each.devices > 1 else each.device
    name = f"`{each.preset}`" + (f" `{' '.join(options)}`" if options else "")
    if done.returncode:
        return f"| {name} | {device} | {done.stderr.strip().splitlines()[-1]} |"
    plan = json.loads(done.stdout)
    speed = f"{plan['bound_tokens_per_second']:,.0f} tokens/s, MFU {plan['bound_mfu']:.0%}"
    fields = (
        name,
        device,
        f"{plan['rows']} x {plan['sequence_length']}",
        str(plan["grad_accum_steps"]),
        f"{plan['state_bytes'] / 1e9:.2f} GB",
        f"{plan['temp_bytes'] / 1e9:.2f} GB",
        f"{plan['limit_bytes'] / 1e9:.1f} GB",
        f"{plan['traffic_bytes'] / plan['grad_accum_steps'] / 1e9:.1f} GB",
        speed,
        f"{plan['compile_seconds']:.0f} s",
    )
    return f"| {' | '.join(fields)} |"


if __name__ == "__main__":
    main()
