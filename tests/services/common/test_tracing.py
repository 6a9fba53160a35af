"""What is traced, what is not, and what the logs have of it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from qaq_core.base.errors import ConfigError
from services.common import log, tracing
from services.common.errors import NotFound

TRACE = "0af7651916cd43dd8448eb211c80319c"
SENT = (("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"), ("x-request-id", "request-7"))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    structlog.contextvars.clear_contextvars()
    yield
    tracing.shut_down()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    tracing.configure("router", exporter)
    return exporter


async def test_an_error_is_told_by_its_name_alone(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(NotFound), tracing.serving("/qaq.v1.Inference/Chat", ()):
        raise NotFound("a part of the prompt")
    await tracing.flush()
    (span,) = exporter.get_finished_spans()
    assert span.name == "Inference/Chat"
    assert span.attributes["error.type"] == span.status.description == "NOT_FOUND"
    assert span.resource.attributes["service.name"] == "qaq-router"
    assert "a part" not in span.to_json()


async def test_a_worker_continues_traces_and_begins_none(exporter: InMemorySpanExporter) -> None:
    with tracing.serving("/qaq.v1.Worker/Describe", ()):
        assert tracing.current() is None
    with tracing.serving("/qaq.v1.Worker/Run", SENT):
        assert TRACE in dict(tracing.outgoing())["traceparent"]
    await tracing.flush()
    assert [span.name for span in exporter.get_finished_spans()] == ["Worker/Run"]


async def test_spans_of_two_calls_at_once_do_not_mix(exporter: InMemorySpanExporter) -> None:
    async def call(number: int) -> None:
        with tracing.serving("/qaq.v1.Inference/Chat", ()), tracing.span("run", number=number):
            await asyncio.sleep(0)
            with tracing.span("inner", number=number):
                await asyncio.sleep(0)

    await asyncio.gather(call(1), call(2))
    await tracing.flush()
    spans = exporter.get_finished_spans()
    runs = {span.attributes["qaq.number"]: span for span in spans if span.name == "run"}
    for inner in (span for span in spans if span.name == "inner"):
        assert inner.parent.span_id == runs[inner.attributes["qaq.number"]].context.span_id


async def test_logs_have_the_ids_of_their_call(
    exporter: InMemorySpanExporter, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure()
    with tracing.serving("/qaq.v1.Inference/Chat", SENT):
        tracing.tell(session="s1")
        structlog.get_logger().warning("something")
    line = json.loads(capsys.readouterr().err)
    assert (line["trace_id"], line["request"], line["session"]) == (TRACE, "request-7", "s1")


def test_without_an_endpoint_nothing_is_traced() -> None:
    tracing.configure("router")
    assert not tracing.on()
    with tracing.serving("/qaq.v1.Inference/Chat", SENT), tracing.span("run") as span:
        assert span is None
        assert tracing.current() is None
        assert tracing.outgoing() == (("x-request-id", "request-7"),)


def test_without_an_endpoint_nothing_is_imported() -> None:
    asked = "import sys; from services.common import tracing; tracing.configure('x'); print(*sys.modules)"
    imported = subprocess.check_output([sys.executable, "-c", asked], text=True).split()
    assert "services.common.tracing" in imported
    assert not any(name.startswith("opentelemetry.exporter") for name in imported)


def test_a_request_id_that_could_not_be_logged_is_replaced() -> None:
    with tracing.serving("/qaq.v1.Inference/Chat", [("x-request-id", "x" * 1000)]):
        ((_, request_id),) = tracing.outgoing()
    assert request_id.startswith("req_")


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(ConfigError, match="gRPC"):
        tracing.configure("router")
    assert not tracing.on()
