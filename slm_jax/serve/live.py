"""The live view: runs while they train, and newer checkpoints for the models that are served."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.responses import Response

from slm_jax.run.directory import Run
from slm_jax.run.load import load_run
from slm_jax.serve.auth import AsciiJSONResponse
from slm_jax.serve.engine import Engine
from slm_jax.serve.errors import ApiError
from slm_jax.serve.gate import Gate
from slm_jax.serve.runs import RunList
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

_FOLLOW_SECONDS = 5.0  # between two looks at the checkpoints of the served runs
_REPORT_POLICY = (  # no access to this server
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)


class LiveView:
    """Runs, curves and reports for the page; replaces the weights of engines.

    Its functions read files: call all but `follow` and `load` in threads.
    """

    def __init__(self, engines: Mapping[str, Engine], folders: Sequence[Path]):
        """Create the view.

        Args:
            engines: The engine of each model, by name.
            folders: Folders whose runs are shown as well.
        """
        self._engines = engines
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

    async def load(self, name: str) -> Response:
        """Load the newest checkpoint of a served run; requests in progress end with the weights that they have.

        Raises:
            ApiError: The run is not served (404), or its checkpoint cannot be loaded (409).
        """
        if name not in self._engines:
            raise ApiError(404, f"there is no model {name!r}: GET /v1/models lists them", "run", "model_not_found")
        try:
            step = await self._loading.run(self._load_newest, self._engines[name])
        except UserError as error:
            raise ApiError(409, str(error), "run") from None
        return AsciiJSONResponse({"id": name, "step": step})

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
                try:
                    newest = await asyncio.to_thread(engine.run.run.newest_step)
                    if newest not in (None, engine.run.step, tried.get(name)):
                        tried[name] = newest
                        await self._loading.run(self._load_newest, engine)
                except (UserError, ApiError) as error:
                    logger.warning("%s: a newer checkpoint is not served: %s", name, error)
