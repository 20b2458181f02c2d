"""`python -m tokenizer serve`: a page on which text is cut into tokens while you type. All standard library.

What the page asks for is a few functions from plain values to plain values (`cut`, `explain`, `describe`), which other
servers can offer too; the page's own files are in `tokenizer/web`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tokenizer.errors import TokenizerError
from tokenizer.hybrid import HybridTokenizer
from tokenizer.inspect.reports import Explanation
from tokenizer.units import bytes_to_text, text_to_bytes

WEB = Path(__file__).parents[1] / "web"
LONGEST_TEXT = 200_000
"""Characters that the page may ask to have cut at once."""
_DEEPEST = 64
_LONGEST_DRAIN = 64 * LONGEST_TEXT  # bytes
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def kind_of(tokenizer: HybridTokenizer, id_: int) -> str:
    """The kind of an id, as `segment` tells it."""
    return tokenizer._vocabulary.kind(id_)


def cut(tokenizer: HybridTokenizer, text: str) -> dict[str, Any]:
    """The tokens of a text, [text, kind, id, name] each, and how many bytes they stand for.

    Raises TokenizerError for a text of more than LONGEST_TEXT characters.
    """
    if len(text) > LONGEST_TEXT:
        raise TokenizerError(f"the text has {len(text):,} characters: {LONGEST_TEXT:,} are the most")
    rows = [[*segment, tokenizer.id2token[segment.id]] for segment in tokenizer.segment(text)]
    return {"tokens": rows, "bytes": len(text_to_bytes(text)), "characters": len(text)}


def explain(tokenizer: HybridTokenizer, id_: int) -> dict[str, Any]:
    """How a token is made, down to its bytes. Raises TokenizerError for what is no id."""
    return _tree(tokenizer.explain_token(id_), 0)


def _tree(made: Explanation, depth: int) -> dict[str, Any]:
    parts = [_tree(part, depth + 1) for part in made.parts] if depth < _DEEPEST else []
    tree = {"id": made.id, "name": made.name, "kind": made.kind, "text": bytes_to_text(made.data)}
    return {**tree, "bytes": made.data.hex(" "), "parts": parts}


def describe(tokenizer: HybridTokenizer) -> dict[str, Any]:
    """What a vocabulary is: its size and how many entries of each kind."""
    return {"size": tokenizer.vocab_size, "kinds": tokenizer.db_status(0).kinds}


@lru_cache(maxsize=64)
def asset(path: Path) -> tuple[bytes, str]:
    """A file of the page and its media type."""
    return path.read_bytes(), f"{TYPES[path.suffix]}; charset=utf-8"


class Answers:
    """What the page may ask for, of these vocabularies: {name: where it is from} loaded when first asked for."""

    def __init__(self, names: list[str], load: Callable[[str], HybridTokenizer]):
        self.names = names
        self._load = lru_cache(maxsize=len(names))(load)

    def tokenizer(self, name: object) -> HybridTokenizer:
        """One of them. Raises TokenizerError for any other name."""
        if name not in self.names:
            raise TokenizerError(f"there is no vocabulary {name!r} here: {', '.join(self.names)}")
        return self._load(str(name))

    def __call__(self, path: str, query: Mapping[str, str], body: Mapping[str, Any]) -> Any:
        """The answer to a path below /api/, or None where there is none. Raises TokenizerError."""
        if path == "vocabularies":
            return self.names
        if path == "describe":
            return describe(self.tokenizer(query.get("vocabulary")))
        if path == "cut":
            if not isinstance(body.get("text"), str):
                raise TokenizerError("text must be a string")
            return cut(self.tokenizer(body.get("vocabulary")), body["text"])
        if path == "explain":
            digits = query.get("id", "")
            if not digits.isdecimal() or len(digits) > 9:  # int refuses thousands of them
                raise TokenizerError("id must be a whole number of at most 9 digits")
            return explain(self.tokenizer(query.get("vocabulary")), int(digits))
        return None


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds of silence on a connection

    def do_GET(self) -> None:
        """The page, its files, and what can be asked without a body."""
        if not self._is_local():
            return
        url = urlsplit(self.path)
        files = {"/": "playground.html", **{f"/{p.name}": p.name for p in WEB.iterdir() if p.suffix in TYPES}}
        if url.path in files:
            self._send(HTTPStatus.OK, *asset(WEB / files[url.path]))
        elif url.path.startswith("/api/"):
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            self._answer(url.path.removeprefix("/api/"), query, {})
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": {"message": "there is nothing here"}})

    do_HEAD = do_GET  # the name that http.server looks for

    def do_POST(self) -> None:
        """A text to be cut."""
        length = self.headers.get("Content-Length", "")
        if not self._is_local():
            self._drain()
            return
        if not length.isdecimal() or len(length) > 9 or int(length) > 8 * LONGEST_TEXT:
            self.close_connection = True
            self._send_json(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": {"message": "the text is too long"}})
            self._drain()
            return
        data = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            self._send_json(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": {"message": "the body must be JSON"}})
            return
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": {"message": "the body is no JSON object"}})
            return
        self._answer(urlsplit(self.path).path.removeprefix("/api/"), {}, body)

    def _answer(self, path: str, query: Mapping[str, str], body: Mapping[str, Any]) -> None:
        try:
            found = self.server.answers(path, query, body)
        except TokenizerError as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": {"message": str(error)}})
            return
        missing = {"error": {"message": "there is nothing here"}}
        self._send_json(HTTPStatus.NOT_FOUND if found is None else HTTPStatus.OK, missing if found is None else found)

    def _is_local(self) -> bool:
        """Pages of other sites reach this server too, by a name of theirs that means 127.0.0.1 (DNS rebinding)."""
        port = self.server.server_address[1]
        allowed = {f"{name}:{port}" for name in ("localhost", "127.0.0.1", "[::1]")}
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host in allowed and (origin is None or origin.removeprefix("http://") == host):
            return True
        self.close_connection = True
        self._send_json(HTTPStatus.FORBIDDEN, {"error": {"message": f"only http://localhost:{port} is served"}})
        return False

    def _drain(self) -> None:
        """Read what a refused client is still sending: to close before that resets the connection under the answer."""
        self.connection.settimeout(1)  # seconds of silence
        left = _LONGEST_DRAIN
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (data := self.rfile.read1(65_536)):
                left -= len(data)

    def _send_json(self, status: HTTPStatus, tree: object) -> None:
        self._send(status, json.dumps(tree).encode(), "application/json")

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **HEADERS}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """In silence: a line for each key pressed helps nobody."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, answers: Answers):
        self.answers = answers
        super().__init__(("127.0.0.1", port), _Handler)


def open_server(names: list[str], load: Callable[[str], HybridTokenizer], port: int) -> ThreadingHTTPServer:
    """A server on the loopback interface, port 0 for any free one; `serve_forever` runs it. Raises TokenizerError."""
    answers = Answers(names, load)
    answers.tokenizer(names[0])
    try:
        return _Server(port, answers)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TokenizerError(f"cannot listen on port {port}: {reason}; try another --port") from None


def serve(names: list[str], load: Callable[[str], HybridTokenizer], port: int) -> None:
    """Serve the page until Ctrl-C."""
    with open_server(names, load, port) as server:
        print(f"http://localhost:{server.server_address[1]}/  (this machine only; Ctrl-C stops)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
