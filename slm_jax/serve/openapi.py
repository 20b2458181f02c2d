"""The OpenAPI document: generated from the schemas that validate requests and type responses."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import TypeAdapter

import slm_jax
from slm_jax.serve import responses, schema
from slm_jax.serve.chat_schema import ChatRequest
from slm_jax.serve.errors import ErrorBody
from slm_jax.serve.validation import Body

_REF = "#/components/schemas/{model}"
_ERRORS = {
    400: "Invalid parameters: the message names all of them.",
    401: "The API key is missing or wrong.",
    403: "The request comes from a page of another site.",
    404: "There is no such path, model or id.",
    405: "The path has other methods.",
    408: "The body was not complete in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    421: "The Host header names another server.",
    409: "The checkpoint cannot be loaded; what is served stays.",
    429: "Too many requests run or wait; see the header Retry-After.",
    503: "The server stops, or an engine failed.",
    504: "The response was not complete in time.",
}
_STREAMS = {"completions": "CompletionBody", "chat": "ChatChunk"}  # handlers that stream, and the type of their events
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}


def _event(name: str) -> dict[str, Any]:
    """Return the schema of a server-sent event."""
    types = {"anyOf": [{"$ref": _REF.format(model=each)} for each in (name, "ErrorBody")]}
    data = [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": types}]
    return {
        "description": f"A server-sent event. Its data is a {name} with the new text of one choice, or an ErrorBody "
        "that ends the stream; the last event of a complete response is [DONE].",
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "anyOf": data}},
    }


class Endpoint(NamedTuple):
    """An endpoint of the API.

    Attributes:
        path: Path with parameters in braces.
        handler: Name of the method of `Server` that answers; its docstring is the description.
        response: Type of a JSON response with status 200, or the media type of another response.
        body: Schema of the JSON body; None: the method is GET.
        query: Schema of the query string.
        errors: Statuses of errors besides those of all endpoints.
        other: Types of JSON responses with other statuses that are not errors in OpenAI's format.
    """

    path: str
    handler: str
    response: Any
    body: type[Body] | None = None
    query: type[Body] | None = None
    errors: tuple[int, ...] = ()
    other: Mapping[int, Any] = {}

    @property
    def method(self) -> str:
        """HTTP method."""
        return "POST" if self.body else "GET"


ENDPOINTS = (
    Endpoint(
        "/v1/completions",
        "completions",
        responses.CompletionBody,
        body=schema.CompletionRequest,
        errors=(400, 404, 429, 503, 504),
    ),
    Endpoint(
        "/v1/chat/completions",
        "chat",
        responses.ChatCompletionBody,
        body=ChatRequest,
        errors=(400, 404, 429, 503, 504),
    ),
    Endpoint("/v1/models", "models", responses.ModelList),
    Endpoint("/v1/models/{name}", "model", responses.ModelBody, errors=(404,)),
    Endpoint(
        "/health", "health", responses.Health, query=schema.HealthQuery, errors=(400,), other={503: responses.Health}
    ),
    Endpoint("/metrics", "metrics", "text/plain"),
    Endpoint("/openapi.json", "openapi", dict[str, Any]),
    Endpoint("/api/curve", "curve", responses.Curves, query=schema.CurveQuery, errors=(400, 404, 429)),
    Endpoint("/api/runs", "runs", responses.RunsBody),
    Endpoint("/api/report", "report", "text/html", query=schema.ReportQuery, errors=(400, 404, 429)),
    Endpoint("/api/load", "load", responses.LoadedBody, body=schema.LoadRequest, errors=(400, 404, 409, 429)),
    Endpoint("/api/vocabularies", "vocabularies", list[str]),
    Endpoint("/api/describe", "describe", responses.VocabularyBody, query=schema.VocabularyQuery, errors=(400, 429)),
    Endpoint("/api/cut", "cut", responses.TokensBody, body=schema.CutRequest, errors=(400, 429)),
    Endpoint("/api/explain", "explain", responses.TokenTree, query=schema.ExplainQuery, errors=(400, 404, 429)),
)
"""The endpoints; the routes of the application are made from them."""


def openapi_document(
    descriptions: Mapping[str, str], models: Iterable[str], vocabularies: Iterable[str], keyed: bool
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server.

    Args:
        descriptions: Description of each handler.
        models: Names of the models.
        vocabularies: Names of the vocabularies.
        keyed: Whether requests must carry an API key.
    """
    keys, definitions = _schemas()
    names = {"run": list(models), "model": list(models), "vocabulary": list(vocabularies), "name": list(models)}
    for definition in definitions.values():
        for name, values in names.items():
            if name in definition.get("properties", ()) and definition["title"] in _WITH_NAMES:
                definition["properties"][name] = _with_enum(definition["properties"][name], values)
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        operation = _operation(endpoint, keys, definitions, names)
        operation["description"] = descriptions[endpoint.handler]
        if keyed and endpoint.path.startswith(("/v1/", "/api/", "/metrics")):
            operation["security"] = [{"key": []}]
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    queries = {endpoint.query.__name__ for endpoint in ENDPOINTS if endpoint.query}
    components: dict[str, Any] = {"schemas": {k: v for k, v in definitions.items() if k not in queries}}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "slm_jax", "version": slm_jax.__version__, "summary": "Trained runs, over OpenAI's API"},
        "paths": paths,
        "components": components,
    }


