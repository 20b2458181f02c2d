"""What is let in: the Host and Origin of a request, its key, its type and its size, before anything reads it.

A server on loopback is still within reach of every page in the user's browser. Such a page can send requests here, and
by DNS rebinding (a name of its own that suddenly means 127.0.0.1) even read the answers. So a Host that is a name must
be one that is known; an Origin must be that of the host itself; a body must be JSON, which no form can send; and no
header lets another origin read anything (CORS stays closed).
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse, Response

from slm_jax.serve.schema import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_DRAIN = 16  # times the longest body: what is read of one that is refused
_SILENCE = 1  # second, after which no more of it is waited for
_KEYED = ("/v1/", "/api/", "/metrics")
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class JsonAnswer(JSONResponse):
    """JSON in ASCII: what a model writes may hold half a surrogate pair, which UTF-8 cannot."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: App, api_key: str, hosts: Iterable[str], max_body: int):
        self._app, self._max_body = app, max_body
        self._key = _digest(api_key) if api_key else b""
        self._hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope["method"], scope["path"], headers)
            if scope["method"] == "POST":
                receive = await self._bounded(headers, receive)
        except ApiError as error:
            extra_headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            await self._refuse(JsonAnswer(error.body(), error.status, extra_headers), receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    async def _refuse(self, answer: Response, receive: Receive, send: Send) -> None:
        """Answer at once and read what the client is still sending, within bounds: to close before that resets the
        connection, and the client never sees the answer."""
        headers = [*answer.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        left, more = _DRAIN * self._max_body, True
        with contextlib.suppress(TimeoutError):
            while more and left > 0:
                message = await asyncio.wait_for(receive(), _SILENCE)
                left -= len(message.get("body", b""))
                more = message.get("more_body", False)
        await send({"type": "http.response.body", "body": b""})

    def _check(self, method: str, path: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self._is_known(host):
            raise ApiError(421, f"unknown Host {host!r}: start the server with --allow_host to serve that name")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, f"requests of pages from {origin} are refused")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and method != "GET":
            raise ApiError(403, "requests of pages from other sites are refused")
        if self._key and path.startswith(_KEYED):
            given = headers.get("authorization", "")
            if not given.startswith("Bearer ") or not hmac.compare_digest(_digest(given[7:]), self._key):
                raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "the body must be JSON: Content-Type: application/json")

    def _is_known(self, host: str) -> bool:
        """Whether a Host header is an address, or a name that this server goes by. Rebinding needs a name."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        name = name.removesuffix(".").lower()
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    async def _bounded(self, headers: dict[str, str], receive: Receive) -> Receive:
        """The whole body, read here. Raises ApiError when it is longer than it may be."""
        too_long = ApiError(413, f"the body is longer than {self._max_body:,} bytes")
        if int(headers["content-length"] if headers.get("content-length", "").isdecimal() else 0) > self._max_body:
            raise too_long
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client left before its body was whole")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._max_body:
                raise too_long
        whole: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def again() -> MutableMapping[str, Any]:
            return whole.pop() if whole else await receive()

        return again


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
