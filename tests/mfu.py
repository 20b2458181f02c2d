"""MFU on this device: `python tests/mfu.py` prints and checks it, `pytest tests/mfu.py` checks a small step.

The formula, the products of the traced program and XLA's cost analysis must agree (tests/performance/test_flops.py
covers more shapes), and no step may exceed the measured peak. The script takes the options of `python -m slm_jax.mfu`.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # this folder holds a `tokenizer` too
    sys.path[0] = str(Path(__file__).parents[1])

import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.cli.mfu import main
from slm_jax.config.schema import Config
from slm_jax.performance import roofline
from slm_jax.training import mfu
from slm_jax.utils.command import command_errors
from slm_jax.utils.errors import UserError

ROOT = Path(__file__).parents[1]
SMALL = {
    "model.dim": 64,
    "model.depth": 2,
    "model.heads": 2,
    "model.mlp_dim": 192,
    "train.batch_size": 8,
    "train.sequence_length": 64,
    "mesh.data": 1,
}
OPTIONS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
AGREED = "formula, traced program and XLA agree; the step is below the measured peak"


def check(report: mfu.Report) -> None:
    """Check that the counts agree and that the step stays below the measured peak."""
    counts = report.counts
    assert counts.products == pytest.approx(counts.formula_square, rel=1e-9)
    # XLA adds element-wise operations: less than 1 % in wide models, up to 15 % in the narrowest.
    assert counts.xla is None or 1.0 <= counts.xla / counts.formula_square < 1.15
    assert counts.formula <= counts.formula_square
    assert counts.formula < report.measured_peak * report.seconds
    assert 0 < report.mfu_of_measured_peak < 1
    assert report.mfu_of_vendor_peak is None or 0 < report.mfu_of_vendor_peak < 1


@pytest.fixture(scope="module")
def small() -> mfu.Report:
    return mfu.measure(Config.load(**SMALL), 300, steps=5)


def test_formula_program_and_xla_agree_and_the_step_is_below_the_measured_peak(small):
    check(small)
    assert small.tokens_per_second == pytest.approx(8 * 64 / small.seconds)
    assert len(small.times.seconds) == 5
    assert small.times.program_bytes > 4 * 3 * small.parameters  # float32 parameters and the optimizer's state


def test_text_states_baseline_convention_and_spread(small):
    text = mfu.as_text(small)
    assert "an unknown device, so MFU is relative to the measured peak" in text
    assert f"{small.mfu_of_measured_peak:.1%} of the measured peak" in text
    assert roofline.CONVENTION in text
    assert "80 % of 5 within" in text
    assert "orthogonalization" in text
    known = small._replace(
        vendor_peak=4 * small.measured_peak, source="a data sheet", vendor_peaks={"float32": 1e15, "bfloat16": None}
    )
    assert f"{small.mfu_of_measured_peak / 4:.1%} of the vendor's peak" in mfu.as_text(known)
    assert "a data sheet" in mfu.as_text(known)


def test_measured_peak_includes_the_products_of_the_step():
    config = Config.load(**SMALL)
    shapes = roofline.step_shapes(config, 300)
    assert (512, 64, 128) in shapes  # up and gate, forward
    assert (64, 512, 128) in shapes  # their gradient
    assert (512, 64, 300) in shapes  # the head
    assert all(2 * np.prod(shape, dtype=float) <= 4e9 for shape in shapes)
    peak = roofline.measure_peak(jnp.dtype("float32"), shapes, seconds=0.1)
    assert 0 < peak.median <= peak.flops
    assert peak.shape in [*shapes, (512, 512, 512), (1024, 1024, 1024)]


def test_simulated_devices_share_one_measured_peak():
    """Eight devices of one processor are no faster than one; eight accelerators are."""
    from slm_jax.distributed import sharding

    mesh = sharding.make_mesh(Config.load(**{**SMALL, "mesh.data": 8}))
    assert mesh.size == 8
    assert roofline.independent_devices(mesh) == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--steps", "many"], "--steps many"),
        (["--model.dimm", "3"], "perhaps you meant --model.dim"),
        (["--tokenizer.path", "no-such"], "tokenizer.path"),
        (["--run", "no-such-run"], "no-such-run"),
        (["--mesh.data", "99"], "99"),
    ],
)
def test_invalid_options_are_reported(args, words):
    with pytest.raises(UserError, match=words):
        main(args)


@pytest.mark.slow
def test_accelerator_benchmark_runs(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "accelerator.py"), "--tiny", "--steps", "3"]
    command += ["--json", str(tmp_path / "rows"), "--trace", str(tmp_path / "trace"), "--model.depth", "1"]
    command += ["--presets", "gpu_30m", "no-such-preset"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    head, line, measured, failed = done.stdout.splitlines()
    assert head.count("|") == line.count("|") == measured.count("|") == 11
    row = json.loads((tmp_path / "rows").read_text())
    assert row["sequence_length"] == 64
    assert row["tokens_per_second"] == pytest.approx(8 * 64 / statistics.median(row["seconds"]))
    assert measured.startswith("| `gpu_30m` |")
    assert f" x CPU | {row['tokens_per_second']:,.0f} |" in measured
    assert failed.startswith("| `no-such-preset` | ")
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_file_runs_as_a_script(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "mfu.py"), *OPTIONS, "--steps", "3", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == AGREED
    row = json.loads(done.stdout)
    assert row["device"] == "cpu"
    assert row["batch"] == [8, 64, 1]
    assert len(row["times"]["seconds"]) == 3
    assert row["mfu_peak"] is None
    assert row["mfu_roof"] == pytest.approx(row["counts"]["formula"] / row["seconds"] / row["roof"])
    assert row["convention"] == roofline.CONVENTION


if __name__ == "__main__":
    with command_errors():
        check(main())
        print(AGREED, file=sys.stderr)
