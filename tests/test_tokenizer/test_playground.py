"""The playground: its API over a real socket, rejected requests and static files."""

import http.client
import json
import select
import socket
import subprocess
import sys
import threading
import time

import pytest

from tokenizer import HybridTokenizer, TokenizerError
from tokenizer.cli import main
from tokenizer.inspect.playground import MAX_TEXT_CHARACTERS, MAX_TEXT_TOKENS
from tokenizer.inspect.server import open_server

TEXT = "Hello WORLD, שלום 🙂\n\tnaïve"


@pytest.fixture(scope="module")
def port():
    """The port of a server with two vocabularies."""
    server = open_server(["english-8k", "multilingual-8k"], HybridTokenizer.pretrained, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def request(port, method, path, body=None, headers=None, kind="application/json"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, data, {"Content-Type": kind, **(headers or {})})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def test_tokens_are_those_of_segment(port):
    tokenizer = HybridTokenizer.pretrained("multilingual-8k")
    response, content = request(port, "POST", "/api/cut", {"vocabulary": "multilingual-8k", "text": TEXT})
    tree = json.loads(content)
    assert response.status == 200
    assert [tuple(row[:3]) for row in tree["tokens"]] == tokenizer.segment(TEXT)
    assert [row[3] for row in tree["tokens"]] == [tokenizer.id2token[row[2]] for row in tree["tokens"]]
    assert (tree["bytes"], tree["characters"]) == (len(TEXT.encode()), len(TEXT))


def test_a_token_is_explained_down_to_its_bytes(port):
    tokenizer = HybridTokenizer.pretrained("english-8k")
    merge = tokenizer.top_merges(1)[0]
    tree = json.loads(request(port, "GET", f"/api/explain?vocabulary=english-8k&id={merge.id}")[1])
    assert (tree["name"], tree["kind"], [part["id"] is not None for part in tree["parts"]]) == (
        merge.text,
        tokenizer.explain_token(merge.id).kind,
        [True, True],
    )
    leaves = []

    def walk(node):
        for part in node["parts"]:
            walk(part)
        if not node["parts"]:
            leaves.append(node["bytes"])

    walk(tree)
    assert bytes.fromhex("".join(leaves)).decode() == merge.text
    assert json.loads(request(port, "GET", "/api/vocabularies")[1]) == ["english-8k", "multilingual-8k"]
    about = json.loads(request(port, "GET", "/api/describe?vocabulary=english-8k")[1])
    assert about["size"] == sum(about["kinds"].values()) == tokenizer.vocab_size


def test_lone_surrogates_are_accepted(port):
    response, content = request(port, "POST", "/api/cut", rb'{"vocabulary": "english-8k", "text": "a\ud800b"}')
    assert response.status == 200
    assert json.loads(content)["characters"] == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/cut", {"vocabulary": "../english-8k", "text": "x"}, 400),
        ("POST", "/api/cut", {"vocabulary": "english-8k", "text": 5}, 400),
        ("POST", "/api/cut", {"vocabulary": "english-8k", "text": "x" * (MAX_TEXT_CHARACTERS + 1)}, 400),
        ("POST", "/api/cut", {"vocabulary": "english-8k", "text": "🦊" * (MAX_TEXT_TOKENS // 4 + 1)}, 400),
        ("POST", "/api/cut", b"x" * (8 * MAX_TEXT_CHARACTERS + 1), 413),
        ("POST", "/api/cut", b"[1]", 400),
        ("POST", "/api/cut", b"{", 400),
        ("POST", "/api/cut", b"[" * 100_000, 400),
        ("POST", "/api/cut", b'{"vocabulary": ' + b"[" * 900 + b"]" * 900 + b"}", 400),
        ("GET", f"/api/explain?vocabulary=english-8k&id={'9' * 5000}", None, 400),
        ("GET", "/api/explain?vocabulary=english-8k&id=99999999", None, 400),
        ("GET", "/api/explain?vocabulary=english-8k&id=-1", None, 400),
        ("GET", "/api/nothing", None, 404),
        ("GET", "/../playground.py", None, 404),
        ("GET", "/..%2fplayground.py", None, 404),
    ],
)
def test_invalid_requests_are_rejected_with_a_message(port, method, path, body, status):
    response, content = request(port, method, path, body)
    assert response.status == status
    assert json.loads(content)["error"]["message"]


def test_a_content_length_of_thousands_of_digits_is_rejected(port):
    assert request(port, "POST", "/api/cut", b"{}", {"Content-Length": "9" * 5000})[0].status == 413


def test_requests_and_connections_beyond_the_limits_are_refused():
    tokenizer = HybridTokenizer.pretrained("english-8k")
    loading = threading.Event()
    loaded = threading.Event()

    def load(name):
        if name == "slow":
            loading.set()
            assert loaded.wait(30)
        return tokenizer

    with open_server(["fast", "slow"], load, 0) as server:
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever).start()
        results = []

        def describe():
            response, _ = request(port, "GET", "/api/describe?vocabulary=slow")
            results.append((response.status, response.headers["retry-after"]))

        threads = [threading.Thread(target=describe) for _ in range(16)]
        for thread in threads:
            thread.start()
        assert loading.wait(30)
        while server.calls.acquire(blocking=False):  # until all 16 have come
            server.calls.release()
            time.sleep(0.01)
        refused = request(port, "POST", "/api/cut", {"vocabulary": "fast", "text": "x"})
        assert refused[0].status == 429
        assert refused[0].headers["retry-after"] == "1"
        assert b"busy" in refused[1]
        loaded.set()
        for thread in threads:
            thread.join()
        assert results == [(200, None)] * 16
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(70)]
        closed = set()
        while len(closed) < 6:  # the server closes those that it has no thread for
            closed.update(select.select(silent, [], [], 30)[0])
        assert len(closed) == 6
        for connection in silent:
            connection.close()
        server.shutdown()


