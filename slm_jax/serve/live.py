"""The live view: runs while they train, newer checkpoints for the served models, and other runs in their place."""

import asyncio
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import jax
from starlette.responses import Response

from slm_jax.model.abstract import abstract_model
from slm_jax.run.directory import Run
from slm_jax.run.load import load_run, load_tokenizer
from slm_jax.run.selection import Step
from slm_jax.serve.auth import AsciiJSONResponse
from slm_jax.serve.engine import Engine
from slm_jax.serve.errors import ApiError
from slm_jax.serve.gate import Gate
from slm_jax.serve.models import Models
from slm_jax.serve.runs import RunList
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import memory_size
from slm_jax.utils.memory import free_host_memory

logger = logging.getLogger(__name__)

_COPIES = 2  # of the parameters in memory while an engine is made: as stored, and as decoding reads them
_FOLLOW_SECONDS = 5.0  # between two looks at the checkpoints of the served runs
_REPORT_POLICY = (  # no access to this server
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)


def _require_memory(run: Run, prefix_cache: int) -> None:
    """Refuse a run whose parameters do not fit into the free memory beside those that are served.

    Args:
        run: The run.
        prefix_cache: Maximum size of its prefix cache in bytes, which counts as well.

    Raises:
        UserError: They do not fit; or the run cannot be read.
    """
    device = jax.devices()[0]
    _, shapes = abstract_model(run.read_config(), load_tokenizer(run).vocab_size)
    needed = _COPIES * sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) + prefix_cache
    stats = device.memory_stats() or {}
    if device.platform == "cpu" or "bytes_limit" not in stats:
        free = free_host_memory()
    else:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if needed > free:
        raise UserError(
            f"{run.path} needs {memory_size(needed)} of memory beside the model that is served, {memory_size(free)} "
            "are free: stop the server and start it with this run"
        )


class LiveView:
    """Runs, curves and reports for the page; replaces the weights of engines, and engines.

    Its functions read files: call all but `follow` and `load` in threads.
    """

    def __init__(self, engines: Models, folders: Sequence[Path], step: Step = None, warm_up: bool = False):
        """Create the view.

        Args:
            engines: The engine of each model.
            folders: Folders whose runs are shown as well, and may replace those that are served.
            step: The checkpoint of a run that replaces another one, see `load_run`.
            warm_up: Let it compile every program that requests will need.
        """
        self._engines = engines
        self._step = step
        self._warm_up = warm_up
        self._list = RunList(self._served, folders)
        self._loading = Gate(1, 1)

    def _served(self) -> dict[str, tuple[Run, int]]:
        return {name: (engine.run.run, engine.run.step) for name, engine in self._engines.items()}

    def runs(self) -> Response:
        """Describe all runs."""
        return AsciiJSONResponse({"runs": self._list.describe()})

    def curve(self, name: str, width: int, known: str | None) -> Response:
        """Return the curves of a run.

        Args:
            name: Its name.
            width: Steps of a point; 0: as the length of the run asks for.
            known: The ETag of the response that the client has; for the same one, the response is empty.

        Raises:
            ApiError: There is no such run (404).
        """
        version = self._list.version(name)
        if version is None:
            raise ApiError(404, f"there is no run {name!r}: GET /api/runs lists them", "model", "model_not_found")
        headers = {"etag": f'"{version}-{width}"', "cache-control": "no-cache"}
        if known == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return AsciiJSONResponse(self._list.curves(name, width), headers=headers)

    def report(self, name: str) -> Response:
        """Return the report.html of a run.

        Raises:
            ApiError: There is none (404).
        """
        run = self._list.runs().get(name)
        try:
            content = run.report.read_bytes() if run is not None else None
        except OSError:
            content = None
        if content is None:
            raise ApiError(404, f"there is no report of a run {name!r}: python -m slm_jax.report writes it", "run")
        headers = {"content-security-policy": _REPORT_POLICY, "cache-control": "no-cache"}
        return Response(content, media_type="text/html", headers=headers)

    async def load(self, name: str, replace: str | None = None) -> Response:
        """Load a checkpoint; requests in progress end with the weights that they have.

        Args:
            name: The run.
            replace: The model that the run takes the place of; None: the newest checkpoint of a served run is loaded.

        Raises:
            ApiError: The run or model does not exist (404), or its checkpoint cannot be loaded (409).
        """
        param, served = ("run", name) if replace is None else ("replace", replace)
        if served not in self._engines:
            raise ApiError(404, f"there is no model {served!r}: GET /v1/models lists them", param, "model_not_found")
        try:
            if replace is None:
                step = await self._loading.run(self._load_newest, self._engines[name])
            else:
                step = await self._replace(name, replace)
        except UserError as error:
            raise ApiError(409, str(error), "run") from None
        return AsciiJSONResponse({"id": name, "step": step})

    async def _replace(self, name: str, replace: str) -> int:
        """Serve a run of the list in place of a model; return the step of its checkpoint."""
        self._require_unserved(name)
        old = self._engines[replace]
        engine = await self._loading.run(self._load_other, name, old)
        try:  # another request may have changed the models while this one was loading
            self._require_unserved(name)
            if self._engines.get(replace) is not old:
                raise UserError(f"{replace} is not served any more")
        except UserError:
            engine.close()
            raise
        engine.start(self._warm_up)
        self._engines.replace(replace, name, engine)
        logger.info("%s: serving step %d, in place of %s", name, engine.run.step, replace)
        return engine.run.step

    def _require_unserved(self, name: str) -> None:
        """Refuse to serve a run twice under the same name.

        Raises:
            UserError: It is served.
        """
        if name in self._engines:
            raise UserError(f"run {name!r} is served already: leave out replace to load its newest checkpoint")

    def _load_other(self, name: str, old: Engine) -> Engine:
        """Load a run of the list; return its engine, which is not started.

        Raises:
            ApiError: There is no such run.
            UserError: It cannot be loaded.
        """
        run = self._list.runs().get(name)
        if run is None:
            raise ApiError(404, f"there is no run {name!r}: GET /api/runs lists them", "run", "model_not_found")
        try:
            _require_memory(run, old.max_prefix_bytes)
            return old.for_run(load_run(str(run.path), step=self._step), name)
        except UserError:
            raise
        except Exception as error:  # of the device: out of memory; of a config that this version cannot build
            logger.warning("%s: %s", run.path, error)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{run.path} cannot be served: {reason}") from None

    def _load_newest(self, engine: Engine) -> int:
        """Give an engine the newest checkpoint of its run; return its step."""
        loaded = load_run(str(engine.run.run.path), step="last")
        if loaded.step != engine.run.step:
            engine.replace_weights(loaded)
            logger.info("%s: serving step %d", engine.name, loaded.step)
        return loaded.step

    async def follow(self) -> None:
        """Load new checkpoints of the served runs as they appear, until the task is canceled."""
        tried: dict[str, int | None] = {}
        while True:
            await asyncio.sleep(_FOLLOW_SECONDS)
            for name, engine in self._engines.items():
                if self._engines.get(name) is not engine:
                    continue
                try:
                    newest = await asyncio.to_thread(engine.run.run.newest_step)
                    if newest not in (None, engine.run.step, tried.get(name)):
                        tried[name] = newest
                        await self._loading.run(self._load_newest, engine)
                except ApiError as error:  # other checkpoints are being loaded: again at the next look
                    tried.pop(name, None)
                    logger.info("%s: a newer checkpoint is not served yet: %s", name, error)
                except UserError as error:
                    logger.warning("%s: a newer checkpoint is not served: %s", name, error)
