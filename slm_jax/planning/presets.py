"""The devices that each preset for accelerators is for."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class PresetTarget(NamedTuple):
    """A preset on devices.

    Attributes:
        preset: Name of the preset.
        device: Name of the device, as in `targets.TARGETS`.
        devices: Number of devices.
        options: Options of the config that differ from the preset.
    """

    preset: str
    device: str
    devices: int = 1
    options: Mapping[str, Any] = MappingProxyType({})


_GPUS = ("l4", "a100", "h100", "h200")

PRESET_TARGETS = (
    PresetTarget("colab_t4", "t4"),
    PresetTarget("colab_tpu", "v5e"),
    *(PresetTarget(preset, device) for preset in ("gpu_30m", "gpu_125m", "gpu_350m") for device in _GPUS),
    *(PresetTarget("gpu_1b", device) for device in _GPUS[1:]),
    PresetTarget("tpu_v5e_8", "v5e", 8),
    PresetTarget("tpu_v6e_8", "v6e", 8),
    PresetTarget("h100_8", "h100", 8),
    PresetTarget("h100_8", "v5e", 64, {"mesh.data": 8, "mesh.fsdp": 8, "model.remat": "dots"}),
)


def targets_of(preset: str) -> list[PresetTarget]:
    """Return the devices that a preset is for, without other options; none if it is not for accelerators."""
    return [each for each in PRESET_TARGETS if each.preset == preset and not each.options]
