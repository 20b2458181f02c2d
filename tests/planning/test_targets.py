"""Programs compiled by the compilers of TPUs and GPUs, without a chip: skipped where these are not installed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm_jax.config.schema import Config
from slm_jax.performance import flops
from slm_jax.planning.collectives import Collective
from slm_jax.planning.compilers import is_installed
from slm_jax.planning.targets import TARGETS, gpu_description
from slm_jax.training import mfu
from tests.processes import Process

ROOT = Path(__file__).parents[2]
TINY = "--model.dim 256 --model.heads 2 --model.depth 2 --model.mlp_dim 768 --train.sequence_length 256".split()
KEYS = "device devices rows sequence_length tokens state_bytes temp_bytes model_flops bytes_accessed parameters layers"
KEYS += " width compile_seconds"
# No dimension of a model is a multiple of these, so that activations are recognized by their shapes.
LENGTH, ROWS = 640, 3
LARGE = 1 << 20  # bytes; smaller collectives are of norms and sums


def plan(*options):
    """The JSON of `python -m slm_jax.plan`."""
    command = [sys.executable, "-m", "slm_jax.plan", "--json", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def needs(device):
    kind = TARGETS[device].kind
    return pytest.mark.skipif(not is_installed(kind), reason=f"the compiler of {device} (extra plan-{kind}) is absent")


def test_each_gpu_is_described_as_the_compiler_reads_it():
    text = gpu_description(TARGETS["h100"])
    assert "core_count: 132" in text
    assert "cuda_compute_capability { major: 9 minor: 0 }" in text
    assert text.count("{") == text.count("}")
    for target in TARGETS.values():
        assert target.memory < 1.09e9 * target.specification.memory  # nominal GB, some of them in fact GiB
        assert target.memory > 0.95e9 * target.specification.memory


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param(name, marks=needs(name)) for name in TARGETS])
def test_each_device_has_its_kernel_and_its_figures(device):
    report = plan("--device", device, "--config", "gpu_30m", "--batch", 4, *TINY)
    assert set(KEYS.split()) <= set(report)
    assert (report["device"], report["devices"], report["rows"], report["tokens"]) == (device, 1, 4, 4 * 256)
    kernel = {"t4": ""}.get(device, "tpu_custom_call" if TARGETS[device].kind == "tpu" else "__cudnn$fmha")
    assert any(kernel in name for name in report["kernels"]) or not kernel
    config = Config.load("gpu_30m", **{"model.dim": 256, "model.heads": 2, "model.depth": 2, "model.mlp_dim": 768})
    vocab_size = mfu.vocabulary(config)
    assert report["parameters"] == flops.parameters(config.model, vocab_size)
    assert report["model_flops"] == 4 * 256 * flops.train_flops_per_token(config.model, vocab_size, 256)
    # Parameters, one moment of the matrices in blocks (Muon), two of the others (AdamW); layouts may add padding.
    blocks = flops.matmul_parameters(config.model, vocab_size) - vocab_size * 256
    exact = 4 * (3 * report["parameters"] - blocks)
    assert exact <= report["state_bytes"] <= 1.02 * exact + 1e5
    assert (report["bytes_accessed"] is None) == (TARGETS[device].kind == "gpu")
    assert report["needed_bytes"] < report["limit_bytes"]


@pytest.mark.slow
@needs("v5e")
def test_a_batch_that_does_not_fit_is_split():
    report = plan("--device", "v5e", "--config", "gpu_125m", *TINY, "--train.memory_gb", 0.8, "--train.batch_size", 64)
    assert report["grad_accum_steps"] * report["rows"] == 64
    assert report["needed_bytes"] <= report["limit_bytes"] == 800_000_000
    larger = [each for each in report["programs"] if each["rows"] > report["rows"]]
    assert report["grad_accum_steps"] == 1 or all(each["needed_bytes"] > 800_000_000 for each in larger)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "device", "options"),
    [
        pytest.param("tpu_v5e_8", "v5e", {}, marks=needs("v5e")),
        pytest.param("tpu_v6e_8", "v6e", {"model.remat": "dots"}, marks=needs("v6e")),
        pytest.param("h100_8", "h100", {}, marks=needs("h100")),
        pytest.param(
            "h100_8",
            "v5e",
            {"mesh.data": 8, "mesh.fsdp": 8, "model.remat": "dots"},
            marks=needs("v5e"),
            id="h100_8 on 64 v5e",
        ),
    ],
)
def test_matrices_are_gathered_layer_by_layer_and_gradients_scattered(preset, device, options):
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    report = plan("--config", preset, "--device", device, "--batch", ROWS, "--train.sequence_length", LENGTH, *words)
    config = Config.load(preset, **options)
    vocab_size = mfu.vocabulary(config)
    matrices = {i * o for i, o in flops.block_matrices(config.model)}
    table = vocab_size * config.model.dim
    depth = config.model.depth
    large = []
    for each in report["collectives"]:
        found = Collective(each["kind"], each["dtype"], tuple(each["dims"]), each["count"])
        if found.bytes >= LARGE:
            large.append((found, found.bytes // {"f32": 4, "bf16": 2}[found.dtype]))
    # No activations, no logits: their shapes have the tokens.
    assert not [found for found, _ in large if {LENGTH, ROWS * LENGTH} & set(found.dims)]
    # Parameters are gathered one matrix at a time, in bfloat16, and the table: never a stack of layers. With "data",
    # the optimizer's results (float32, complete matrices of some layers) are gathered over it once a step.
    is_hybrid = "mesh.data" in options
    gathers = [(found, size) for found, size in large if found.kind == "all-gather"]
    gathers = [(found, size) for found, size in gathers if found.dtype == "bf16" or not is_hybrid]
    assert {size for _, size in gathers} <= matrices | {table}
    assert {found.dtype for found, size in gathers if size != table} == {"bf16"}
    gathered = sum(found.times * size for found, size in gathers if size != table)
    in_blocks = depth * sum(i * o for i, o in flops.block_matrices(config.model))
    assert 2 * in_blocks <= gathered <= 3 * in_blocks  # forward, backward, and where it is recomputed
    # Each gradient is scattered once (some compilers pad it); what is reduced over "data" afterwards is a part of it.
    # Only the table's is reduced in full over two axes.
    # A TPU's compiler reduces bfloat16 gradients in full whose last axis is split (`out` and `down`).
    is_tpu = TARGETS[device].kind == "tpu"
    scattered = sum(found.times * size for found, size in large if found.kind == "reduce-scatter")
    in_tables = 0 if is_hybrid else table
    assert (0.7 if is_tpu else 0.999) * (in_blocks + in_tables) <= scattered <= 1.3 * (in_blocks + in_tables)
    whole = matrices if is_hybrid else matrices | {table}
    reduced = [found for found, size in large if found.kind == "all-reduce" and size in whole]
    assert not [found for found in reduced if not is_tpu or found.dtype != "bf16"]


@pytest.mark.slow
@needs("h100")
def test_temporary_memory_of_a_gpu_step():
    """At most 35 bytes per token, layer and channel of a model of 124 M parameters, logits and optimizer included.

    Without `compiler_options` and `RMSNorm.keep_rms`, the traffic is 70 GB.
    """
    report = plan("--device", "h100", "--config", "gpu_125m", "--batch", 8)
    assert report["traffic_bytes"] < 62e9
    assert report["temp_bytes"] <= 35 * report["tokens"] * report["layers"] * report["width"]


@pytest.mark.slow
@needs("v5e")
def test_traffic_is_close_to_what_the_compiler_counts_without_loops():
    """Without scanned layers only vector memory separates the two figures: traffic is the smaller one."""
    unrolled = plan("--device", "v5e", "--config", "gpu_30m", "--batch", 4, *TINY, "--model.scan_layers", "False")
    scanned = plan("--device", "v5e", "--config", "gpu_30m", "--batch", 4, *TINY, "--model.scan_layers", "True")
    assert 0.1 * unrolled["bytes_accessed"] < unrolled["traffic_bytes"] < 1.1 * unrolled["bytes_accessed"]
    assert scanned["bytes_accessed"] < unrolled["bytes_accessed"]


@pytest.mark.slow
@needs("v5e")
def test_an_interrupt_ends_a_compilation_at_once():
    command = [sys.executable, "-m", "slm_jax.plan", "--device", "v5e", "--config", "gpu_125m", "--batch", "8"]
    with Process(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        first = process.stderr.readline()
        assert first.startswith("compiling for 1 x TPU v5 lite")  # and no message of a library before it
        time.sleep(6)  # tracing is over, the compiler runs
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert time.monotonic() - start < 1
        assert process.stderr.read() == "stopped\n"
