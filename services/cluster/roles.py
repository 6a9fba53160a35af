"""The settings of each role of a stack: from the stack's own, else the environment (`QAQ_…`), else the default.

`who` is the part that says who the server is, see `Access.settings`.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from services.cluster.access import Access
from services.cluster.state import ModelSettings, ServedModel, StackError, StackSettings
from services.common import environment
from services.common.extras import require
from services.common.settings import CommonSettings, GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings

Who = Mapping[str, Any]

# The gateway tells Prometheus which ports these are.
MEASURED: Who = {"metrics_port": 0, "metrics_https": False}
_NOBODY: Who = {"redis_url": SecretStr("redis://127.0.0.1")}


def router(settings: StackSettings, who: Who) -> RouterSettings:
    return RouterSettings(**who, **MEASURED, model=settings.model, port=settings.port)


def gateway(settings: StackSettings, who: Who) -> GatewaySettings | None:
    """None if the stack has no gateway."""
    if settings.http_port is None:
        return None
    return GatewaySettings(**who, **MEASURED, port=settings.http_port, https=settings.https)


def worker(settings: ModelSettings, who: Who) -> WorkerSettings:
    return WorkerSettings(**who, **MEASURED, port=0, **_model(settings))


def _model(settings: ModelSettings) -> dict[str, Any]:
    return settings.model_dump(include=set(ModelSettings.model_fields))


def originals(who: Who) -> OriginalsSettings:
    return OriginalsSettings(**who, **MEASURED, port=0)


@dataclass(frozen=True)
class Plan:
    """The settings of every role, made where a stack is started: no other environment is read for them.

    Attributes:
        worker: of the first model; `of_model` has those of others.
        logs: where servers of this machine keep their logs; None leaves them to Ray.
    """

    router: RouterSettings
    worker: WorkerSettings
    originals: OriginalsSettings
    gateway: GatewaySettings | None
    logs: Path | None = None

    def of_model(self, model: ModelSettings) -> WorkerSettings:
        """The settings of the workers of a model."""
        return self.worker.model_copy(update=_model(model))


def plan(settings: StackSettings, access: Access, of_router: Who | None = None, logs: Path | None = None) -> Plan:
    """Args:
    of_router: settings of the router beside the stack's.
    """
    return Plan(
        router(settings, {**access.settings("router"), **(of_router or {})}),
        worker(settings, access.settings("worker")),
        originals(access.settings("originals")),
        gateway(settings, access.settings("gateway")),
        logs,
    )


def check(settings: StackSettings) -> None:
    """Checks everything that can be checked before a process is started.

    Raises:
        ValidationError, QAQError, ModuleNotFoundError: a setting of a role is wrong, the model's files or a package
            are not here, or a port is taken.
    """
    check_settings(settings)
    check_devices(settings.models)
    for served in settings.models:
        check_files(served.model)
    check_ports(settings)


def check_files(model: str) -> None:
    """Raises:
    ModelLoadError: the files of a model are not here.
    """
    from qaq_core.models import find_checkpoint, is_hub_id

    if not is_hub_id(model):  # the worker asks the hub, which takes a network
        find_checkpoint(model)


def check_settings(settings: StackSettings) -> None:
    """Checks what does not depend on the machine.

    Raises:
        ValidationError, QAQError, ModuleNotFoundError: a setting of a role is wrong, or a package is not here.
    """
    from qaq_core.models import name_of
    from services.router import placement

    environment.check()
    routing = router(settings, _NOBODY)
    placement.make(routing.placement)
    if routing.smg:
        require("smg_grpc_proto")
        if settings.keys:
            raise StackError("QAQ_SMG is set, and SMG sends no keys; add --no-keys, or unset QAQ_SMG")
    gateway(settings, _NOBODY)
    for served in settings.models:
        worker(served, _NOBODY)
    originals(_NOBODY)
    names = [name_of(served.model) for served in settings.models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise StackError(f'two of the models have the name "{twice}", and requests could not tell them apart')


def check_devices(models: Sequence[ServedModel]) -> None:
    """Each worker has a CUDA device of its own, which is the only one that Ray lets it see.

    Raises:
        ConfigError: the device is not there.
        StackError: it is one by number, or there are not enough.
    """
    on_gpus = [served for served in models if served.device != "cpu"]
    if not on_gpus:
        return
    import torch

    from qaq_core.models import device_of

    for served in on_gpus:
        device_of(served.device)
        if served.device != "cuda":
            raise StackError(f"a stack chooses its workers' devices itself: take cuda, not {served.device}")
    workers = sum(served.workers for served in on_gpus)
    if workers > (found := torch.cuda.device_count()):
        raise StackError(f"{workers} workers need a CUDA device each, and there are {found}; take --workers {found}")


def check_ports(settings: StackSettings) -> None:
    """Raises:
    StackError: a port of the router or the gateway is taken.
    """
    host = CommonSettings().host
    if settings.port and settings.port == settings.http_port:
        raise StackError(f"--port and --http-port are both {settings.port}; choose another for one of them")
    _check_port(host, settings.port, "--port")
    _check_port(host, settings.http_port or 0, "--http-port")


def _check_port(host: str, port: int, option: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise StackError(f"{host} is no address of this machine; set QAQ_HOST to one, such as 127.0.0.1") from error
    except PermissionError as error:
        raise StackError(f"port {port} is for the administrator alone; choose one above 1023 with {option}") from error
    except OSError as error:
        if port == 0:
            raise StackError(f"{host} is no address of this machine; set QAQ_HOST to one, such as 127.0.0.1") from error
        raise StackError(f"port {port} is taken; choose another with {option} (0 takes any free port)") from error
