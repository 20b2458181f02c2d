"""The application: which address answers what. No request names a file; the runs are the command line's."""

import asyncio
import contextlib
import json
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

from slm_jax.serve.auth import Guard, JsonAnswer, Receive, Scope, Send
from slm_jax.serve.completions import Completion, Limits
from slm_jax.serve.engine import Engine
from slm_jax.serve.metrics import label, metric
from slm_jax.serve.schema import ApiError, CompletionRequest
from tokenizer import HybridTokenizer, TokenizerError, pretrained_names
from tokenizer.inspect import playground

WEB = Path(__file__).parent / "web"
_CURVE_POINTS = 150
_CURVE_FIELDS = ("loss", "val_loss", "lr", "val_bits_per_byte")


class Server:
    """The addresses over some engines: {name of the run: its engine}."""

    def __init__(self, engines: dict[str, Engine], limits: Limits):
        self.engines, self.limits = engines, limits
        self.answered: dict[int, int] = {}  # by status
        self._vocabularies = playground.Answers([*engines, *pretrained_names()], self._tokenizer)

    def _tokenizer(self, name: str) -> HybridTokenizer:
        engine = self.engines.get(name)
        return engine.run.tokenizer if engine else HybridTokenizer.pretrained(name)

    def _engine(self, name: str | None) -> tuple[str, Engine]:
        name = next(iter(self.engines)) if name is None else name
        if name not in self.engines:
            raise ApiError(404, f"there is no model {name!r}: GET /v1/models lists them", "model", "model_not_found")
        return name, self.engines[name]

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = CompletionRequest.parse(await request.body())
        name, engine = self._engine(asked.model)
        # Encoding a long prompt takes a while: elsewhere, so that the others' tokens still come.
        completion = Completion(name, engine, asked, self.limits)
        await run_in_threadpool(completion.encode)
        completion.submit()
        if asked.stream:
            return EventStream(completion)
        answer = asyncio.ensure_future(completion.answer())
        left = asyncio.ensure_future(_left(request.receive))
        try:
            await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                completion.cancel()
                return Response(status_code=499)  # nobody is there to read it
            return JsonAnswer(answer.result())
        finally:
            left.cancel()
            answer.cancel()

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions, which many a client tries first."""
        raise ApiError(404, "these models continue text, they do not chat: POST /v1/completions with a prompt")

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JsonAnswer({"object": "list", "data": [self._model(name) for name in self.engines]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return JsonAnswer(self._model(self._engine(request.path_params["name"])[0]))

    def _model(self, name: str) -> dict[str, Any]:
        run = self.engines[name].run
        created = int(run.run.config.stat().st_mtime)
        parameters = sum(x.size for x in jax.tree.leaves(nnx.state(run.model, nnx.Param)))
        about = {"step": run.step, "parameters": parameters, "context": run.context}
        about["vocab_size"] = run.tokenizer.vocab_size
        limits = {"max_prompt_tokens": self.limits.prompt_tokens, "max_tokens": self.limits.max_tokens}
        return {"id": name, "object": "model", "created": created, "owned_by": "slm_jax", **about, **limits}

    async def curve(self, request: Request) -> Response:
        """GET /api/curve?run=NAME: the rows of metrics.jsonl, thinned, of the fields that the page draws."""
        _, engine = self._engine(request.query_params.get("run"))
        return JsonAnswer(await run_in_threadpool(read_curve, engine.run.run.metrics))

    async def vocabulary(self, request: Request) -> Response:
        """GET and POST /api/…: what the tokenizer playground asks."""
        body: Any = {}
        if request.method == "POST":
            try:
                body = json.loads(await request.body())
            except (ValueError, RecursionError):
                body = None
            if not isinstance(body, dict):
                raise ApiError(400, "the body is no JSON object")
        try:
            found = await run_in_threadpool(
                self._vocabularies, request.path_params["path"], dict(request.query_params), body
            )
        except TokenizerError as error:
            raise ApiError(400, str(error)) from None
        if found is None:
            raise HTTPException(404)
        return JsonAnswer(found)

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while every engine lives."""
        failed = [name for name, engine in self.engines.items() if engine.failure]
        state = {"status": "failed" if failed else "ok", "failed": failed}
        return JsonAnswer(state, 503 if failed else 200)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return PlainTextResponse("\n".join([*self._metrics(), ""]), media_type="text/plain; version=0.0.4")

    def _metrics(self) -> Iterator[str]:
        of = {f'model="{label(name)}"': engine for name, engine in self.engines.items()}

        def each(name: str, value: Callable[[Engine], float]) -> Iterator[str]:
            return (f"{name}{{{labels}}} {value(engine)}" for labels, engine in of.items())

        answers = (f'slm_http_responses_total{{status="{status}"}} {n}' for status, n in sorted(self.answered.items()))
        yield from metric("slm_http_responses_total", "counter", "Answers by status.", answers)
        counters = (
            ("slm_prompt_tokens_total", "Tokens of prompts.", lambda e: e.counters.prompt_tokens),
            ("slm_drawn_tokens_total", "Tokens written.", lambda e: e.counters.drawn_tokens),
        )
        for name, about, value in counters:
            yield from metric(name, "counter", about, each(name, value))
        ends = [
            f'slm_texts_total{{{labels},end="{end}"}} {count}'
            for labels, engine in of.items()
            for end, count in sorted(engine.counters.ended.items())
        ]
        yield from metric("slm_texts_total", "counter", "Texts by how they ended.", ends)
        gauges = (
            ("slm_texts_writing", "Texts being written.", lambda e: e.state()[0]),
            ("slm_texts_waiting", "Texts that wait for a slot.", lambda e: e.state()[1]),
            ("slm_slots", "Texts that can be written at once.", lambda e: e.slots),
        )
        for name, about, value in gauges:
            yield from metric(name, "gauge", about, each(name, value))
        for name, about, histogram in (
            ("slm_first_token_seconds", "From the request to its first token.", lambda e: e.counters.first_token),
            ("slm_text_seconds", "From the request to the end of its text.", lambda e: e.counters.whole_text),
        ):
            samples = (line for labels, engine in of.items() for line in histogram(engine).lines(name, labels))
            yield from metric(name, "histogram", about, samples)

    def application(self, api_key: str, hosts: list[str], max_body: int) -> Guard:
        """The ASGI application."""
        files = {path.name: path for folder in (playground.WEB, WEB) for path in folder.iterdir() if path.is_file()}

        async def page(request: Request) -> Response:
            name = request.path_params.get("file", "index.html")
            if name not in files or files[name].suffix not in playground.TYPES:
                raise HTTPException(404)
            content, kind = playground.asset(files[name])
            return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

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
        handlers: Any = {ApiError: _api_error, HTTPException: _http_error, Exception: _our_error}
        starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        return Guard(self._counting(starlette), api_key, hosts, max_body)

    def _counting(self, app: Any) -> Any:
        async def counting(scope: Scope, receive: Receive, send: Send) -> None:
            async def count(message: Any) -> None:
                if message["type"] == "http.response.start":
                    self.answered[message["status"]] = self.answered.get(message["status"], 0) + 1
                await send(message)

            await app(scope, receive, count)

        return counting

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        for engine in self.engines.values():
            engine.start()
        try:
            yield
        finally:
            for engine in self.engines.values():
                await run_in_threadpool(engine.close)


