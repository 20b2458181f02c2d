"""The ASGI application: routes of the API and of the page.

No request can name a file: models, metrics and reports are those of the runs that the command line names, and of the
other runs in the folders that it names, which requests choose by name.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from slm_jax.run.conversations import is_chat_trained
from slm_jax.run.selection import Step
from slm_jax.serve.answers import Answer, Limits
from slm_jax.serve.auth import AsciiJSONResponse, Auth, Receive, Scope, Send
from slm_jax.serve.chat import ChatCompletion
from slm_jax.serve.chat_schema import ChatRequest
from slm_jax.serve.completions import Completion
from slm_jax.serve.engine import Engine
from slm_jax.serve.errors import ApiError
from slm_jax.serve.event_stream import EventStream, wait_for_disconnect
from slm_jax.serve.gate import Gate
from slm_jax.serve.live import LiveView
from slm_jax.serve.models import Models
from slm_jax.serve.openapi import ENDPOINTS, openapi_document
from slm_jax.serve.prometheus import server_metrics
from slm_jax.serve.responses import Health, ModelBody, ModelList
from slm_jax.serve.schema import (
    CompletionRequest,
    CurveQuery,
    CutRequest,
    ExplainQuery,
    HealthQuery,
    LoadRequest,
    ReportQuery,
    VocabularyQuery,
)
from slm_jax.serve.validation import Body
from tokenizer import HybridTokenizer, TokenizerError, pretrained_names
from tokenizer.inspect import playground

Parsed = TypeVar("Parsed", bound=Body)
WEB = Path(__file__).parent / "web"
_ENCODING_THREADS = 4
_MAX_WAITING = 256  # requests whose prompts wait to be encoded; the engines bound those that are encoded
_LONG_CHARACTERS = 20_000  # prompts beyond take 20 ms and more, and wait for each other, not others for them
_MAX_LONG_WAITING = 32
_MAX_INSPECTIONS = 8  # waiting requests of the page: tokenizer view and curves


class Server:
    """Request handlers over one or more engines.

    Attributes:
        engines: The engine of each model.
        limits: Limits of a request.
        responses: Number of responses by HTTP status.
    """

    def __init__(
        self,
        engines: dict[str, Engine],
        limits: Limits,
        warm_up: bool = False,
        folders: Sequence[Path] = (),
        follow: bool = False,
        step: Step = None,
    ):
        """Create the handlers; the engines are started and closed with the application.

        Args:
            engines: The engine of each model, by name; the first is the default model.
            limits: Limits of a request.
            warm_up: Compile every program that requests will need, while requests are answered.
            folders: Folders whose runs the page shows as well.
            follow: Load the newest checkpoint of a served run when there is a new one.
            step: The checkpoint of a run that replaces another one, see `load_run`.
        """
        self.engines = Models(engines, self._describe)
        self.limits = limits
        self._warm_up = warm_up
        self.responses: dict[int, int] = {}
        self._document: dict[str, Any] = {}
        self._keyed = False
        self._encoding = Gate(_ENCODING_THREADS, _MAX_WAITING)
        self._long_encoding = Gate(1, _MAX_LONG_WAITING)
        self._inspection = Gate(1, _MAX_INSPECTIONS)
        self._live = LiveView(self.engines, folders, step, warm_up)
        self._follow = follow
        self._describe()

    def _describe(self) -> None:
        """Make what names the models: the vocabularies of the page and the OpenAPI document."""
        # The view explains how the project's own tokenizers make tokens; it does not know those of other kinds.
        own = [name for name, engine in self.engines.items() if isinstance(engine.run.tokenizer, HybridTokenizer)]
        self._vocabularies = playground.PlaygroundApi([*own, *pretrained_names()], self._tokenizer)
        self._document = openapi_document(
            {each.handler: str(getattr(self, each.handler).__doc__) for each in ENDPOINTS},
            self.engines,
            self._vocabularies.names,
            self._keyed,
        )

    def _tokenizer(self, name: str) -> HybridTokenizer:
        engine = self.engines.get(name)
        own = engine.run.tokenizer if engine else None
        return own if isinstance(own, HybridTokenizer) else HybridTokenizer.pretrained(name)

    def _engine(self, name: str | None) -> tuple[str, Engine]:
        """Return name and engine of a model, the first one by default."""
        name = next(iter(self.engines)) if name is None else name
        if name not in self.engines:
            raise ApiError(404, f"there is no model {name!r}: GET /v1/models lists them", "model", "model_not_found")
        return name, self.engines[name]

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions: continue prompts, complete or as server-sent events."""
        body = self._parse_request(CompletionRequest, await request.body())
        name, engine = self._engine(body.model)
        completion = Completion(name, engine, body, self.limits)
        await self._encoding_gate(sum(map(len, body.prompts()))).run(completion.encode)
        completion.submit()
        if body.stream:
            return EventStream(completion, completion.events())
        return await self._complete(request, completion, completion.response())

    def _encoding_gate(self, characters: int) -> Gate:
        """Return where a prompt is encoded: in threads, so that no other response is delayed."""
        return self._long_encoding if characters > _LONG_CHARACTERS else self._encoding

    async def _complete(self, request: Request, answer: Answer, body: Coroutine[Any, Any, Any]) -> Response:
        """Return a complete response; the slots are freed if the client disconnects before."""
        response = asyncio.ensure_future(body)
        disconnect = asyncio.ensure_future(wait_for_disconnect(request.receive))
        try:
            await asyncio.wait((response, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not response.done():
                answer.cancel()
                return Response(status_code=499)  # nginx's status of a client that closed the connection
            return AsciiJSONResponse(response.result())
        finally:
            disconnect.cancel()
            response.cancel()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions: answer a conversation, complete or as server-sent events."""
        body = self._parse_request(ChatRequest, await request.body())
        name, engine = self._engine(body.model)
        completion = ChatCompletion(name, engine, body, self.limits)
        gate = self._encoding_gate(completion.characters)
        await gate.run(completion.encode)
        completion.submit()

        def follow_up(text: str) -> None:
            completion.follow_up(text, gate.run)

        if body.stream:
            return EventStream(completion, completion.events(follow_up))
        return await self._complete(request, completion, completion.response(follow_up))

    def _parse_request(self, schema: type[Parsed], content: bytes) -> Parsed:
        """Validate a body; an unknown model is reported before other parameters, whose bounds may be those of others.

        Raises:
            ApiError: The model is unknown (404), or the body is invalid (400).
        """
        try:
            return schema.parse(content)
        except ApiError:
            with contextlib.suppress(ValueError, RecursionError):
                tree = json.loads(content)
                if isinstance(tree, dict) and isinstance(tree.get("model"), str):
                    self._engine(tree["model"])
            raise

    async def models(self, request: Request) -> Response:
        """GET /v1/models: list the models."""
        content: ModelList = {"object": "list", "data": [self._model(name) for name in self.engines]}
        return AsciiJSONResponse(content)

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME: describe a model."""
        return AsciiJSONResponse(self._model(self._engine(request.path_params["name"])[0]))

    def _model(self, name: str) -> ModelBody:
        engine = self.engines[name]
        run = engine.run
        return {
            "id": name,
            "object": "model",
            "created": int(run.run.config.stat().st_mtime),
            "owned_by": "slm_jax",
            "step": run.step,
            "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(run.model, nnx.Param))),
            "context": engine.context,
            "vocab_size": run.tokenizer.vocab_size,
            "max_prompt_tokens": self.limits.prompt_tokens,
            "max_tokens": self.limits.max_tokens,
            "chat": engine.chat_template is not None,
            "chat_trained": is_chat_trained(run.run),
        }

    async def curve(self, request: Request) -> Response:
        """GET /api/curve: the learning curves that the page draws; with an ETag, so that polling is cheap."""
        query = CurveQuery.parse_query(request.query_params)
        name = next(iter(self.engines)) if query.run is None else query.run
        return await self._inspection.run(self._live.curve, name, query.width, request.headers.get("if-none-match"))

    async def runs(self, request: Request) -> Response:
        """GET /api/runs: the runs that the page shows, with their progress."""
        return await self._inspection.run(self._live.runs)

    async def report(self, request: Request) -> Response:
        """GET /api/report: the report of a run, without access to this server."""
        return await self._inspection.run(self._live.report, ReportQuery.parse_query(request.query_params).run)

    async def load(self, request: Request) -> Response:
        """POST /api/load: serve the newest checkpoint of a run that the server has loaded, or a run in place of it.

        With `replace` the run, one of GET /api/runs, takes the place of that model. Its name in the API is that of the
        run. Requests in progress are completed by the model that they began with; one whose prompt is still being
        encoded may get 503.
        """
        body = LoadRequest.parse(await request.body())
        return await self._live.load(body.run, body.replace)

    async def vocabularies(self, request: Request) -> Response:
        """GET /api/vocabularies: names of the vocabularies of the tokenizer view."""
        return await self._inspect("vocabularies")

    async def describe(self, request: Request) -> Response:
        """GET /api/describe: size of a vocabulary."""
        query = VocabularyQuery.parse_query(request.query_params)
        return await self._inspect("describe", {"vocabulary": query.vocabulary})

    async def cut(self, request: Request) -> Response:
        """POST /api/cut: tokens of a text."""
        body = CutRequest.parse(await request.body())
        return await self._inspect("cut", body=body.model_dump())

    async def explain(self, request: Request) -> Response:
        """GET /api/explain: what a token is made of."""
        query = ExplainQuery.parse_query(request.query_params)
        return await self._inspect("explain", {"vocabulary": query.vocabulary, "id": str(query.id)})

    async def _inspect(self, path: str, query: Mapping[str, str] = {}, body: Mapping[str, Any] = {}) -> Response:
        def answer() -> Response:
            if path == "explain" and int(query["id"]) >= self._vocabularies.tokenizer(query["vocabulary"]).vocab_size:
                raise ApiError(404, f"vocabulary {query['vocabulary']!r} has no id {query['id']}", "id")
            return AsciiJSONResponse(self._vocabularies(path, query, body))

        try:
            return await self._inspection.run(answer)
        except TokenizerError as error:
            raise ApiError(400, str(error)) from None

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json: this document."""
        return AsciiJSONResponse(self._document)

    async def health(self, request: Request) -> Response:
        """GET /health: 200 when all engines run and have compiled their programs, else 503.

        Requests are answered while programs are compiled, but the first ones wait for them: a load balancer should
        send them elsewhere. `?code=200` has the same body with status 200 always, for pages that show the progress.
        """
        query = HealthQuery.parse_query(request.query_params)
        failed = [name for name, engine in self.engines.items() if engine.failure]
        progress = {name: engine.progress for name, engine in self.engines.items()}
        content: Health = {"status": "ok", "failed": failed}
        if any(each.done < each.total for each in progress.values()):
            content["status"] = "starting"
            content["starting"] = {
                name: {"done": each.done, "total": each.total}
                for name, each in progress.items()
                if each.done < each.total
            }
        if failed:
            content["status"] = "failed"
        return AsciiJSONResponse(content, 200 if query.code or content["status"] == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: statistics for Prometheus."""
        return PlainTextResponse(
            "\n".join([*server_metrics(self.engines, self.responses), ""]), media_type="text/plain; version=0.0.4"
        )

    def application(self, api_key: str, hosts: list[str], max_body: int) -> Auth:
        """Return the ASGI application.

        Args:
            api_key: The key that requests must carry; empty: none.
            hosts: Host names that the server is known by, besides localhost and the machine's name.
            max_body: Maximum size of a request body in bytes.
        """
        self._keyed = bool(api_key)
        self._describe()
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
            *(Route(each.path, getattr(self, each.handler), methods=[each.method]) for each in ENDPOINTS),
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
        following = asyncio.ensure_future(self._live.follow()) if self._follow else None
        try:
            yield
        finally:
            if following is not None:
                following.cancel()
            await self.engines.close()


async def _on_api_error(request: Request, error: Any) -> Response:
    return AsciiJSONResponse(error.body(), error.status, error.headers())


async def _on_http_error(request: Request, error: Any) -> Response:
    messages = {404: "not found", 405: "method not allowed for this path"}
    body = ApiError(error.status_code, messages.get(error.status_code, error.detail)).body()
    return AsciiJSONResponse(body, error.status_code, error.headers)


async def _on_exception(request: Request, error: Exception) -> Response:
    return AsciiJSONResponse(ApiError(500, "internal error; see the server's log").body(), 500)
