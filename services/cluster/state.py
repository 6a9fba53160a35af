"""What a stack was asked to be, and where a running one wrote itself down for other processes."""

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
    """The stack cannot do that; the message says what to do."""


class StackSettings(BaseModel):
    """What `qaq up` and `qaq demo` start. Everything else comes from the environment (`QAQ_…`).

    Attributes:
        http_port: of the gateway; None starts none.
    """

    model: str = Field(min_length=1)
    workers: int = Field(default=1, ge=1, le=64)
    originals: int = Field(default=1, ge=1, le=64)
    port: int = Field(default=7700, ge=0, le=65535)
    http_port: int | None = Field(default=None, ge=0, le=65535)
    device: str = "cpu"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    weights: WeightForm = "auto"
    compiled: bool = False
    preset: str = "balanced"
    target_bits: float | None = Field(default=None, gt=0, le=16)
    requantize_wait: bool = False


class StackState(BaseModel):
    """A running stack. Holds the Redis password, so it is only ever stored with mode 0600.

    Attributes:
        pid, born: of the process that owns it; `born` tells it from a later one with the same pid.
        gateway: its address, host:port; None without one.
        redis: as `EmbeddedRedis.attach` takes it.
    """

    settings: StackSettings
    pid: int
    born: float
    router: str
    gateway: str | None = None
    ray_address: str
    ray_directory: Path
    redis: dict[str, Any]

    @property
    def alive(self) -> bool:
        """Whether the owning process is still there."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.born and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def directory() -> Path:
    """$QAQ_STATE_DIR, or the user's state directory."""
    configured = os.environ.get("QAQ_STATE_DIR")
    return Path(configured) if configured else Path.home() / ".local" / "state" / "qaq"


def save(state: StackState) -> None:
    """Replaces the state file in one step, readable by its owner alone."""
    place = directory()
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=place, prefix="stack-")  # made with mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(state.model_dump_json(indent=1))
    os.replace(name, place / "stack.json")


def load() -> StackState | None:
    """The stack that was started last and not stopped; None if there is none.

    Raises:
        StackError: the state file is damaged.
    """
    path = directory() / "stack.json"
    try:
        return StackState.model_validate(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StackError(f"{path} is damaged; stop what it names by hand and delete it") from error


def forget() -> None:
    """Deletes the state file."""
    with contextlib.suppress(FileNotFoundError):
        (directory() / "stack.json").unlink()
