"""First calls of compiled programs on GPUs, while no other thread uses the device.

cuDNN builds its attention kernels when a program that contains them is called for the first time, and records CUDA
graphs for that. With jax 0.11.2 and cuDNN 9.19 on one H200, three of six runs of `slm_jax.train` ended in their first
steps: "cuda_graph_end_capture(fake_stream, &graph_obj) failed with capturing stream has unjoined work". Steps in a
process without a thread that copies batches meanwhile never failed (five of five), so the two are kept apart here.
Whether that is the cause is not known: of twenty later runs none failed, eight of them without this module.
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from slm_jax.distributed.platform import Platform

F = TypeVar("F", bound=Callable[..., Any])


class FirstCalls:
    """First calls of programs and transfers of other threads, never at the same time on a GPU.

    On other platforms the functions are returned as they are.
    """

    def __init__(self, platform: Platform):
        """Take the hardware that the programs run on."""
        self._is_needed = platform.name == "gpu"
        self._device = threading.Lock()

    def program(self, function: F) -> F:
        """Return a program whose first call for each shape of its last argument has the device alone.

        Args:
            function: A compiled or jitted function. Its last positional argument is a batch, a dict of arrays.
        """
        if not self._is_needed:
            return function
        known: set[tuple[tuple[int, ...], ...]] = set()

        def call(*args: Any) -> Any:
            shapes = tuple(x.shape for x in jax.tree.leaves(args[-1]))
            if shapes in known:
                return function(*args)
            with self._device:
                result = jax.block_until_ready(function(*args))
            known.add(shapes)
            return result

        return call  # type: ignore[return-value]

    def transfer(self, function: F) -> F:
        """Return a function that copies arrays to the device, and waits for them, while no program is called first."""
        if not self._is_needed:
            return function

        def call(*args: Any) -> Any:
            with self._device:
                return jax.block_until_ready(function(*args))

        return call  # type: ignore[return-value]
