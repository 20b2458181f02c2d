"""Speed and memory of the presets on this accelerator: python tests/benchmarks/accelerator.py [--presets NAME …]

Trains each preset that is for this chip (slm_jax/planning/presets.py) for a few steps on random ids, with the training
step of `python -m slm_jax.train`, and prints a row of Markdown for configs/README.md: tokens/s and MFU (relative to the
vendor's peak, the causal half of attention counted), the memory that the compiler planned and the largest that was
used, and versions. The preset's batch is cut only where a step would take much longer than ten seconds: the optimizer
runs once per batch, and with a small one takes a large share. After nine minutes no further preset is begun, and those
that were left out are named. Any option of the config may be added. To try it on a CPU: --tiny.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]
sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")

import jax  # noqa: E402  # after the environment is set

from slm_jax.cli.options import config_from_args  # noqa: E402  # after the path is set
from slm_jax.config.schema import Config  # noqa: E402
from slm_jax.distributed import sharding  # noqa: E402
from slm_jax.distributed.platform import Platform  # noqa: E402
from slm_jax.model.precision import compute_dtype  # noqa: E402
from slm_jax.performance import devices, flops  # noqa: E402
from slm_jax.performance.roofline import measure_peak, step_shapes  # noqa: E402
from slm_jax.planning.presets import PRESET_TARGETS  # noqa: E402
from slm_jax.planning.targets import TARGETS  # noqa: E402
from slm_jax.training import mfu  # noqa: E402
from slm_jax.utils.command import command_errors  # noqa: E402
from slm_jax.utils.errors import UserError  # noqa: E402
from slm_jax.utils.process import tune_process  # noqa: E402

HEAD = "preset | chip | tokens/s | MFU | tokens at once | microbatches | memory planned | used | compiled in | versions"
STEP_SECONDS = 12.0
"""Longest duration of a step, as estimated."""
TINY = "--model.dim 64 --model.depth 2 --model.heads 1 --model.mlp_dim 192 --train.sequence_length 64".split()
TINY += "--train.batch_size 8 --tokenizer.path= --tokenizer.vocab_size 300".split()
EXPECTED_MFU = 0.3
"""Share of the peak by which the batch is cut."""
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


def presets_of_this_chip() -> list[str]:
    """Return the presets for the present devices; for an unknown kind those for one device of any kind."""
    kind = jax.devices()[0].device_kind
    names = {name for name, target in TARGETS.items() if devices.find(target.device_kind) == devices.find(kind)}
    count = jax.device_count()
    ours = [each for each in PRESET_TARGETS if not each.options and each.devices <= count]
    known = [each.preset for each in ours if each.device in names]
    return list(dict.fromkeys(known or [each.preset for each in ours if each.devices == 1]))


def cut_batch(config: Config, vocab_size: int, peak: float) -> Config:
    """Return the config with a batch whose step takes at most about `STEP_SECONDS` at the expected MFU.

    Args:
        config: The config.
        vocab_size: Entries of its vocabulary.
        peak: FLOP/s of all devices.
    """
    train = config.train
    sequence = train.sequence_length * flops.train_flops_per_token(config.model, vocab_size, train.sequence_length)
    batch_size = train.batch_size
    smallest = jax.device_count()
    while batch_size % (2 * smallest) == 0 and batch_size * sequence > STEP_SECONDS * EXPECTED_MFU * peak:
        batch_size //= 2
    return config.model_copy(update={"train": train.model_copy(update={"batch_size": batch_size})})


def versions() -> str:
    """Return the versions of JAX and of the compilers that are installed."""
    texts = []
    for package in PACKAGES:
        try:
            texts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(texts)


def measure(name: str, overrides: list[str], steps: int, trace: str) -> dict[str, Any]:
    """Return the figures of a preset on the present devices.

    Raises:
        UserError: If it does not fit.
    """
    config = config_from_args(["--config", name, *overrides], "accelerator.py", __doc__ or "")
    vocab_size = mfu.vocabulary(config)
    mesh = sharding.make_mesh(config)
    kind = mesh.devices.flat[0].device_kind
    dtype = compute_dtype(config.train.dtype, Platform.of_mesh(mesh))
    known = devices.find(kind)
    peak = known.peak(dtype) if known else None
    source = "vendor's peak" if peak else "measured peak"
    peak = mesh.size * (peak or measure_peak(dtype, step_shapes(config, vocab_size)).flops)
    config = cut_batch(config, vocab_size, peak)
    times = mfu.time_steps(config, vocab_size, steps, mesh, trace)
    length = config.train.sequence_length
    speed = config.train.batch_size * length / statistics.median(times.seconds)
    batch_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return {
        "preset": name,
        "chip": sharding.describe(mesh),
        "tokens_per_second": speed,
        "mfu": speed * flops.train_flops_per_token(config.model, vocab_size, length) / peak,
        "mfu_of": source,
        "rows": config.train.batch_size // times.grad_accum_steps // batch_devices,
        "sequence_length": length,
        "grad_accum_steps": times.grad_accum_steps,
        "planned_bytes": times.program_bytes,
        "used_bytes": times.peak_bytes,
        "compile_seconds": times.compile_seconds,
        "seconds": times.seconds,
        "versions": versions(),
    }


def row(figures: dict[str, Any]) -> str:
    """Return the figures of a preset as a row of Markdown."""
    used = figures["used_bytes"]
    cells = (
        f"`{figures['preset']}`",
        figures["chip"],
        f"{figures['tokens_per_second']:,.0f}",
        f"{figures['mfu']:.1%}" + ("" if figures["mfu_of"] == "vendor's peak" else f" of the {figures['mfu_of']}"),
        f"{figures['rows']} x {figures['sequence_length']}",
        str(figures["grad_accum_steps"]),
        f"{figures['planned_bytes'] / 1e9:.2f} GB",
        "unknown" if used is None else f"{used / 1e9:.2f} GB",
        f"{figures['compile_seconds']:.0f} s",
        figures["versions"],
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", help="these presets; default: those for this chip")
    parser.add_argument("--tiny", action="store_true", help="with models of 0.1 M parameters, to test on a CPU")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each preset")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no preset after this time")
    parser.add_argument("--trace", default="", help="folder for a profile of three steps of each preset")
    parser.add_argument("--json", default="", help="file to append one JSON object per preset to")
    options, overrides = parser.parse_known_args()
    tune_process()
    start = time.monotonic()
    print(f"| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}", flush=True)
    for name in options.presets or presets_of_this_chip():
        if time.monotonic() - start > 60 * options.minutes:
            print(f"| `{name}` | not measured: {options.minutes:g} minutes are over |", flush=True)
            continue
        trace = str(Path(options.trace) / name) if options.trace else ""
        try:
            figures = measure(name, [*TINY * options.tiny, *overrides], options.steps, trace)
        except UserError as error:
            print(f"| `{name}` | {error} |", flush=True)
            continue
        print(row(figures), flush=True)
        if options.json:
            with Path(options.json).open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")
        gc.collect()


if __name__ == "__main__":
    with command_errors():
        main()
