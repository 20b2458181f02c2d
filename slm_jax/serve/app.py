"""The ASGI application: routes of the API and of the page.

No request can name a file: models and their metrics are those of the command line.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from slm_jax.run.metrics import iter_rows
from slm_jax.serve.auth import AsciiJSONResponse, Auth, Receive, Scope, Send
from slm_jax.serve.completions import Completion, Limits
from slm_jax.serve.engine import Engine
from slm_jax.serve.errors import ApiError
from slm_jax.serve.gate import Gate
from slm_jax.serve.metrics import escape_label, metric
from slm_jax.serve.schema import CompletionRequest
from slm_jax.serve.validation import parse_json
from tokenizer import HybridTokenizer, TokenizerError, pretrained_names
from tokenizer.inspect import playground

WEB = Path(__file__).parent / "web"
_ENCODING_THREADS = 2
_MAX_WAITING = 256  # requests whose prompts wait to be encoded; the engines bound those that are encoded
_MAX_INSPECTIONS = 8  # waiting requests of the page: tokenizer view and curves
_CURVE_POINTS = 150
_CURVE_FIELDS = ("loss", "val_loss", "lr", "val_bits_per_byte")


class Server:
    """Request handlers over one or more engines.

    Attributes:
        engines: The engine of each model, by name.
        limits: Limits of a request.
        responses: Number of responses by HTTP status.
    """

    def __init__(self, engines: dict[str, Engine], limits: Limits, warm_up: bool = False):
        """Create the handlers; the engines are started and closed with the application.

        Args:
            engines: The engine of each model, by name; the first is the default model.
            limits: Limits of a request.
            warm_up: Compile every program that requests will need, while requests are answered.
        """
        self.engines = engines
        self.limits = limits
        self._warm_up = warm_up
        self.responses: dict[int, int] = {}
        self._encoding = Gate(_ENCODING_THREADS, _MAX_WAITING)
        self._inspection = Gate(1, _MAX_INSPECTIONS)
        self._vocabularies = playground.PlaygroundApi([*engines, *pretrained_names()], self._tokenizer)

    def _tokenizer(self, name: str) -> HybridTokenizer:
        engine = self.engines.get(name)
        return engine.run.tokenizer if engine else HybridTokenizer.pretrained(name)

    def _engine(self, name: str | None) -> tuple[str, Engine]:
        """Return name and engine of a model, the first one by default."""
        name = next(iter(self.engines)) if name is None else name
        if name not in self.engines:
            raise ApiError(404, f"there is no model {name!r}: GET /v1/models lists them", "model", "model_not_found")
        return name, self.engines[name]

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions: continue prompts."""
        body = CompletionRequest.parse(await request.body())
        name, engine = self._engine(body.model)
        completion = Completion(name, engine, body, self.limits)
        # Encoding a long prompt takes a while: in a thread, so that other responses are not delayed.
        await self._encoding.run(completion.encode)
        completion.submit()
        if body.stream:
            return EventStream(completion)
        response = asyncio.ensure_future(completion.response())
        disconnect = asyncio.ensure_future(_wait_for_disconnect(request.receive))
        try:
            await asyncio.wait((response, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not response.done():
                completion.cancel()
                return Response(status_code=499)  # nginx's status of a client that closed the connection
            return AsciiJSONResponse(response.result())
        finally:
            disconnect.cancel()
            response.cancel()

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions, which many clients try first: not supported."""
        raise ApiError(404, "these models have no chat format: use POST /v1/completions with a prompt")

    async def models(self, request: Request) -> Response:
        """GET /v1/models: list the models."""
        return AsciiJSONResponse({"object": "list", "data": [self._model(name) for name in self.engines]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME: describe a model."""
        return AsciiJSONResponse(self._model(self._engine(request.path_params["name"])[0]))

    def _model(self, name: str) -> dict[str, Any]:
        run = self.engines[name].run
        return {
            "id": name,
            "object": "model",
            "created": int(run.run.config.stat().st_mtime),
            "owned_by": "slm_jax",
            "step": run.step,
            "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(run.model, nnx.Param))),
            "context": run.context,
            "vocab_size": run.tokenizer.vocab_size,
            "max_prompt_tokens": self.limits.prompt_tokens,
            "max_tokens": self.limits.max_tokens,
        }

    async def curve(self, request: Request) -> Response:
        """GET /api/curve?run=NAME: the learning curves that the page draws."""
        _, engine = self._engine(request.query_params.get("run"))
        return await self._inspection.run(lambda: AsciiJSONResponse(read_curves(engine.run.run.metrics)))

    async def vocabulary(self, request: Request) -> Response:
        """GET and POST /api/…: the requests of the tokenizer view."""
        body = parse_json(await request.body()) if request.method == "POST" else {}
        path = request.path_params["path"]
        query = dict(request.query_params)

        def answer() -> Response | None:
            content = self._vocabularies(path, query, body)
            return None if content is None else AsciiJSONResponse(content)

        try:
            response = await self._inspection.run(answer)
        except TokenizerError as error:
            raise ApiError(400, str(error)) from None
        if response is None:
            raise HTTPException(404)
        return response

    async def health(self, request: Request) -> Response:
        """GET /health: 200 when all engines run and have compiled their programs, else 503.

        Requests are answered while programs are compiled, but the first ones wait for them: a load balancer should
        send them elsewhere.
        """
        failed = [name for name, engine in self.engines.items() if engine.failure]
        progress = {name: engine.progress for name, engine in self.engines.items()}
        starting = {name: each._asdict() for name, each in progress.items() if each.done < each.total}
        status = "failed" if failed else "starting" if starting else "ok"
        content = {"status": status, "failed": failed, **({"starting": starting} if starting else {})}
        return AsciiJSONResponse(content, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: statistics for Prometheus."""
        return PlainTextResponse("\n".join([*self._metrics(), ""]), media_type="text/plain; version=0.0.4")

    def _metrics(self) -> Iterator[str]:
        engines = {f'model="{escape_label(name)}"': engine for name, engine in self.engines.items()}

        def samples(name: str, value: Callable[[Engine], float]) -> Iterator[str]:
            return (f"{name}{{{labels}}} {value(engine)}" for labels, engine in engines.items())

        responses = (
            f'slm_http_responses_total{{status="{status}"}} {count}' for status, count in sorted(self.responses.items())
        )
        yield from metric("slm_http_responses_total", "counter", "HTTP responses by status.", responses)
        counters = (
            ("slm_prompt_tokens_total", "Prompt tokens processed.", lambda e: e.counters.prompt_tokens),
            ("slm_drawn_tokens_total", "Tokens generated.", lambda e: e.counters.generated_tokens),
        )
        for name, description, value in counters:
            yield from metric(name, "counter", description, samples(name, value))
        finished = [
            f'slm_texts_total{{{labels},end="{reason}"}} {count}'
            for labels, engine in engines.items()
            for reason, count in sorted(engine.counters.finished.items())
        ]
        yield from metric("slm_texts_total", "counter", "Finished texts by finish reason.", finished)
        gauges = (
            ("slm_texts_writing", "Texts being generated.", lambda e: e.occupancy().running),
            ("slm_texts_waiting", "Texts waiting for a slot.", lambda e: e.occupancy().waiting),
            ("slm_slots", "Maximum number of texts generated at the same time.", lambda e: e.slots),
        )
        for name, description, value in gauges:
            yield from metric(name, "gauge", description, samples(name, value))
        histograms = (
            ("slm_first_token_seconds", "Time from request to first token.", lambda e: e.counters.first_token),
            ("slm_text_seconds", "Time from request to end of text.", lambda e: e.counters.request_time),
        )
        for name, description, histogram in histograms:
            lines = (line for labels, engine in engines.items() for line in histogram(engine).lines(name, labels))
            yield from metric(name, "histogram", description, lines)

    def application(self, api_key: str, hosts: list[str], max_body: int) -> Auth:
        """Return the ASGI application.

        Args:
            api_key: The key that requests must carry; empty: none.
            hosts: Host names that the server is known by, besides localhost and the machine's name.
            max_body: Maximum size of a request body in bytes.
        """
        files = {
            path.name: path for folder in (playground.WEB_FOLDER, WEB) for path in folder.iterdir() if path.is_file()
        }

        async def page(request: Request) -> Response:
            name = request.path_params.get("file", "index.html")
            if name not in files or files[name].suffix not in playground.MEDIA_TYPES:
                raise HTTPException(404)
            content, media_type = playground.read_asset(files[name])
            return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["GET", "POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/api/curve", self.curve),
            Route("/api/{path}", self.vocabulary, methods=["GET", "POST"]),
            Route("/", page),
            Route("/{file}", page),
        ]
        handlers: Any = {ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_exception}
        starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        return Auth(self._count_responses(starlette), api_key, hosts, max_body)

    def _count_responses(self, app: Any) -> Any:
        async def counting(scope: Scope, receive: Receive, send: Send) -> None:
            async def count(message: Any) -> None:
                if message["type"] == "http.response.start":
                    self.responses[message["status"]] = self.responses.get(message["status"], 0) + 1
                await send(message)

            await app(scope, receive, count)

        return counting

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        for engine in self.engines.values():
            engine.start(self._warm_up)
        try:
            yield
        finally:
            for engine in self.engines.values():
                await run_in_threadpool(engine.close)


class EventStream(Response):
    """A response of server-sent events that ends when it is complete or the client disconnects."""

    def __init__(self, completion: Completion):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; however it ends, the engine's slots are freed."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_events(send))
        disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((sending, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._completion.cancel()
            for task in (sending, disconnect):
                task.cancel()
            await asyncio.gather(sending, disconnect, return_exceptions=True)

    async def _send_events(self, send: Send) -> None:
        with contextlib.suppress(OSError):  # the client has disconnected
            async for event in self._completion.events():
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _on_api_error(request: Request, error: Any) -> Response:
    return AsciiJSONResponse(error.body(), error.status, error.headers())


async def _on_http_error(request: Request, error: Any) -> Response:
    messages = {404: "not found", 405: "method not allowed for this path"}
    body = ApiError(error.status_code, messages.get(error.status_code, error.detail)).body()
    return AsciiJSONResponse(body, error.status_code, error.headers)


async def _on_exception(request: Request, error: Exception) -> Response:
    return AsciiJSONResponse(ApiError(500, "internal error; see the server's log").body(), 500)


def read_curves(path: Path) -> dict[str, list[list[float]]]:
    """Read the learning curves of a run.

    Args:
        path: metrics.jsonl of the run; it may be growing or missing, and damaged lines are skipped.

    Returns:
        Points [step, value] of each field that the page draws; long curves are averaged over segments.
    """
    rows = [row for _, row in iter_rows(path, skip_damaged=True)]
    curves = {}
    for name in _CURVE_FIELDS:
        points = np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None], float).reshape(-1, 2)
        points = points[np.isfinite(points).all(axis=1)]
        segments = np.array_split(points, min(len(points), _CURVE_POINTS)) if len(points) else []
        curves[name] = [segment.mean(axis=0).round(6).tolist() for segment in segments]
    return curves
