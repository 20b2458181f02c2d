"""Test the table of devices against figures that vendors and JAX publish elsewhere."""

import jax.numpy as jnp
import pytest

from slm_jax.performance import devices
from tests.helpers import BFLOAT16, FLOAT32

FAMILIES = """TPU v2|TPU v3|TPU v4|TPU v5 lite|TPU v5p|TPU v6 lite|TPU7x|Tesla T4|Tesla P100-PCIE-16GB
Tesla V100-SXM2-16GB|NVIDIA A10|NVIDIA A100-SXM4-40GB|NVIDIA A100-SXM4-80GB|NVIDIA A100 80GB PCIe|NVIDIA L4|NVIDIA L40S
NVIDIA H100 80GB HBM3|NVIDIA H100 PCIe|NVIDIA H100 NVL|NVIDIA H200|NVIDIA B200|NVIDIA GeForce RTX 3060
NVIDIA GeForce RTX 4070|NVIDIA GeForce RTX 5090
NVIDIA A10G|NVIDIA A40|NVIDIA RTX A6000|NVIDIA RTX 6000 Ada Generation
AMD Instinct MI300X""".replace("\n", "|").split("|")


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_known(kind):
    assert devices.find(kind) is not None


@pytest.mark.parametrize("kind", devices.known())
def test_entries_are_plausible(kind):
    row = devices.find(kind)
    assert row is not None
    assert row.source
    assert row.peak(FLOAT32) == row.float32
    assert row.peak(BFLOAT16) == row.bfloat16
    assert row.peak(jnp.dtype("float16")) == row.float16
    assert row.peak(jnp.dtype("float64")) is None
    # No device has a float32 peak outside of this range, or tensor cores with a gain below 2 or above 32.
    assert 3e12 < row.float32 < 400e12
    for half in (row.bfloat16, row.float16):
        assert half is None or 1.99 < half / row.float32 < 32
    assert 7 < row.memory < 200
    assert 200 < row.bandwidth < 9000


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100",
        "TPU v4 lite",
        "",
    ],
)
def test_similar_name_is_unknown(kind):
    assert devices.find(kind) is None


def test_names_of_older_drivers_omit_the_vendor():
    assert devices.find("A100-SXM4-40GB") == devices.find("NVIDIA A100-SXM4-40GB") is not None
    assert devices.find("GeForce RTX 3090") == devices.find("NVIDIA GeForce RTX 3090") is not None
    assert devices.find("NVIDIA T4") == devices.find("Tesla T4") is not None


@pytest.mark.parametrize(
    ("name", "float32", "bfloat16"),
    [  # as printed in the whitepapers: peak FP32, peak BF16 tensor with FP32 accumulate, dense
        ("3090", 35.6, 71),
        ("3080", 29.8, 59.5),
        ("3070", 20.3, 40.6),
        ("4090", 82.6, 165.2),
        ("4080", 48.7, 97.5),
        ("5090", 104.8, 209.5),
        ("5080", 56.3, 112.6),
        ("5070", 30.9, 61.7),
    ],
)
def test_geforce_figures_agree_with_the_whitepapers(name, float32, bfloat16):
    row = devices.find(f"NVIDIA GeForce RTX {name}")
    assert row is not None
    assert row.float32 == pytest.approx(float32 * 1e12, rel=0.005)
    assert row.bfloat16 == pytest.approx(bfloat16 * 1e12, rel=0.005)


def test_entry_describes_one_jax_device():
    """The figures of a chip are divided where JAX shows each of its two cores as a device."""
    for kind, chip in (("TPU v2", 46), ("TPU v3", 123), ("TPU7x", 2307)):
        row = devices.find(kind)
        assert row is not None
        assert row.bfloat16 == pytest.approx(chip / 2 * 1e12)
    assert devices.find("TPU v4").bfloat16 == pytest.approx(275e12)
    assert devices.find("TPU v5p").bfloat16 == pytest.approx(459e12)


def test_devices_without_bfloat16_units_have_no_bfloat16_peak():
    for kind in ("Tesla T4", "Tesla P100-PCIE-16GB", "Tesla V100-SXM2-16GB"):
        assert devices.find(kind).peak(BFLOAT16) is None


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("TPU v2", "V2"),
        ("TPU v4", "V4"),
        ("TPU v5 lite", "V5E"),
        ("TPU v5e", "V5E"),
        ("TPU v5", "V5P"),
        ("TPU v5p", "V5P"),
        ("TPU v6 lite", "V6E"),
        ("TPU v6e", "V6E"),
        ("TPU7x", "7X"),
    ],
)
def test_peaks_agree_with_jax(kind, version):
    """Compare with the table that JAX has for its kernels; not TPU v3, where JAX has 140 and the vendor 123."""
    tpu = pytest.importorskip("jax.experimental.pallas.tpu")
    chip = getattr(tpu.ChipVersion, f"TPU_{version}")
    cores = 2 if chip.supports_megacore else 1  # per JAX device
    per_core = tpu.get_tpu_info_for_chip(chip, cores)
    row = devices.find(kind)
    assert row is not None
    assert row.bfloat16 == pytest.approx(cores * per_core.bf16_ops_per_second, rel=0.01)
