"""Where spans go: by OTLP over gRPC to the collector that the environment names, or are lost and counted."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

import structlog

from qaq_core.base.errors import ConfigError
from services.common import metrics
from services.common.log import once

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
QUEUE = 2048
"""Spans that wait for the collector; what ends beyond them is lost and counted."""

_log = structlog.get_logger()


def asked() -> bool:
    """Whether the environment asks for traces."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return any(os.environ.get(name) for name in ENDPOINTS)


def otlp() -> SpanExporter:
    """The exporter that the environment describes.

    Raises:
        ConfigError: it asks for another protocol, or for what the exporter cannot use.
    """
    if any(os.environ.get(name, "grpc") not in ("", "grpc") for name in PROTOCOLS):
        raise ConfigError("traces are sent by OTLP over gRPC alone; set OTEL_EXPORTER_OTLP_PROTOCOL to grpc")
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    # What it says of a collector that does not answer is counted and logged once, below.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    try:
        return OTLPSpanExporter()
    except Exception as error:
        raise ConfigError(f"the OTEL_EXPORTER_OTLP_… variables cannot be used: {error}") from error


def queue(exporter: SpanExporter) -> Any:
    """Sends spans from a thread of its own. Whoever ends a span never waits: beyond `QUEUE` it is lost."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    lock, waiting = threading.Lock(), 0

    def lost(spans: int) -> None:
        metrics.spans_lost.inc(spans)
        if once("spans lost"):
            _log.warning("the collector of traces does not take all spans; the others are lost and counted")

    class Sender(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            nonlocal waiting
            with lock:
                waiting -= len(spans)
            result = exporter.export(spans)
            if result is not SpanExportResult.SUCCESS:
                lost(len(spans))
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    class Queue(BatchSpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            nonlocal waiting
            if not span.context.trace_flags.sampled:
                return
            with lock:
                full = waiting >= QUEUE
                waiting += not full
            if full:
                lost(1)
            else:
                super().on_end(span)

    return Queue(Sender(), max_queue_size=QUEUE)
