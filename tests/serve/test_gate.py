"""Bounded work in threads."""

import asyncio
import threading

import pytest

pytest.importorskip("starlette")

from slm_jax.serve.errors import ApiError
from slm_jax.serve.gate import Gate


def test_calls_run_few_at_a_time_and_are_refused_beyond_the_waiting_ones():
    release = threading.Event()
    lock = threading.Lock()
    running = 0
    peak = 0

    def work(value):
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        assert release.wait(30)
        with lock:
            running -= 1
        return value

    async def main():
        gate = Gate(running=2, waiting=3)
        calls = [asyncio.ensure_future(gate.run(work, value)) for value in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="5 requests") as error:
            await gate.run(work, 5)
        assert (error.value.status, error.value.headers()) == (429, {"retry-after": "1"})
        while running < 2:
            await asyncio.sleep(0.01)
        release.set()
        assert await asyncio.gather(*calls) == [0, 1, 2, 3, 4]
        assert await gate.run(work, 6) == 6
        with pytest.raises(ZeroDivisionError):
            await gate.run(lambda: 1 / 0)
        assert await gate.run(work, 7) == 7

    asyncio.run(main())
    assert peak == 2


def test_a_waiting_call_can_be_canceled():
    release = threading.Event()

    async def main():
        gate = Gate(running=1, waiting=1)
        first = asyncio.ensure_future(gate.run(release.wait, 30))
        second = asyncio.ensure_future(gate.run(lambda: 1))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        third = asyncio.ensure_future(gate.run(lambda: 3))
        release.set()
        assert await asyncio.gather(first, third) == [True, 3]

    asyncio.run(main())
