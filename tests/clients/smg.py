"""SMG as a process in front of routers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.embedded_redis import free_port

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Smg:
    """Its URL, and plain HTTP calls of it."""

    url: str

    def get(self, path: str) -> Any:
        return self._call(urllib.request.Request(self.url + path))

    def post(self, path: str, **body: Any) -> Any:
        headers = {"content-type": "application/json"}
        return self._call(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers))

    def _call(self, request: urllib.request.Request) -> Any:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)


@contextlib.contextmanager
def in_front_of(program: Path, routers: list[str], log: Path, *options: str) -> Iterator[Smg]:
    """Starts it and waits until it serves the routers' model."""
    port = free_port()
    command = [program, "launch", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--policy", "round_robin", "--worker-urls"]
    command += [f"grpc://{address}" for address in routers]
    with log.open("wb") as output, subprocess.Popen([*command, *options], stdout=output, stderr=output) as process:
        try:
            smg = Smg(f"http://127.0.0.1:{port}")
            _wait(smg, process, log)
            yield smg
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(smg: Smg, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if smg.get("/v1/models")["data"]:
                return
        time.sleep(0.2)
    raise AssertionError(f"SMG does not serve:\n{log.read_text()[-4000:]}")
