"""Traces with OpenTelemetry: one for each call of a client, from the gateway to the cache services.

`OTEL_EXPORTER_OTLP_ENDPOINT` turns them on; the SDK reads the other `OTEL_…` variables. Off, nothing of OpenTelemetry
is imported and nothing is done. Spans have names, ids, counts and times: nothing of a prompt or an answer.

A call runs in a task of its own, so what becomes current in it is never reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import structlog

from services.common import trace_export
from services.common.errors import to_status

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

Kind = Literal["internal", "server", "client"]
Value = str | int | float | bool

REQUEST_ID = "x-request-id"
MAX_REQUEST_ID = 128
FLUSH_S = 2.0
"""How long a process that ends waits for the collector to take the last spans."""
# Their calls belong to a trace only if their caller has one.
_INNER = ("/qaq.v1.Worker/", "/qaq.v1.Originals/")

_provider: TracerProvider | None = None
_tracer: Any = None


def configure(role: str, exporter: SpanExporter | None = None) -> None:
    """Turns traces on for this process, if the environment asks for them. A second call does nothing.

    Args:
        role: `service.name` is qaq-<role>, unless OTEL_SERVICE_NAME says otherwise.
        exporter: takes the spans; by default what the environment names, by OTLP over gRPC.
    Raises:
        ConfigError: the environment asks for what cannot be.
    """
    global _provider, _tracer
    if _tracer is not None or (exporter is None and not trace_export.asked()):
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    name = os.environ.get("OTEL_SERVICE_NAME") or f"qaq-{role}"
    about = {"service.name": name, "service.instance.id": uuid.uuid4().hex}
    _provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
    _provider.add_span_processor(trace_export.queue(exporter or trace_export.otlp()))
    _tracer = _provider.get_tracer("qaq", importlib.metadata.version("qaq-kv"))


async def flush(timeout_s: float = FLUSH_S) -> None:
    """Sends what is left, when a server has stopped. Waits `timeout_s` at most."""
    if _provider is not None:
        await asyncio.to_thread(_bounded_in_time, _provider.force_flush, timeout_s)


def shut_down(timeout_s: float = FLUSH_S) -> None:
    """Sends what is left, and turns traces off. Waits `timeout_s` at most."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        _bounded_in_time(provider.shutdown, timeout_s)


def on() -> bool:
    return _tracer is not None


@contextlib.contextmanager
def span(name: str, kind: Kind = "internal", **attributes: Value) -> Iterator[Any]:
    """A span that lasts as long as the context. It is current within it; None if there is no trace."""
    context = current()
    if context is None:
        yield None
        return
    with _within(_begin(name, kind, context, attributes), context) as begun:
        yield begun


@contextlib.contextmanager
def http(method: str, headers: Iterable[tuple[bytes, bytes]], request_id: str) -> Iterator[Any]:
    """The span of an HTTP request; it continues the client's trace if the headers say so."""
    structlog.contextvars.bind_contextvars(request=request_id)
    if _tracer is None:
        yield None
        return
    carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    with _within(_begin(method, "server", _extracted(carrier), {"http.request.method": method}), None) as begun:
        yield begun


@contextlib.contextmanager
def serving(method: str, metadata: Iterable[tuple[str, Any]] | None) -> Iterator[None]:
    """The span of a gRPC call, by its method and what its caller sent. Binds the call's ids to its logs."""
    sent = {name: value for name, value in metadata or () if isinstance(value, str)}
    given = sent.get(REQUEST_ID, "")
    inner = method.startswith(_INNER)
    if valid_id(given) or not inner:
        structlog.contextvars.bind_contextvars(request=given if valid_id(given) else new_id())
    if _tracer is None or (inner and "traceparent" not in sent):
        yield
        return
    service, _, name = method[1:].partition("/")
    about: dict[str, Value] = {"rpc.system.name": "grpc", "rpc.method": method[1:]}
    with _within(_begin(f"{service.rpartition('.')[2]}/{name}", "server", _extracted(sent), about), None):
        yield


