"""The frozen weights of a run, stored once: with adapters (LoRA) their base, with DPO the reference.

    checkpoints/base/0/    the initial weights, float32: written before the first checkpoint, never changed
                100/       what is trained, and its optimizer state, after step 100; with LoRA the adapters only

Base and checkpoints have the same format, so that every file has a checksum, which is verified when it is read.
"""

import logging
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from slm_jax.config.schema import CheckpointConfig, Config
from slm_jax.model import lora_merge
from slm_jax.run.checkpoint import Checkpoints, open_folder
from slm_jax.run.checksums import CHECKSUMS
from slm_jax.run.read_checkpoint import read_fields, read_params
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

_FOLDER = "base"
_STEP = 0
_LARGE_ERROR = 0.1  # of the adapters' products
_ROUNDED = (
    "the adapters are small next to the weights that they are merged into: computing in %s rounds them by %.0f %%. "
    "export --format peft keeps them separate"
)


def base_folder(checkpoints: Path | epath.Path) -> epath.Path:
    """Return the folder of the frozen weights, given that of the checkpoints."""
    return open_folder(checkpoints) / _FOLDER


def save_base(checkpoints: Path | epath.Path, params: Any) -> None:
    """Save the frozen weights, and wait until they are complete.

    Args:
        checkpoints: The folder of the run's checkpoints.
        params: Float32 parameters of the model without adapters, on the run's devices.

    Raises:
        UserError: They cannot be written.
    """
    with Checkpoints(base_folder(checkpoints), CheckpointConfig(keep_best=0)) as base:
        base.save(_STEP, {"params": params}, {})


def base_fingerprint(checkpoints: Path | epath.Path) -> str:
    """Return the CRC-32 of the checksums of the frozen weights; empty if there are none."""
    file = base_folder(checkpoints) / str(_STEP) / CHECKSUMS
    return f"{zlib.crc32(file.read_bytes()):08x}" if file.exists() else ""


def read_base(checkpoints: Path | epath.Path, target: Any) -> Any:
    """Read and verify the frozen weights.

    Args:
        checkpoints: The folder of the run's checkpoints.
        target: Shapes, dtypes and shardings of the parameters; values are converted to these dtypes.

    Raises:
        UserError: They are missing or damaged.
    """
    folder = base_folder(checkpoints)
    try:
        fields, _ = read_fields(folder, {"params": target}, [_STEP])
    except UserError as error:
        raise missing_base_error(checkpoints, str(error)) from None
    return fields["params"]


def missing_base_error(checkpoints: Path | epath.Path, reason: str = "it is missing") -> UserError:
    """Return the error for a run whose frozen weights are missing or damaged.

    Args:
        checkpoints: The folder of the run's checkpoints.
        reason: The problem.
    """
    return UserError(
        f"the frozen weights in {base_folder(checkpoints)} cannot be used, and without them neither can this run: "
        f"restore that folder from a backup, or start another --run ({reason})"
    )


def read_merged(
    checkpoints: Path | epath.Path,
    config: Config,
    target: Any,
    average: int = 1,
    steps: Sequence[int] | None = None,
    compute: np.dtype | None = None,
) -> tuple[Any, int]:
    """Read the parameters of a run as those of a model without adapters; its averages if `average_decay` is set.

    Args:
        checkpoints: The folder of the run's checkpoints.
        config: The config of the run.
        target: Shapes, dtypes and shardings of the model's parameters.
        average: Number of checkpoints to average, see `read_params`.
        steps: Steps in the order in which they are tried; None: all, newest first.
        compute: The dtype that the model will round weights to; a warning is logged if adapters lose much by it.

    Returns:
        The parameters, with the adapters of a LoRA run merged into them, and the step of the first valid checkpoint.

    Raises:
        UserError: There is no usable checkpoint, or the frozen weights are damaged.
    """
    moving_average = bool(config.optimizer.average_decay)
    if not config.lora.rank:
        return read_params(checkpoints, target, average, steps, moving_average=moving_average)
    base = read_base(checkpoints, target)
    adapters = lora_merge.abstract_adapters(target, config.lora)
    merge = jax.jit(partial(lora_merge.merge, config=config.lora))

    def convert(adapters: Any) -> Any:
        merged = merge(base, adapters)
        if compute is not None and compute != np.float32 and average == 1:
            error = float(jax.jit(partial(lora_merge.rounding_error, dtype=compute))(base, merged))
            if error > _LARGE_ERROR:
                logger.warning(_ROUNDED, compute.name, 100 * error)
        return merged

    return read_params(checkpoints, adapters, average, steps, convert, moving_average)
