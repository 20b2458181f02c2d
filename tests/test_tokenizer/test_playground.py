"""The tokenizer's own page: what it asks for, over a real socket, and who is refused."""

import http.client
import json
import subprocess
import sys
import threading

import pytest

from tokenizer import HybridTokenizer, TokenizerError
from tokenizer.cli import main
from tokenizer.inspect.playground import LONGEST_TEXT, open_server

TEXT = "Hello WORLD, שלום 🙂\n\tnaïve"


@pytest.fixture(scope="module")
def port():
    """Of a server of two vocabularies."""
    server = open_server(["english-8k", "multilingual-8k"], HybridTokenizer.pretrained, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def ask(port, method, path, body=None, headers=None, kind="application/json"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, data, {"Content-Type": kind, **(headers or {})})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_tokens_are_those_of_segment_and_join_to_the_text(port):
    tokenizer = HybridTokenizer.pretrained("multilingual-8k")
    answer, content = ask(port, "POST", "/api/cut", {"vocabulary": "multilingual-8k", "text": TEXT})
    tree = json.loads(content)
    assert answer.status == 200
    assert [tuple(row[:3]) for row in tree["tokens"]] == tokenizer.segment(TEXT)
    assert [row[3] for row in tree["tokens"]] == [tokenizer.id2token[row[2]] for row in tree["tokens"]]
    assert (tree["bytes"], tree["characters"]) == (len(TEXT.encode()), len(TEXT))


def test_a_token_is_explained_down_to_its_bytes(port):
    tokenizer = HybridTokenizer.pretrained("english-8k")
    merge = tokenizer.top_merges(1)[0]
    tree = json.loads(ask(port, "GET", f"/api/explain?vocabulary=english-8k&id={merge.id}")[1])
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
    assert json.loads(ask(port, "GET", "/api/vocabularies")[1]) == ["english-8k", "multilingual-8k"]
    about = json.loads(ask(port, "GET", "/api/describe?vocabulary=english-8k")[1])
    assert about["size"] == sum(about["kinds"].values()) == tokenizer.vocab_size


def test_lone_surrogates_come_through(port):
    answer, content = ask(port, "POST", "/api/cut", rb'{"vocabulary": "english-8k", "text": "a\ud800b"}')
    assert answer.status == 200
    assert json.loads(content)["characters"] == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/cut", {"vocabulary": "../english-8k", "text": "x"}, 400),
        ("POST", "/api/cut", {"vocabulary": "english-8k", "text": 5}, 400),
        ("POST", "/api/cut", {"vocabulary": "english-8k", "text": "x" * (LONGEST_TEXT + 1)}, 400),
        ("POST", "/api/cut", b"x" * (8 * LONGEST_TEXT + 1), 413),
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
def test_what_cannot_be_is_refused_in_words(port, method, path, body, status):
    answer, content = ask(port, method, path, body)
    assert answer.status == status
    assert json.loads(content)["error"]["message"]


def test_a_length_of_thousands_of_digits_is_too_long(port):
    assert ask(port, "POST", "/api/cut", b"{}", {"Content-Length": "9" * 5000})[0].status == 413


def test_only_this_machine_and_its_own_page_may_ask(port):
    body = {"vocabulary": "english-8k", "text": "x"}
    assert ask(port, "POST", "/api/cut", body, {"Host": "evil.example"})[0].status == 403
    assert ask(port, "POST", "/api/cut", body, {"Origin": "http://evil.example"})[0].status == 403
    assert ask(port, "POST", "/api/cut", body, kind="text/plain")[0].status == 415
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert ask(port, "POST", "/api/cut", body, own)[0].status == 200


def test_the_page_and_all_it_names_are_there(port):
    answer, page = ask(port, "GET", "/")
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    for name in ("style.css", "pieces.css", "pieces.js", "playground.js", "standalone.js", "icon.svg"):
        answer, content = ask(port, "GET", f"/{name}")
        assert (answer.status, bool(content)) == (200, True)
        assert b"http://" not in content.replace(b"http://www.w3.org/", b"")
    assert b"standalone.js" in page
    assert ask(port, "HEAD", "/")[1] == b""


def test_the_command_tells_what_is_wrong(capsys, port):
    assert main(["serve", "no-such-vocabulary"]) == 2
    assert main(["serve", "english-8k", "--port", str(port)]) == 2
    assert main(["serve", "english-8k", "--port", "99999"]) == 2
    told = capsys.readouterr().err
    assert "no ready-made tokenizer" in told
    assert f"cannot listen on port {port}" in told
    with pytest.raises(TokenizerError, match="cannot listen"):
        open_server(["english-8k"], HybridTokenizer.pretrained, port)


def test_serving_needs_the_standard_library_alone():
    """NumPy aside, which the tokenizer itself has; jax and starlette are not even looked at."""
    code = "import sys, tokenizer.inspect.playground\n"
    code += "print([m for m in ('jax', 'starlette', 'slm_jax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
