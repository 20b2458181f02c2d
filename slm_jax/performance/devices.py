"""Accelerators as their vendors specify them: peak matrix throughput, memory and bandwidth, each with its source.

An entry describes one JAX device, by the name that JAX reports (`jax.devices()[0].device_kind`): one core of a TPU v2,
v3 or v7 chip (two devices per chip), a chip of the other TPUs, one GPU. Names must match completely, because
"… RTX 4090 Laptop GPU" or "… A100-SXM4-40GB MIG 1g.5gb" are different, slower devices. For an unknown name MFU is
relative to the measured peak (roofline.py).

bfloat16: Dense products accumulated in float32 (data sheets often state twice as much, "with sparsity"). None: the
    device has no bfloat16 matrix units.
float16: The same for float16, which is as fast on GPUs that have both. TPUs, and GPUs before Volta, have no matrix
    units for it.
float32: The limit of products at JAX's `Precision.HIGHEST`, which this package requests. On GPUs that is the vendor's
    float32 figure without tensor cores (TensorFloat-32 keeps 10 of the 23 bits of the mantissa and is not float32).
    TPUs have no float32 matrix units: HIGHEST takes six bfloat16 passes (jax.lax.Precision), hence a sixth.
GeForce: Tensor cores run at half rate when they accumulate in float32, which makes bfloat16 exactly twice float32 in
    all three families (whitepapers: RTX 3090 35.6 and 71, RTX 4090 82.6 and 165.2, RTX 5090 104.8 and 209.5 TFLOPS).
    The figures hold at the listed boost clock; a cool card runs above it and can be measured slightly above its peak.

To add a device, add an entry to `_DEVICE_NAMES`, with figures that you have read in its source: a device that is not
here is measured instead.
"""

from typing import NamedTuple

import jax.numpy as jnp


class Device(NamedTuple):
    """One JAX device as its vendor specifies it.

    Attributes:
        bfloat16: FLOP/s of dense products accumulated in float32; None without such units.
        float16: The same for float16.
        float32: FLOP/s of float32 products.
        memory: GB.
        bandwidth: Memory bandwidth, GB/s.
        source: Publication that the figures are from.
    """

    bfloat16: float | None
    float16: float | None
    float32: float
    memory: float
    bandwidth: float
    source: str

    def peak(self, dtype: jnp.dtype) -> float | None:
        """Return the FLOP/s of products in dtype; None if the device has no units for it."""
        return {"float32": self.float32, "bfloat16": self.bfloat16, "float16": self.float16}.get(str(dtype))


def find(device_kind: str) -> Device | None:
    """Return the entry of a device, or None.

    Args:
        device_kind: Name that JAX reports; older drivers omit "NVIDIA ".
    """
    return _DEVICES.get(_key(device_kind))


def known() -> list[str]:
    """Return the names of all known devices."""
    return list(_DEVICE_NAMES)


def _key(name: str) -> str:
    return name.lower().removeprefix("nvidia ").removeprefix("tesla ")


_TPU_PAPER = "Jouppi et al., A Domain-Specific Supercomputer for Training Deep Neural Networks (CACM 2020), table 3"
_ADA = "NVIDIA Ada GPU Architecture whitepaper"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
_GEFORCE = "2 x CUDA cores x boost clock of NVIDIA's GeForce comparison page"
_P100 = "NVIDIA Tesla P100 data sheet"
_V100 = "NVIDIA Tesla V100 data sheet"
_A100 = "NVIDIA A100 data sheet"
_MI300X = "AMD Instinct MI300X data sheet (matrix products, without sparsity)"
_H100 = "NVIDIA H100 data sheet"
_H200 = "NVIDIA H200 data sheet"


def _tpu(chip_bfloat16: float, chip_memory: float, chip_bandwidth: float, source: str, devices: int = 1) -> Device:
    """Return one JAX device of a chip with the given TFLOP/s, GB and GB/s, which its devices share."""
    peak = chip_bfloat16 * 1e12 / devices
    return Device(peak, None, peak / 6, chip_memory / devices, chip_bandwidth / devices, source)


