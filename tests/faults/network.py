"""Networks that a test may cut and slow down: a proxy between two processes, and a host of its own."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import threading
import uuid
from collections.abc import Iterator


class Proxy:
    """Forwards TCP connections to host:port, from a thread of its own.

    Attributes:
        address: where it listens.
        delay_s: before each piece that it forwards, in both directions.
        silent: forwards nothing and closes nothing, as a network that is cut. What was sent meanwhile arrives later.
    """

    def __init__(self, target: str, host: str = "127.0.0.1") -> None:
        self.delay_s, self.silent = 0.0, False
        self._target, self._host = target.rpartition(":"), host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.address = ""

    def __enter__(self) -> Proxy:
        self._thread.start()
        server = self._run(asyncio.start_server(self._forward, self._host, 0))
        self.address = f"{self._host}:{server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target
        try:
            to, back = await asyncio.open_connection(host, int(port)), (reader, writer)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._copy(back[0], to[1]), self._copy(to[0], back[1]))

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(1 << 16):
                await asyncio.sleep(self.delay_s)
                while self.silent:  # noqa: ASYNC110 (set by another thread)
                    await asyncio.sleep(0.05)
                sink.write(piece)
                await sink.drain()
        sink.close()


class Host:
    """A network namespace, joined to this host by one cable.

    Attributes:
        here, there: addresses of the cable's ends.
        inside: the command that runs another one there.
    """

    def __init__(self) -> None:
        self._name = f"qaq{uuid.uuid4().hex[:8]}"
        net = 1 + uuid.uuid4().int % 250
        self.here, self.there = f"10.213.{net}.1", f"10.213.{net}.2"
        self.inside = ("ip", "netns", "exec", self._name)

    def __enter__(self) -> Host:
        """Raises subprocess.CalledProcessError where the kernel forbids it, FileNotFoundError without `ip`."""
        try:
            _ip("netns", "add", self._name)
            _ip("link", "add", self._near, "type", "veth", "peer", "name", "cable", "netns", self._name)
            _ip("addr", "add", f"{self.here}/30", "dev", self._near)
            _ip("link", "set", self._near, "up")
            _ip("-n", self._name, "addr", "add", f"{self.there}/30", "dev", "cable")
            _ip("-n", self._name, "link", "set", "cable", "up")
            _ip("-n", self._name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if shutil.which("ip"):
            subprocess.run(["ip", "netns", "del", self._name], capture_output=True, check=False)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing passes the cable while the context lasts, and nobody on this host is told."""
        _ip("-n", self._name, "link", "set", "cable", "down")
        try:
            yield
        finally:
            _ip("-n", self._name, "link", "set", "cable", "up")

    @contextlib.contextmanager
    def delayed(self, milliseconds: int) -> Iterator[None]:
        """Raises subprocess.CalledProcessError where the kernel has no netem, FileNotFoundError without `tc`."""
        queue = ("dev", self._near, "root", "netem", "delay", f"{milliseconds}ms")
        subprocess.run(["tc", "qdisc", "add", *queue], check=True, capture_output=True, text=True)
        try:
            yield
        finally:
            subprocess.run(["tc", "qdisc", "del", *queue[:3]], check=True, capture_output=True)

    @property
    def _near(self) -> str:
        return self._name[:13]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
