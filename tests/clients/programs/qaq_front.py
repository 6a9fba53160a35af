"""An HTTP server in front of the gateway, for test suites of other servers.

It names things as they expect, and notes what became of the present test's requests. It changes nothing else: bodies
that are no JSON, headers, statuses and the parts of a stream pass as they are, and a client that leaves is passed on.
"""

from __future__ import annotations

import http.client
import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

Asked = Callable[[str, Any], tuple[str, Any]]
Answered = Callable[[str, Any], Any]
OF_A_CONNECTION = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding"}


class Front(ThreadingHTTPServer):
    """Serves on a port of its own.

    Args:
        gateway: its URL.
        asked: the path and the body to send, from those of a client.
        answered: the JSON to answer, from the client's path and the gateway's JSON.

    Attributes:
        statuses: of the answers to the present test.
        refusals: the errors among them: status, code, param, message.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, gateway: str, asked: Asked, answered: Answered) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        address = urlsplit(gateway)
        self.host, self.gateway_port = str(address.hostname), address.port
        self.asked, self.answered = asked, answered
        self.statuses: list[int] = []
        self.refusals: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def note(self, status: int, body: Any) -> None:
        self.statuses.append(status)
        if status >= 400:
            error = body.get("error", {}) if isinstance(body, dict) else {}
            told = [str(error.get(name)) for name in ("code", "param", "message")]
            self.refusals.append(" ".join([str(status), *told])[:300])

    def noted(self, record_property: Callable[[str, object], None]) -> Iterator[None]:
        """The body of a fixture that writes the notes into the report of each test."""
        self.statuses, self.refusals = [], []
        yield
        record_property("statuses", json.dumps(self.statuses))
        record_property("refusals", json.dumps(self.refusals))


class Passing(BaseHTTPRequestHandler):
    """Passes one request on."""

    protocol_version = "HTTP/1.1"
    server: Front

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = self.path
        if (body := _json(sent)) is not None:
            path, body = self.server.asked(path, body)
            sent = json.dumps(body).encode()
        else:
            path, _ = self.server.asked(path, None)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OF_A_CONNECTION}
        gateway = http.client.HTTPConnection(self.server.host, self.server.gateway_port, timeout=600)
        try:
            gateway.request(self.command, path, sent or None, headers)
            if self._gone_before(gateway.sock):
                self.close_connection = True
                return
            self._answer(gateway.getresponse())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            gateway.close()

    do_GET = do_DELETE = do_OPTIONS = do_POST

    def log_message(self, *args: object) -> None:
        pass

    def _gone_before(self, gateway: socket.socket) -> bool:
        """Whether the client left before the gateway answered."""
        ready, _, _ = select.select([gateway, self.connection], [], [], 600)
        return gateway not in ready and self.connection in ready and not self.connection.recv(1, socket.MSG_PEEK)

    def _answer(self, answer: http.client.HTTPResponse) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in OF_A_CONNECTION | {"server", "date"}:
                self.send_header(name, value)
        if "text/event-stream" in answer.getheader("content-type", ""):
            self.server.note(answer.status, None)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for line in answer:
                self._chunk(self._event(line))
            self._chunk(b"")
            return
        content = answer.read()
        body = _json(content)
        self.server.note(answer.status, body)
        if body is not None and answer.status < 400:
            content = json.dumps(self.server.answered(self.path, body)).encode()
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _event(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        return b"data: " + json.dumps(self.server.answered(self.path, json.loads(line[6:]))).encode() + b"\n"

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def fixture_of(front: Front) -> Any:
    """An autouse fixture with the notes of a front."""

    @pytest.fixture(autouse=True)
    def noted(record_property: Any) -> Iterator[None]:
        yield from front.noted(record_property)

    return noted
