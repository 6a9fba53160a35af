"""The settings of a stack, and the file that describes the running one to other processes."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, Field

from qaq_core.base.errors import QAQError
from services.common.settings import WeightForm


class StackError(QAQError):
    """The stack cannot do what was asked; the message says what to change."""


class ModelSettings(BaseModel):
    """How all workers of a stack compute: a part of `WorkerSettings`."""

    model: str = Field(min_length=1)
    device: str = "cpu"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    weights: WeightForm = "auto"
    compiled: bool = False
    preset: str = "balanced"
    target_bits: float | None = Field(default=None, gt=0, le=16)
    requantize_wait: bool = False


class StackSettings(ModelSettings):
    """What `qaq up` and `qaq demo` start. Other settings come from the environment (`QAQ_…`).

    Attributes:
        http_port: the gateway's port; None starts no gateway.
    """

    workers: int = Field(default=1, ge=1, le=64)
    originals: int = Field(default=1, ge=1, le=64)
    port: int = Field(default=7700, ge=0, le=65535)
    http_port: int | None = Field(default=None, ge=0, le=65535)


class StackState(BaseModel):
    """A running stack. It contains the Redis password and the stack's secret, so its file has mode 0600.

    Attributes:
        pid, born: process id and creation time of the owner; a later process may have the same pid.
        router, gateway: addresses as host:port; the gateway may be None.
        redis: the argument of `EmbeddedRedis.attach`.
        secret: of the workers and cache services.
    """

    settings: StackSettings
    pid: int
    born: float
    router: str
    gateway: str | None = None
    ray_address: str
    ray_directory: Path
    redis: dict[str, Any]
    secret: str = Field(default="", repr=False)

    @property
    def alive(self) -> bool:
        """Whether the owner process runs."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.born and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def directory() -> Path:
    """$QAQ_STATE_DIR, or ~/.local/state/qaq."""
    configured = os.environ.get("QAQ_STATE_DIR")
    return Path(configured) if configured else Path.home() / ".local" / "state" / "qaq"


def save(state: StackState) -> None:
    """Replaces the state file atomically, with mode 0600."""
    folder = directory()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix="stack-")
    with os.fdopen(descriptor, "w") as file:
        file.write(state.model_dump_json(indent=1))
    os.replace(name, folder / "stack.json")


def load() -> StackState | None:
    """The stack that `qaq up` started and `qaq down` has not stopped; None if there is none.

    Raises:
        StackError: the state file is damaged.
    """
    path = directory() / "stack.json"
    try:
        return StackState.model_validate(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StackError(f"{path} is damaged; stop the processes it names by hand and delete it") from error


def forget() -> None:
    """Deletes the state file."""
    with contextlib.suppress(FileNotFoundError):
        (directory() / "stack.json").unlink()