def test_requests_from_other_hosts_and_sites_are_rejected(port):
    body = {"vocabulary": "english-8k", "text": "x"}
    assert request(port, "POST", "/api/cut", body, {"Host": "evil.example"})[0].status == 403
    assert request(port, "POST", "/api/cut", body, {"Origin": "http://evil.example"})[0].status == 403
    assert request(port, "POST", "/api/cut", body, kind="text/plain")[0].status == 415
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert request(port, "POST", "/api/cut", body, own)[0].status == 200


def test_the_page_and_its_files_are_served(port):
    response, page = request(port, "GET", "/")
    assert "script-src 'self'" in response.headers["content-security-policy"]
    for name in ("style.css", "pieces.css", "pieces.js", "playground.js", "standalone.js", "icon.svg"):
        response, content = request(port, "GET", f"/{name}")
        assert (response.status, bool(content)) == (200, True)
        assert b"http://" not in content.replace(b"http://www.w3.org/", b"")
    assert b"standalone.js" in page
    assert request(port, "HEAD", "/")[1] == b""


def test_command_line_errors(capsys, port):
    assert main(["serve", "no-such-vocabulary"]) == 2
    assert main(["serve", "english-8k", "--port", str(port)]) == 2
    assert main(["serve", "english-8k", "--port", "99999"]) == 2
    stderr = capsys.readouterr().err
    assert "no pretrained tokenizer is named 'no-such-vocabulary'" in stderr
    assert f"cannot listen on port {port}" in stderr
    with pytest.raises(TokenizerError, match="cannot listen"):
        open_server(["english-8k"], HybridTokenizer.pretrained, port)


def test_serving_needs_only_the_standard_library_and_numpy():
    code = "import sys, tokenizer.inspect.server\n"
    code += "print([m for m in ('jax', 'starlette', 'slm_jax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
