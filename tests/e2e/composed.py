"""docker-compose.yml without containers: the same commands and environments as plain processes.

Each service has a loopback address of its own in place of its container's, so that the ports stay as the
file says and two runs do not meet; host names in the environment become those addresses.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from services.cluster.stack import python_path
from services.common.certificates import files
from services.common.embedded_redis import find_server
from services.common.identity import Identity
from services.common.redis import tls_files
from services.common.roles import Role
from tests import redis_binary

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 240.0


class Composed:
    """The services of the file, by name.

    Attributes:
        addresses: host:port of each role.
    """

    def __init__(self, directory: Path) -> None:
        self.file: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
        self._directory = directory
        net = f"127.{64 + os.getpid() % 64}.{os.getpid() // 64 % 256}"
        self._hosts = {name: f"{net}.{place}" for place, name in enumerate(self.file["services"], start=1)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._environments: dict[str, dict[str, str]] = {}
        self.addresses = {
            name: f"{self._hosts[name]}:{service['environment']['QAQ_PORT']}"
            for name, service in self.file["services"].items()
            if "QAQ_PORT" in service.get("environment", {})
        }

    def start(self) -> None:
        """Returns when every service's health check passes."""
        self._redis_has_tls = redis_binary.has_tls()
        hosts = [
            f"--host={role}={host}" for role, host in self._hosts.items() if role in ("router", "gateway", "redis")
        ]
        subprocess.run(
            [ROOT / "deploy" / "make-secrets", self.secrets, *hosts],
            env=os.environ
            | {"QAQ": f"{sys.executable} -m services.cli", "PYTHONPATH": python_path()}
            | {"REDIS_VERSION": ".".join(map(str, redis_binary.version()))},
            check=True,
        )
        self._processes["redis"] = self._redis(self.file["services"]["redis"])
        self._until_healthy("redis")  # the others depend on it
        for name in self.addresses:
            self._processes[name] = self._role(name, self.file["services"][name])
        for name in self.addresses:
            self._until_healthy(name)

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait(30)

    def log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text(errors="replace")

    @property
    def secrets(self) -> Path:
        return self._directory / "secrets"

    @property
    def key(self) -> str:
        """Of a client."""
        return (self.secrets / "client.key").read_text().strip()

    def identity(self, role: Role) -> Identity:
        return Identity(*files(self.secrets, role))

    def redis_url(self, user: str) -> str:
        line = (self.secrets / user / "redis.env").read_text().strip()
        url = line.removeprefix("QAQ_REDIS_URL=").replace("@redis:", f"@{self._hosts['redis']}:")
        return url if self._redis_has_tls else url.replace("rediss:", "redis:")

    def _redis(self, service: dict[str, Any]) -> subprocess.Popen[bytes]:
        _, binary = find_server()
        (self._directory / "data").mkdir()
        config = (ROOT / "deploy" / "redis.conf").read_text()
        for there, here in (
            ("/run/qaq", str(self.secrets / "redis")),
            ("/data", str(self._directory / "data")),
            ("0.0.0.0", self._hosts["redis"]),
        ):
            assert there in config
            config = config.replace(there, here)
        if not self._redis_has_tls:
            config = config.replace("port 0\ntls-port", "port")
            config = re.sub(r"^tls-.*\n", "", config, flags=re.MULTILINE)
        (self._directory / "redis.conf").write_text(config)
        server, path = service["command"]
        assert server == "redis-server"
        assert f"./deploy/redis.conf:{path}:ro" in service["volumes"]
        return self._spawn("redis", [str(binary), str(self._directory / "redis.conf")], {})

    def _role(self, name: str, service: dict[str, Any]) -> subprocess.Popen[bytes]:
        assert service["env_file"] == f"deploy/secrets/{name}/redis.env"
        assert f"./deploy/secrets/{name}:/run/qaq:ro" in service["volumes"]
        environment = dict(service["environment"]) | {"QAQ_REDIS_URL": self.redis_url(name)}
        if environment.get("QAQ_HOST") == "0.0.0.0":
            environment["QAQ_HOST"] = self._hosts[name]
        given = {key: self._here(name, _default(value)) for key, value in environment.items()}
        self._environments[name] = given
        return self._spawn(name, [sys.executable, "-m", "services.cli", *service["command"]], given)

    def _here(self, name: str, value: str) -> str:
        """A value of the environment with the place of the secrets outside its container."""
        return value.replace("/run/qaq", str(self.secrets / name))

    def _spawn(self, name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with open(self._directory / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": python_path()} | environment,
            )

    def _until_healthy(self, name: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._healthy(name):
            code = self._processes[name].poll()
            assert code is None, f"{name} ended with {code}: {self.log(name)[-2000:]}"
            assert time.monotonic() < deadline, f"{name} is not healthy: {self.log(name)[-2000:]}"
            time.sleep(0.3)

    def _healthy(self, name: str) -> bool:
        if name == "redis":
            import redis

            try:
                files = tls_files(self.identity("redis")) if self._redis_has_tls else {}
                return bool(redis.Redis.from_url(self.redis_url("default"), **files).ping())
            except redis.RedisError:
                return False
        host, _, port = self.addresses[name].rpartition(":")
        with socket.socket() as probe:  # a health check is a process, which would hold up those that start
            if probe.connect_ex((host, int(port))):
                return False
        _, qaq, *arguments = self.file["services"][name]["healthcheck"]["test"]
        assert qaq == "qaq"
        here = [argument.replace("127.0.0.1", self._hosts[name]) for argument in arguments]
        command = [sys.executable, "-m", "services.cli", *here]
        environment = os.environ | {"PYTHONPATH": python_path()} | self._environments[name]
        return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def _default(value: str) -> str:
    """What Compose makes of "${NAME:-default}" when NAME is not set."""
    if value.startswith("${"):
        _, _, default = value[2:-1].partition(":-")
        return default
    return value
