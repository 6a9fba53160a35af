"""The router as a server: its parts, its start and its stop."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import structlog
from qaq.v1 import generate_pb2, generate_pb2_grpc, inspect_pb2, inspect_pb2_grpc

from qaq_core.base.errors import ConfigError
from qaq_core.models import avoid_torch
from services.common import log, metrics, tracing
from services.common.channel import open_channel
from services.common.errors import Unavailable
from services.common.identity import is_loopback
from services.common.redis import check, connect
from services.common.registry import Registry
from services.common.server import GrpcServer, run_until_signal
from services.common.server_identity import identity
from services.common.settings import RouterSettings
from services.router import placement
from services.router.callers import Callers, KeyInterceptor
from services.router.generations import Generations
from services.router.inspection import InspectorService
from services.router.models import Models
from services.router.prompts import Prompts
from services.router.quotas import TenantQuotas
from services.router.service import InferenceService
from services.router.sessions import SessionDirectory
from services.router.workers import Workers

_log = structlog.get_logger()

# Room for the other fields of a request with the longest prompt, so that validation can say what is too long.
_MESSAGE_MARGIN = 1 << 20


class RouterServer:
    """The router. `start` and `stop` may each be called once."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._stack = contextlib.AsyncExitStack()
        self._workers: Workers | None = None
        self._models: Models | None = None

    @property
    def workers(self) -> int:
        """Workers that can run generations, as far as it knows."""
        return len(self._workers.ready) if self._workers else 0

    @property
    def queued(self) -> dict[str, int]:
        """Generations in the queue of each model."""
        return self._models.queued if self._models else {}

    async def serves(self, name: str) -> str | None:
        """Why it cannot serve a model: empty if it can, None if it has no worker of it yet."""
        model = self._models.find(name) if self._models else None
        if model is None or not model.links:
            return None
        try:
            await model.prompts()
        except Unavailable as error:
            return error.message
        return ""

    async def start(self) -> str:
        """Serves, and registers the router. Returns its address, host:port.

        Raises:
            ConfigError: a placement policy does not exist, SMG's protocol is not installed, the tenants file or a
                certificate cannot be used, or others could call without either.
            ModelLoadError: there is no tokenizer for the model that the settings name.
            PortTakenError: the port is taken.
            RedisUnreachableError: Redis does not answer.
        """
        settings = self._settings
        callers = Callers(settings.tenants_file)
        if settings.smg and settings.tenants_file is not None:
            _log.warning("smg and tenants_file are set: SMG sends no keys, so its calls are refused; unset one of them")
        if settings.tenants_file is None and not settings.client_certificates and not is_loopback(settings.host):
            _open_to_all(settings)
        tracing.configure("router")
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(tracing.flush)
            who = identity(settings)
            measured = stack.enter_context(metrics.serving(settings, who))
            redis = connect(settings.redis_url, who)
            stack.push_async_callback(redis.aclose)
            await check(redis, settings.redis_url)
            registry = Registry(redis)
            placement.make(settings.placement)
            prompts = await Prompts.load(settings.model) if settings.model else None
            workers = Workers(registry, partial(open_channel, identity=who, role="worker"))
            models = Models(settings, workers, prompts)
            stack.push_async_callback(models.close)
            stack.push_async_callback(workers.stop)
            await workers.start()
            server = GrpcServer(
                settings.host,
                settings.port,
                advertise_host=settings.advertise_host,
                max_request_bytes=settings.max_prompt_bytes + _MESSAGE_MARGIN,
                identity=who,
                certificates=settings.client_certificates,
                interceptors=[KeyInterceptor(callers)],
            )
            sessions = SessionDirectory(redis, settings.session_ttl_s)
            quotas = TenantQuotas(redis)
            generations = Generations(settings, sessions)
            service = InferenceService(callers, quotas, sessions, workers, models, generations)
            server.add(
                generate_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
                generate_pb2_grpc.add_InferenceServicer_to_server,
                service,
            )
            server.add(
                inspect_pb2.DESCRIPTOR.services_by_name["Inspector"].full_name,
                inspect_pb2_grpc.add_InspectorServicer_to_server,
                InspectorService(callers, quotas, sessions, workers, generations.reprice),
            )
            if settings.smg:
                server.add(*_vllm_engine(service, callers, models))
            address = await server.start()
            stack.push_async_callback(server.stop)
            stack.callback(workers.leave)

            def facts() -> dict[str, Any]:
                return {"model": settings.model, "relay_ms": generations.latency.median_ms}

            await stack.enter_async_context(registry.announce("router", address, facts))
            await stack.enter_async_context(registry.announce_metrics(measured, "router", address))
            self._workers, self._models = workers, models
            self._stack = stack.pop_all()
        return address

    async def stop(self) -> None:
        """Leaves the registry, gives running calls a moment to end, and closes everything."""
        await self._stack.aclose()


def _vllm_engine(inference: InferenceService, callers: Callers, models: Models) -> tuple[str, Any, Any]:
    """The service that SMG calls, as `GrpcServer.add` takes it.

    Raises:
        ConfigError: its protocol is not installed.
    """
    try:
        from smg_grpc_proto import vllm_engine_pb2_grpc

        from services.router.vllm_engine import SERVICE_NAME, VllmEngine
    except ModuleNotFoundError as error:
        if error.name != "smg_grpc_proto":
            raise
        raise ConfigError(
            "the setting smg needs smg-grpc-proto, which is not installed: pip install 'qaq-kv[smg]'"
        ) from error
    add_to_server = vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server
    return SERVICE_NAME, add_to_server, VllmEngine(inference, callers, models)


def _open_to_all(settings: RouterSettings) -> None:
    """Warns that nothing says who may call.

    Raises:
        ConfigError: that was not asked for.
    """
    if not settings.insecure:
        raise ConfigError(
            f"the router binds {settings.host} and asks nobody for a key: set QAQ_TENANTS_FILE (`qaq key` makes one), "
            "QAQ_CLIENT_CERTIFICATES=1, or QAQ_INSECURE=1 to let whoever reaches that network call, as any tenant"
        )
    _log.warning("no tenants file: whoever reaches this router may use it, as any tenant", host=settings.host)


async def serve(settings: RouterSettings) -> None:
    """Runs a router until SIGTERM or SIGINT."""
    log.configure(settings.log_level)
    avoid_torch()
    await run_until_signal(RouterServer(settings))