def _gpu(bfloat16: float, float32: float, memory: float, bandwidth: float, source: str) -> Device:
    """Return a GPU from figures in TFLOP/s, GB and GB/s."""
    return Device(bfloat16 * 1e12, bfloat16 * 1e12, float32 * 1e12, memory, bandwidth, source)


def _early_gpu(float16: float | None, float32: float, memory: float, bandwidth: float, source: str) -> Device:
    """Return a GPU without bfloat16 units."""
    return Device(None, None if float16 is None else float16 * 1e12, float32 * 1e12, memory, bandwidth, source)


def _geforce(cores: int, boost_mhz: float, memory: float, bandwidth: float, source: str = _GEFORCE) -> Device:
    """Return a device with two FLOPs per core and cycle, and twice that on tensor cores (see the top of the file)."""
    peak = 2 * cores * boost_mhz * 1e6
    return Device(2 * peak, 2 * peak, peak, memory, bandwidth, source)


_V5E = _tpu(197, 16, 819, "Google Cloud documentation, TPU v5e")
_V5P = _tpu(459, 95, 2765, "Google Cloud documentation, TPU v5p")
_V6E = _tpu(918, 32, 1638, "Google Cloud documentation, TPU v6e")
_V7 = _tpu(2307, 192, 7380, "Google Cloud documentation, TPU7x (Ironwood)", devices=2)

