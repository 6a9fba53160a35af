"""The container engine of this machine: Docker with its Compose plugin, or Podman with podman-compose."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


class EngineError(Exception):
    """A command of the engine failed. The message has its last output."""


@dataclass(frozen=True)
class Engine:
    """Commands of an engine.

    Attributes:
        program: docker or podman.
        compose: what runs a Compose file.
    """

    program: str
    compose: tuple[str, ...]

    @classmethod
    def find(cls) -> Engine | str:
        """The engine of this machine, or why there is none."""
        if shutil.which("docker"):
            plugin = subprocess.run(["docker", "compose", "version"], capture_output=True)
            running = subprocess.run(["docker", "info"], capture_output=True)
            if plugin.returncode == running.returncode == 0:
                return cls("docker", ("docker", "compose"))
        if shutil.which("podman"):
            beside = Path(sys.executable).with_name("podman-compose")
            compose = shutil.which("podman-compose") or (str(beside) if beside.exists() else None)
            return cls("podman", (compose,)) if compose else "podman is here, podman-compose is not"
        return "no container engine: neither Docker with its Compose plugin nor Podman answers"

    def run(self, *arguments: str, timeout_s: float = 120) -> str:
        """What a command of the engine prints. Raises EngineError."""
        return command([self.program, *arguments], timeout_s=timeout_s)

    def build(self, image: str, target: str, dockerfile: Path = DOCKERFILE) -> None:
        """Builds an image. BUILD_ARGS of the environment are further arguments. Raises EngineError."""
        further = shlex.split(os.environ.get("BUILD_ARGS", ""))
        arguments = ["--target", target, "--tag", image, "--file", str(dockerfile), *further, str(ROOT)]
        self.run("build", *arguments, timeout_s=3600)

    def bytes_of(self, image: str) -> int:
        """The size of an image."""
        return int(self.run("image", "inspect", "--format", "{{.Size}}", image))


@dataclass(frozen=True)
class Project:
    """The containers of a Compose file.

    Args:
        directory: has the file.
        variables: of the file.
    """

    engine: Engine
    name: str
    directory: Path
    variables: Mapping[str, str]

    def compose(self, *arguments: str, timeout_s: float = 600) -> str:
        """Runs a command of Compose. Raises EngineError."""
        given = [*self.engine.compose, "-p", self.name, "-f", "docker-compose.yml", *arguments]
        return command(given, cwd=self.directory, env=os.environ | dict(self.variables), timeout_s=timeout_s)

    def container(self, service: str) -> str:
        """The id of a service's container, running or not."""
        labels = [f"com.docker.compose.project={self.name}", f"com.docker.compose.service={service}"]
        return self.engine.run("ps", "-aq", *(f"--filter=label={label}" for label in labels)).strip()

    def exec(self, service: str, *arguments: str) -> str:
        """What a command in a container prints. Raises EngineError."""
        return self.engine.run("exec", self.container(service), *arguments)

    def inspect(self, service: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.engine.run("inspect", self.container(service)))
        return found[0]

    def healthy(self, service: str) -> bool:
        """Whether a service's own health check passes now. Podman runs none by itself where there is no systemd."""
        if not self.inspect(service)["State"]["Running"]:
            return False
        if self.engine.program == "docker":
            return bool(self.inspect(service)["State"]["Health"]["Status"] == "healthy")
        try:
            self.engine.run("healthcheck", "run", self.container(service))
        except EngineError:
            return False
        return True

    def log(self, service: str) -> str:
        return self.engine.run("logs", "--tail", "40", self.container(service))


def command(given: Sequence[str], *, timeout_s: float, cwd: Path | None = None, env: Any = None) -> str:
    """What a command prints to stdout. Raises EngineError."""
    done = subprocess.run(given, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        said = (done.stdout + done.stderr)[-3000:]
        raise EngineError(f"{shlex.join(given)[:300]} ended with {done.returncode}: {said}")
    return done.stdout
