"""First calls of programs on GPUs: never at the same time as a transfer of another thread."""

import threading

import numpy as np
import pytest

from slm_jax.distributed.first_calls import FirstCalls
from slm_jax.distributed.platform import Platform


class Device:
    """Records whether a transfer began while a program was called."""

    def __init__(self):
        self.in_program = threading.Event()
        self.transferred = threading.Event()

    def step(self, state, batch):
        """Wait a moment for a transfer of the other thread, and return whether there was one."""
        self.in_program.set()
        overlaps = self.transferred.wait(0.2)
        self.in_program.clear()
        self.transferred.clear()
        return np.array(overlaps)

    def put(self, batch):
        self.transferred.set()
        return batch


def overlaps(device: Device, program, put, batch) -> bool:
    """Call a program, and begin a transfer in another thread as soon as it runs."""

    def copy():
        device.in_program.wait()
        put(batch)

    thread = threading.Thread(target=copy)
    thread.start()
    result = bool(program(None, batch))
    thread.join()
    device.transferred.clear()
    return result


@pytest.mark.parametrize(("platform", "first"), [("gpu", False), ("cpu", True), ("tpu", True)])
def test_no_transfer_begins_during_the_first_call_on_a_gpu(platform, first):
    device = Device()
    calls = FirstCalls(Platform(platform))
    program = calls.program(device.step)
    put = calls.transfer(device.put)
    narrow = {"input_ids": np.zeros((2, 4), np.int32)}
    wide = {"input_ids": np.zeros((2, 8), np.int32)}
    assert [overlaps(device, program, put, batch) for batch in (narrow, narrow, wide, narrow)] == [
        first,
        True,
        first,
        True,
    ]


def test_results_and_errors_are_those_of_the_function():
    calls = FirstCalls(Platform("gpu"))
    assert calls.program(lambda state, batch: state + batch["x"])(1, {"x": np.ones(2)}).tolist() == [2, 2]
    failing = calls.program(lambda state, batch: batch["missing"])
    for _ in range(2):  # the first error leaves no lock behind
        with pytest.raises(KeyError):
            failing(None, {"x": np.ones(2)})
    assert calls.transfer(lambda batch: batch)({"x": 1}) == {"x": 1}
