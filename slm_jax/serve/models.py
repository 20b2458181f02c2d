"""The served models by name, and the replacement of one of them by another run."""

import asyncio
import logging
from collections.abc import Callable, ItemsView, Iterator, Mapping

from slm_jax.serve.engine import Engine

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 1.0  # without requests, after which a replaced engine is closed: some were being encoded for it


class Models(Mapping[str, Engine]):
    """The engine of each model, by name; the first is the default.

    A replacement exchanges the whole mapping, so that threads which iterate over it see the old or the new one.
    """

    def __init__(self, engines: Mapping[str, Engine], on_change: Callable[[], None] = lambda: None):
        """Create the mapping.

        Args:
            engines: The engines.
            on_change: Called after each replacement.
        """
        self._engines = dict(engines)
        self._on_change = on_change
        self._retiring: dict[asyncio.Task[None], Engine] = {}

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    def items(self) -> ItemsView[str, Engine]:
        """Return the items at this moment."""
        return self._engines.items()

    def replace(self, old: str, name: str, engine: Engine) -> None:
        """Put an engine that has been started in the place of another one, which ends after its last request.

        Call it on the event loop.

        Args:
            old: The name of the model that is replaced.
            name: The name of the new one.
            engine: Its engine.
        """
        replaced = self._engines[old]
        self._engines = {
            (name if each == old else each): (engine if each == old else kept) for each, kept in self._engines.items()
        }
        task = asyncio.ensure_future(self._retire(replaced))
        self._retiring[task] = replaced
        task.add_done_callback(lambda done: self._retiring.pop(done, None))
        self._on_change()

    async def _retire(self, engine: Engine) -> None:
        """Close an engine when its requests have ended; their time is limited."""
        idle = 0.0
        while idle < _IDLE_SECONDS:
            await asyncio.sleep(0.1)
            idle = 0.0 if sum(engine.occupancy()) else idle + 0.1
        await asyncio.to_thread(engine.close)
        logger.info("%s: its last request has ended", engine.name)

    async def close(self) -> None:
        """Close all engines, those that were replaced included."""
        retiring = dict(self._retiring)
        for task in retiring:
            task.cancel()
        for engine in [*retiring.values(), *self._engines.values()]:
            await asyncio.to_thread(engine.close)
