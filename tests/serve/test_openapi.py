"""The OpenAPI document: complete, and what the server does; schemathesis looks for requests that show otherwise."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("starlette")

from pydantic import TypeAdapter

from slm_jax.serve import responses
from slm_jax.serve.completions import Limits
from slm_jax.serve.engine import Engine
from slm_jax.serve.openapi import ENDPOINTS, openapi_document
from slm_jax.serve.schema import CompletionRequest
from tests.serve.conftest import serve
from tests.serve.test_api import PROMPT, send

CONFIG = """
[[operations]]
include-path = "/v1/completions"
# What no schema can say: limits of the server, ids of the vocabulary, parameters that depend on each other.
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 429]

[[operations]]
include-path = "/v1/chat/completions"
# The order of roles, the context, and parts refused by their values; too many messages exceed the limit of the body.
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 429]
checks.negative_data_rejection.expected-statuses = ["4xx"]
"""


def references(node):
    """Yield all references in a document."""
    if isinstance(node, dict):
        yield from [node["$ref"]] if "$ref" in node else []
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from references(each)


def test_the_document_describes_the_endpoints(served):
    status, headers, document = send(served, "GET", "/openapi.json")
    assert (status, headers["content-type"], document["openapi"]) == (200, "application/json", "3.1.0")
    operations = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    assert operations == {(each.path, each.method) for each in ENDPOINTS}
    schemas = document["components"]["schemas"]
    assert {name.rpartition("/")[2] for name in references(document)} <= set(schemas)
    assert all(name.startswith("#/components/schemas/") for name in references(document))
    request = schemas["CompletionRequest"]["properties"]
    assert set(request) == set(CompletionRequest.model_fields)
    assert request["model"]["anyOf"][0]["enum"] == ["tiny", "other"]
    content = document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/CompletionBody"}
    assert set(content) == {"application/json", "text/event-stream"}
    descriptions = [operation["description"] for item in document["paths"].values() for operation in item.values()]
    assert len({text.partition(":")[0] for text in descriptions}) == len(ENDPOINTS)


def test_only_requests_with_a_key_are_documented_to_need_one():
    descriptions = {endpoint.handler: "" for endpoint in ENDPOINTS}
    paths = openapi_document(descriptions, ["a"], ["a"], keyed=True)["paths"]
    keyed = {path for path, item in paths.items() if any("security" in operation for operation in item.values())}
    assert keyed == set(paths) - {"/health", "/openapi.json"}


def test_responses_conform_to_their_schemas(served):
    for path, kind in (("/v1/models", responses.ModelList), ("/health", responses.Health)):
        TypeAdapter(kind).validate_python(send(served, "GET", path)[2], strict=True)
    body = {"prompt": PROMPT, "max_tokens": 3, "logprobs": 1, "token_details": True, "echo": True}
    completion = TypeAdapter(responses.CompletionBody).validate_python(send(served, "POST", "/v1/completions", body)[2])
    assert completion["choices"][0]["details"]
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    chat = send(served, "POST", "/v1/chat/completions", {**body, "token_details": True})[2]
    assert TypeAdapter(responses.ChatCompletionBody).validate_python(chat)["choices"][0]["details"]
    events = send(served, "POST", "/v1/chat/completions", {**body, "stream": True})[2].split("\n\n")
    for event in events[:-2]:
        TypeAdapter(responses.ChatChunk).validate_python(json.loads(event.removeprefix("data: ")))
    cut = send(served, "POST", "/api/cut", {"vocabulary": "tiny", "text": PROMPT})[2]
    id_ = TypeAdapter(responses.TokensBody).validate_python(cut)["tokens"][0][2]
    TypeAdapter(responses.TokenTree).validate_python(send(served, "GET", f"/api/explain?vocabulary=tiny&id={id_}")[2])
    assert TypeAdapter(responses.Curves).validate_python(send(served, "GET", "/api/curve")[2])["val_loss"]


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("/api/explain?vocabulary=tiny", 400, "id"),
        ("/api/explain?vocabulary=tiny&id=x", 400, "id"),
        ("/api/explain?vocabulary=tiny&id=999999", 404, "id"),
        ("/api/describe", 400, "vocabulary"),
        ("/api/curve?run=none", 404, "model"),
    ],
)
def test_invalid_query_strings_are_named(served, path, status, param):
    actual, _, tree = send(served, "GET", path)
    assert (actual, tree["error"]["param"]) == (status, param)


@pytest.mark.parametrize("path", [endpoint.path for endpoint in ENDPOINTS if endpoint.method == "GET"])
def test_other_methods_are_refused_with_the_allowed_ones(served, path):
    status, headers, _ = send(served, "POST", path.replace("{name}", "tiny"))
    assert (status, set(headers["allow"].split(", "))) == (405, {"GET", "HEAD"})


@pytest.mark.slow
def test_schemathesis_finds_nothing(loaded, tmp_path):
    """All checks on generated requests, valid and invalid: no 5xx, documented statuses, responses that conform."""
    pytest.importorskip("schemathesis")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    engine = Engine(loaded, slots=4, queue_size=600, block_slots=2)
    with serve({"tiny": engine}, Limits(prompt_tokens=300, max_tokens=50, seconds=60), max_body=100_000) as served:
        code = "from schemathesis.cli import schemathesis; schemathesis()"
        command = [sys.executable, "-c", code, "--config-file", "schemathesis.toml", "run", "--checks", "all"]
        command += ["--phases", "coverage,fuzzing,stateful", "--max-examples", "50", "--seed", "1", "--no-color"]
        command += ["--request-timeout", "120", "--max-response-time", "120"]  # programs are compiled first
        command += ["--continue-on-failure", f"{served.url}/openapi.json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tested: " in done.stdout