_WITH_NAMES = ("CompletionRequest", "ChatRequest", "CutRequest", "CurveQuery", "VocabularyQuery", "ExplainQuery")


def _schemas() -> tuple[dict[Any, Any], dict[str, Any]]:
    """Return the schemas of the top-level types by id of the type, and the definitions that they refer to."""
    types: list[Any] = [ErrorBody, responses.ChatChunk]
    for endpoint in ENDPOINTS:
        types += [endpoint.body, endpoint.query, endpoint.response, *endpoint.other.values()]
    unique = {id(each): each for each in types if each is not None and not isinstance(each, str)}
    adapters = [(str(key), "validation", TypeAdapter(each)) for key, each in unique.items()]
    keys, tree = TypeAdapter.json_schemas(adapters, ref_template=_REF)  # type: ignore[arg-type]
    return {key: value for (key, _), value in keys.items()}, tree["$defs"]


def _with_enum(node: dict[str, Any], values: list[str]) -> dict[str, Any]:
    """Return a schema of a text with its possible values."""
    if "anyOf" in node:
        return {**node, "anyOf": [_with_enum(each, values) for each in node["anyOf"]]}
    return {**node, "enum": values} if node.get("type") == "string" else node


def _operation(
    endpoint: Endpoint, keys: dict[str, Any], definitions: dict[str, Any], names: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Return the operation of an endpoint."""

    def content(kind: Any) -> dict[str, Any]:
        if isinstance(kind, str):
            return {kind: {"schema": {"type": "string"}}}
        return {"application/json": {"schema": keys[str(id(kind))]}}

    good = content(endpoint.response)
    if endpoint.handler in _STREAMS:
        good["text/event-stream"] = {"schema": _event(_STREAMS[endpoint.handler])}
    errors = sorted({401, 403, 405, 421, *((408, 413, 415) if endpoint.body else ()), *endpoint.errors})
    operation: dict[str, Any] = {
        "operationId": endpoint.handler,
        "responses": {
            "200": {"description": "The response.", "content": good},
            **{str(status): {"description": _ERRORS[status], "content": content(ErrorBody)} for status in errors},
            **{
                str(status): {"description": "See status.", "content": content(t)}
                for status, t in endpoint.other.items()
            },
        },
    }
    if 429 in errors:
        operation["responses"]["429"]["headers"] = _RETRY_AFTER
    parameters: list[dict[str, Any]] = []
    if "{name}" in endpoint.path:
        values = {"type": "string", "enum": names["name"]}
        parameters.append({"name": "name", "in": "path", "required": True, "schema": values})
    if endpoint.query:
        tree = definitions[endpoint.query.__name__]
        required = tree.get("required", ())
        parameters += [
            {"name": name, "in": "query", "required": name in required, "schema": node}
            for name, node in tree["properties"].items()
        ]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body:
        operation["requestBody"] = {"required": True, "content": content(endpoint.body)}
    return operation