_DEVICE_NAMES: dict[str, Device] = {
    "TPU v2": _tpu(46, 16, 700, _TPU_PAPER, devices=2),
    "TPU v3": _tpu(123, 32, 900, f"{_TPU_PAPER}; Google Cloud documentation, TPU v3", devices=2),
    "TPU v4": _tpu(275, 32, 1200, "Google Cloud documentation, TPU v4"),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V7,
    "TPU7": _V7,
    "Tesla P100-PCIE-12GB": _early_gpu(None, 9.3, 12, 549, _P100),
    "Tesla P100-PCIE-16GB": _early_gpu(None, 9.3, 16, 732, _P100),
    "Tesla P100-SXM2-16GB": _early_gpu(None, 10.6, 16, 732, _P100),
    "Tesla V100-PCIE-16GB": _early_gpu(112, 14.0, 16, 900, _V100),
    "Tesla V100-PCIE-32GB": _early_gpu(112, 14.0, 32, 900, _V100),
    "Tesla V100-SXM2-16GB": _early_gpu(125, 15.7, 16, 900, _V100),
    "Tesla V100-SXM2-32GB": _early_gpu(125, 15.7, 32, 900, _V100),
    "Tesla V100S-PCIE-32GB": _early_gpu(130, 16.4, 32, 1134, _V100),
    "Tesla T4": _early_gpu(65, 8.1, 16, 300, "NVIDIA T4 data sheet"),
    "NVIDIA A10": _gpu(125, 31.2, 24, 600, "NVIDIA A10 data sheet"),
    "NVIDIA A10G": _gpu(70, 35, 24, 600, "NVIDIA A10G data sheet (AWS), as quoted in Baseten, NVIDIA A10 vs A10G"),
    "NVIDIA A40": _gpu(149.7, 37.4, 48, 696, "NVIDIA A40 data sheet (bfloat16: half of 299.4 with sparsity)"),
    "NVIDIA RTX A6000": _gpu(154.8, 38.7, 48, 768, "NVIDIA RTX A6000 data sheet (tensor: half of 309.7 with sparsity)"),
    "NVIDIA A100-PCIE-40GB": _gpu(312, 19.5, 40, 1555, _A100),
    "NVIDIA A100-SXM4-40GB": _gpu(312, 19.5, 40, 1555, _A100),
    "NVIDIA A100 80GB PCIe": _gpu(312, 19.5, 80, 1935, _A100),
    "NVIDIA A100-SXM4-80GB": _gpu(312, 19.5, 80, 2039, _A100),
    "NVIDIA L4": _gpu(121, 30.3, 24, 300, "NVIDIA L4 data sheet (bfloat16: half of 242 with sparsity)"),
    "NVIDIA RTX 6000 Ada Generation": _gpu(
        364.25, 91.1, 48, 960, "NVIDIA RTX 6000 Ada data sheet (bfloat16: a quarter of 1,457 in float8 with sparsity)"
    ),
    "NVIDIA L40S": _gpu(362, 91.6, 48, 864, "NVIDIA L40S data sheet"),
    "NVIDIA H100 80GB HBM3": _gpu(989.5, 67, 80, 3350, f"{_H100}, SXM (bfloat16: half of 1,979 with sparsity)"),
    "NVIDIA H100 PCIe": _gpu(756.5, 51, 80, 2000, f"{_H100}, PCIe (bfloat16: half of 1,513 with sparsity)"),
    "NVIDIA H100 NVL": _gpu(835.5, 60, 94, 3900, f"{_H100}, NVL (bfloat16: half of 1,671 with sparsity)"),
    "NVIDIA H200": _gpu(989.5, 67, 141, 4800, f"{_H200}, SXM (bfloat16: half of 1,979 with sparsity)"),
    "NVIDIA H200 NVL": _gpu(835.5, 60, 141, 4800, f"{_H200}, NVL (bfloat16: half of 1,671 with sparsity)"),
    "NVIDIA B200": _gpu(2250, 80, 180, 8000, "NVIDIA Blackwell Architecture Technical Brief, HGX B200"),
    "AMD Instinct MI300X": _gpu(1307.4, 163.4, 192, 5300, _MI300X),
    "AMD Instinct MI300X OAM": _gpu(1307.4, 163.4, 192, 5300, _MI300X),
    "NVIDIA GeForce RTX 3090 Ti": _geforce(10752, 1860, 24, 1008),
    "NVIDIA GeForce RTX 3090": _geforce(10496, 1695, 24, 936, _GA102),
    "NVIDIA GeForce RTX 3080 Ti": _geforce(10240, 1665, 12, 912),
    "NVIDIA GeForce RTX 3080": _geforce(
        8704, 1710, 10, 760, f"{_GA102} (the 10 GB card; the 12 GB card is 3 % faster)"
    ),
    "NVIDIA GeForce RTX 3070 Ti": _geforce(6144, 1770, 8, 608),
    "NVIDIA GeForce RTX 3070": _geforce(5888, 1725, 8, 448, _GA102),
    "NVIDIA GeForce RTX 3060 Ti": _geforce(4864, 1665, 8, 448),
    "NVIDIA GeForce RTX 3060": _geforce(3584, 1777, 12, 360),
    "NVIDIA GeForce RTX 4090": _geforce(16384, 2520, 24, 1008, _ADA),
    "NVIDIA GeForce RTX 4080 SUPER": _geforce(10240, 2550, 16, 736),
    "NVIDIA GeForce RTX 4080": _geforce(9728, 2505, 16, 717, _ADA),
    "NVIDIA GeForce RTX 4070 Ti SUPER": _geforce(8448, 2610, 16, 672),
    "NVIDIA GeForce RTX 4070 Ti": _geforce(7680, 2610, 12, 504),
    "NVIDIA GeForce RTX 4070 SUPER": _geforce(7168, 2475, 12, 504),
    "NVIDIA GeForce RTX 4070": _geforce(5888, 2475, 12, 504),
    "NVIDIA GeForce RTX 4060 Ti": _geforce(4352, 2535, 8, 288),
    "NVIDIA GeForce RTX 4060": _geforce(3072, 2460, 8, 272),
    "NVIDIA GeForce RTX 5090": _geforce(21760, 2407, 32, 1792, _BLACKWELL),
    "NVIDIA GeForce RTX 5080": _geforce(10752, 2617, 16, 960, _BLACKWELL),
    "NVIDIA GeForce RTX 5070 Ti": _geforce(8960, 2452, 16, 896, _BLACKWELL),
    "NVIDIA GeForce RTX 5070": _geforce(6144, 2512, 12, 672, _BLACKWELL),
    "NVIDIA GeForce RTX 5060 Ti": _geforce(4608, 2572, 16, 448),
    "NVIDIA GeForce RTX 5060": _geforce(3840, 2497, 8, 448),
}
_DEVICES = {_key(name): device for name, device in _DEVICE_NAMES.items()}