def outgoing() -> tuple[tuple[str, str], ...]:
    """Metadata of a call that belongs to what is current: the trace and the request's id."""
    request = structlog.contextvars.get_contextvars().get("request")
    metadata = ((REQUEST_ID, request),) if request else ()
    context = current()
    if context is None:
        return metadata
    carrier: dict[str, str] = {}
    _propagator().inject(carrier, context)
    return (*metadata, *carrier.items())


def current() -> Context | None:
    """The trace that is current here, for `within` and `record`; None if there is none."""
    if _tracer is None:
        return None
    from opentelemetry import context, trace

    return context.get_current() if trace.get_current_span().get_span_context().is_valid else None


@contextlib.contextmanager
def within(context: Context | None) -> Iterator[None]:
    """Makes a trace current in another thread while the context lasts."""
    if context is None or _tracer is None:
        yield
        return
    from opentelemetry.context import attach, detach

    token = attach(context)
    try:
        yield
    finally:
        detach(token)


def record(name: str, context: Context | None, begun: float, ended: float, **attributes: Value) -> None:
    """A span of something that is over.

    Args:
        begun, ended: seconds of the monotonic clock.
    """
    if context is None or _tracer is None:
        return
    zero = time.time_ns() - time.monotonic_ns()
    at = _tracer.start_span(name, context, attributes=_named(attributes), start_time=zero + int(begun * 1e9))
    at.end(zero + int(ended * 1e9))


def tell(**attributes: Value) -> None:
    """Adds to the span that is current. `session` is bound to the logs, too."""
    if session := attributes.get("session"):
        structlog.contextvars.bind_contextvars(session=session)
    if _tracer is not None:
        from opentelemetry import trace

        trace.get_current_span().set_attributes(_named(attributes))


def new_id() -> str:
    """An id for a request that has none."""
    return f"req_{uuid.uuid4().hex}"


def valid_id(given: str) -> bool:
    """Whether a client's id of a request is taken."""
    return 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable()


def _begin(name: str, kind: Kind, context: Context | None, attributes: dict[str, Value]) -> Any:
    from opentelemetry.trace import SpanKind

    bound = structlog.contextvars.get_contextvars()
    ids: dict[str, Value] = {f"qaq.{key}": bound[key] for key in ("request", "session") if key in bound}
    return _tracer.start_span(name, context, SpanKind[kind.upper()], {**ids, **_named(attributes)})


def _named(attributes: Mapping[str, Value]) -> dict[str, Value]:
    """Attributes without a name space are QAQ's."""
    return {name if "." in name else f"qaq.{name}": value for name, value in attributes.items()}


@contextlib.contextmanager
def _within(begun: Any, outer: Context | None) -> Iterator[Any]:
    """Makes a span current, and ends it with the context and a status. Of an error only its name is told: its message
    may have a part of a prompt."""
    from opentelemetry.context import attach
    from opentelemetry.trace import Status, StatusCode, set_span_in_context

    attach(set_span_in_context(begun, outer))
    structlog.contextvars.bind_contextvars(trace_id=f"{begun.get_span_context().trace_id:032x}")
    try:
        yield begun
    except Exception as error:
        status = to_status(error)
        name = status.code.name if status is not None else type(error).__name__
        begun.set_attribute("error.type", name)
        begun.set_status(Status(StatusCode.ERROR, name))
        raise
    except BaseException:  # its caller has gone away
        begun.set_attribute("error.type", "CANCELLED")
        raise
    finally:
        begun.end()
        if outer is not None:
            attach(outer)


def _bounded_in_time(work: Callable[[], object], timeout_s: float) -> None:
    thread = threading.Thread(target=work, name="last spans", daemon=True)
    thread.start()
    thread.join(timeout_s)


def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


def _extracted(carrier: dict[str, str]) -> Context:
    """W3C's trace context of a caller."""
    from opentelemetry.context import Context

    extracted: Context = _propagator().extract(carrier, Context())
    return extracted