class EventStream(Response):
    """An answer as server-sent events, until it is whole or the client has left."""

    def __init__(self, completion: Completion):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; whatever ends it, the engine's slots are freed."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_all(send))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((sending, left), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._completion.cancel()
            for task in (sending, left):
                task.cancel()
            await asyncio.gather(sending, left, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        with contextlib.suppress(OSError):  # the client has left
            async for event in self._completion.events():
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _api_error(request: Request, error: Any) -> Response:
    headers = {"retry-after": "1"} if error.status == 429 else None
    return JsonAnswer(error.body(), error.status, headers)


async def _http_error(request: Request, error: Any) -> Response:
    text = {404: "there is nothing here", 405: "this address takes another method"}
    body = ApiError(error.status_code, text.get(error.status_code, error.detail)).body()
    return JsonAnswer(body, error.status_code, error.headers)


async def _our_error(request: Request, error: Exception) -> Response:
    return JsonAnswer(ApiError(500, "the server failed; its log says why").body(), 500)


def read_curve(path: Path) -> dict[str, list[list[float]]]:
    """{field: [[step, value], …]} of a run's metrics.jsonl; long curves as the means of some hundred stretches."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that is just being written
                rows.append(json.loads(line))
    curves = {}
    for name in _CURVE_FIELDS:
        points = np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None], float)
        points = points.reshape(-1, 2)[np.isfinite(points.reshape(-1, 2)).all(axis=1)]
        parts = np.array_split(points, min(len(points), _CURVE_POINTS)) if len(points) else []
        curves[name] = [part.mean(axis=0).round(6).tolist() for part in parts]
    return curves
