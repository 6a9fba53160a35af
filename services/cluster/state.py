"""The settings of a stack, its owner, and the file that describes the running one to other processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import psutil
from pydantic import BaseModel, Field, model_validator

from qaq_core.base.errors import QAQError
from services.cluster.access import Access
from services.cluster.keys import StackKeys
from services.common.certificates import files
from services.common.private_files import write_private
from services.common.settings import Device, PresetName, WeightForm
from services.common.tenants import Role

_WHY = "ended.txt"


class StackError(QAQError):
    """The stack cannot do what was asked; the message says what to change."""


class ModelSettings(BaseModel):
    """How all workers of a stack compute: a part of `WorkerSettings`."""

    model: str = Field(min_length=1)
    device: Device = "cpu"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    weights: WeightForm = "auto"
    compiled: bool = False
    preset: PresetName = "balanced"
    target_bits: float | None = Field(default=None, gt=0, le=16)


class ServedModel(ModelSettings):
    """A model of a stack, and its number of workers.

    Attributes:
        workers: how many there are, or at least, if `max_workers` says how many there may be.
        idle_s: seconds after which one of more is stopped that is not needed.
    """

    workers: int = Field(default=1, ge=1, le=64)
    max_workers: int | None = Field(default=None, ge=1, le=64)
    idle_s: float = Field(default=60.0, ge=1, le=86400)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(f"max_workers is {self.max_workers}, and workers is {self.workers}")
        return self


class StackSettings(ServedModel):
    """What `qaq up` and `qaq demo` start. Other settings come from the environment (`QAQ_…`).

    Attributes:
        more: the models beside the first, which is the default one.
        http_port: the gateway's port; None starts no gateway.
        tls: the servers have certificates, and use TLS among each other and with clients of the router.
        https: the gateway uses TLS too.
        keys: the router asks for a key, and the stack makes one for a client and one for an operator.
        worker_cpus: CPUs that each worker reserves of its node.
    """

    more: list[ServedModel] = Field(default_factory=list, max_length=63)
    originals: int = Field(default=1, ge=1, le=64)
    port: int = Field(default=7700, ge=0, le=65535)
    http_port: int | None = Field(default=None, ge=0, le=65535)
    tls: bool = True
    https: bool = False
    keys: bool = True
    worker_cpus: float = Field(default=0, ge=0, le=1024)

    @property
    def models(self) -> list[ServedModel]:
        """All of them, the default first."""
        return [ServedModel(**self.model_dump(include=set(ServedModel.model_fields))), *self.more]


class Owner(BaseModel):
    """The process that owns a stack and ends all of it.

    Attributes:
        pid, born: process id and creation time; a later process may have the same pid.
        directory: with every file and socket of the stack; for its owner's eyes alone (0700).
    """

    pid: int
    born: float
    directory: Path

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.born and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class StackState(Owner):
    """A running stack. It contains Redis' passwords and the stack's secret, so its file has mode 0600.

    Attributes:
        router, gateway: addresses as host:port; the gateway may be None.
        redis: the argument of `EmbeddedRedis.attach`.
        certificates, secret: see `Access`.
        keys: the directory of the stack's keys; None if its router asks for none, or has a tenants file of its own.
        address: of the Ray cluster on which the stack was started; None is one of this machine. `directory` is then
            where its certificates are, and no process of this machine owns it.
    """

    settings: StackSettings
    router: str
    gateway: str | None = None
    ray_address: str
    redis: dict[str, Any]
    certificates: Path | None = None
    secret: str = Field(default="", repr=False)
    keys: Path | None = None
    address: str | None = None

    @property
    def alive(self) -> bool:
        """Whether its owner runs. What runs elsewhere is not asked."""
        return self.address is not None or super().alive

    def key(self, role: Role) -> str:
        """The stack's key of a role, else QAQ_API_KEY; empty if there is none."""
        return StackKeys(self.keys).key(role) if self.keys else os.environ.get("QAQ_API_KEY", "")

    @property
    def access(self) -> Access:
        return Access(redis=self.redis, certificates=self.certificates, secret=self.secret)


def directory() -> Path:
    """$QAQ_STATE_DIR, or ~/.local/state/qaq."""
    configured = os.environ.get("QAQ_STATE_DIR")
    return Path(configured) if configured else Path.home() / ".local" / "state" / "qaq"


def ca() -> Path:
    """Where the CA of the stack that runs is, for clients of all kinds."""
    return directory() / "ca.pem"


@contextlib.contextmanager
def writing() -> Iterator[Path]:
    """The directory of the state, to write in.

    Raises:
        StackError: it cannot be written.
    """
    folder = directory()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o022:
            raise StackError(f"others may write in {folder}, and so take the stack's keys; run chmod go-w {folder}")
        yield folder
    except OSError as error:
        raise StackError(
            f"{folder} cannot be written ({error.strerror}); make room or change its rights, or set QAQ_STATE_DIR to "
            "another directory"
        ) from error


def save(state: StackState) -> None:
    """Replaces the state file atomically, with mode 0600, and puts the CA beside it.

    Raises:
        StackError: it cannot be written.
    """
    with writing() as folder:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix="stack-")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(state.model_dump_json(indent=1))
            os.replace(name, folder / "stack.json")
        except OSError:
            os.unlink(name)
            raise
        if state.certificates is not None:
            shutil.copyfile(files(state.certificates, "client")[0], ca())


def load() -> StackState | None:
    """The stack that `qaq up` started and `qaq down` has not stopped, once it is ready; None if there is none.

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


def say_why(sentence: str) -> None:
    """Writes down why the stack ended by itself.

    Raises:
        StackError: it cannot be written.
    """
    with writing() as folder:
        write_private(folder / _WHY, f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {sentence}\n".encode())


def why_it_ended() -> str:
    """When and why the last stack ended by itself; empty if it did not, or another was started or stopped since."""
    try:
        return (directory() / _WHY).read_text().strip()
    except OSError:
        return ""


def forget_why() -> None:
    with contextlib.suppress(OSError):
        (directory() / _WHY).unlink(missing_ok=True)


def forget() -> None:
    """Deletes the state file and the CA."""
    for path in (ca(), directory() / "stack.json"):
        path.unlink(missing_ok=True)
