"""Read parameters from checkpoints without changing them, for everything but the resumption of training."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from slm_jax.distributed import agreement, multihost
from slm_jax.run.checkpoint import open_folder, verify_checkpoint
from slm_jax.run.quiet import quiet_orbax
from slm_jax.run.restore import newest_first, raise_mismatch, warn_of_damage
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural


def read_fields(
    folder: Path | epath.Path, item: dict[str, Any], steps: Sequence[int] | None = None
) -> tuple[dict[str, Any], int]:
    """Read some fields of the state from the first valid checkpoint of some; the folder is not changed.

    Args:
        folder: The folder of the checkpoints.
        item: Shapes, dtypes and shardings of the fields to read.
        steps: Steps in the order in which they are tried; None: all, newest first.

    Returns:
        The fields, and the step. Corrupt checkpoints are logged and skipped.

    Raises:
        UserError: There is no valid checkpoint.
    """
    for fields in _read(folder, item, steps):
        return fields
    if steps is not None and len(steps) == 1:
        raise UserError(f"the checkpoint of step {steps[0]} in {folder} cannot be used: choose another step")
    raise UserError(f"no usable checkpoint in {folder}")


def read_params(
    folder: Path | epath.Path,
    target: Any,
    average: int = 1,
    steps: Sequence[int] | None = None,
    convert: Callable[[Any], Any] = lambda params: params,
    moving_average: bool = False,
) -> tuple[Any, int]:
    """Read the parameters of a checkpoint, or average those of several.

    Args:
        folder: The folder of the checkpoints.
        target: Shapes, dtypes and shardings of the parameters.
        average: Number of checkpoints to average with equal weights, in float64 (Vaswani et al. 2017, section 6.1,
            average the last 5 or 20).
        steps: Steps in the order in which they are tried; None: all, newest first.
        convert: Function of the parameters of one checkpoint; its results are averaged and returned.
        moving_average: Read the average over the steps that the run keeps (`optimizer.average_decay`) in place of the
            parameters.

    Returns:
        The parameters, and the step of the first valid checkpoint. Corrupt checkpoints are logged and skipped.

    Raises:
        UserError: There are fewer valid checkpoints than `average`.
    """
    item = {"average": {"params": target}} if moving_average else {"params": target}
    if average == 1:
        fields, step = read_fields(folder, item, steps)
        return convert(fields.get("average", fields)["params"]), step
    total = None
    averaged = []
    for fields, step in itertools.islice(_read(folder, item, steps), average):
        params = convert(fields.get("average", fields)["params"])
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        total = wide if total is None else jax.tree.map(np.add, total, wide)
        averaged.append(step)
    if len(averaged) < average:
        raise UserError(
            f"{folder} holds {plural(len(averaged), 'complete checkpoint')}, of steps {averaged}, not {average} to "
            "average: ask for fewer, or train with a larger --checkpoint.keep"
        )
    mean = jax.tree.map(lambda x, p: jax.device_put((x / average).astype(p.dtype), p.sharding), total, params)
    return mean, averaged[0]


def _read(
    folder: Path | epath.Path, item: dict[str, Any], steps: Sequence[int] | None
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield some fields of the state, and the step, of every valid checkpoint of `steps`; None: all, newest first."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    restore = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    root = open_folder(folder)
    reader = ocp.CompositeCheckpointHandler()  # by the handler: a checkpointer would wait for processes that fail
    args = ocp.args.Composite(state=restore)
    with quiet_orbax(), contextlib.closing(reader):
        for step in newest_first(root) if steps is None else steps:
            path = root / str(step)
            checked = agreement.attempt(
                f"verification of checkpoint {step}", partial(verify_checkpoint, root, step, multihost.part())
            )
            if checked.errors:
                warn_of_damage(step, checked, path)
                continue
            restored = agreement.attempt(f"restoring checkpoint {step}", partial(_read_state, reader, path, args))
            if restored.errors:
                raise_mismatch(path, restored, bool(checked.value))
                warn_of_damage(step, restored, path)
                continue
            yield restored.value or {}, step


def _read_state(reader: ocp.CompositeCheckpointHandler, path: epath.Path, args: Any) -> dict[str, Any]:
    """Return fields of the state of a checkpoint."""
    return dict(jax.block_until_ready(reader.restore(path, args=args).state))
