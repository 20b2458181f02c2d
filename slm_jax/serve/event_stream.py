"""Responses of server-sent events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.responses import Response

from slm_jax.serve.answers import Answer, format_event
from slm_jax.serve.auth import Receive, Scope, Send
from slm_jax.serve.errors import ApiError


class EventStream(Response):
    """A response of server-sent events that ends when it is complete or the client disconnects."""

    def __init__(self, answer: Answer, events: AsyncIterator[str]):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._answer = answer
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; however it ends, the engine's slots are freed."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_events(send))
        disconnect = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait((sending, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except asyncio.CancelledError:  # the server stops
            sending.cancel()
            error = ApiError(503, "the server stopped before the text was complete")
            last = {"type": "http.response.body", "body": format_event(error.body()).encode(), "more_body": False}
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(send(last), 1)  # not received by a client that does not read
            raise
        finally:
            self._answer.cancel()
            for task in (sending, disconnect):
                task.cancel()
            await asyncio.gather(sending, disconnect, return_exceptions=True)

    async def _send_events(self, send: Send) -> None:
        with contextlib.suppress(OSError):  # the client has disconnected
            async for event in self._events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
