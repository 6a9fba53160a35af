"""HTTP/1.1 connections: how many there may be, and how long a client may take."""

from __future__ import annotations

import asyncio
import json
import uuid

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from services.gateway.errors import described

MAX_CONNECTIONS = 2048
HEADERS_S = 10.0
"""Longest time from a connection's beginning, or from a request's first byte, until all of its headers have come."""

UNREAD_S = 120.0
"""Longest time that a client may read nothing of an answer that waits for it. A stream that pauses does not count."""


class Connection(H11Protocol):
    """A connection that is closed when its client takes too long, and refused when there are too many.

    Errors that come before any request is known are in OpenAI's format too. How long a body may take is for
    `bodies.Body` to say.
    """

    _waiting: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self.refuse(503, f"{MAX_CONNECTIONS} connections are open, the most of this gateway; try again later")
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting = _cancelled(self._waiting)
        self._unread = _cancelled(self._unread)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = _cancelled(self._unread)

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "the request is not valid HTTP/1.1, or its headers are too long")

    def refuse(self, status: int, message: str) -> None:
        """Answers what is no request, or no more of one, and closes."""
        if self.cycle is not None:  # nothing more is to be written of its answer, and nobody sends the rest of its body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        code = "overloaded" if status == 503 else "invalid_request"
        body = json.dumps(described(message, status, code)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", f"req_{uuid.uuid4().hex}".encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            parts = [] if self._asks_head() else [h11.Data(data=body)]
            for event in (answer, *parts, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _asks_head(self) -> bool:
        """Whether the request that waits for its answer wants no body."""
        return self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"

    def _watch(self) -> None:
        """Waits for headers if a part of them has come and no request is being answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing() or not self._begun():
            self._waiting = _cancelled(self._waiting)
        else:
            self._await_headers()

    def _begun(self) -> bool:
        """Whether a part of the next request has come; between requests uvicorn's own keep-alive timeout holds."""
        return self.cycle is None or bool(self.conn.trailing_data[0])

    def _await_headers(self) -> None:
        if self._waiting is None:
            message = f"the headers did not come within {HEADERS_S:g} s"
            self._waiting = self.loop.call_later(HEADERS_S, self.refuse, 408, message)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancels a timer. Returns the one that is then set: none."""
    if timer is not None:
        timer.cancel()
    return None
