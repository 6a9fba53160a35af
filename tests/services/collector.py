"""A collector of traces over real gRPC, which keeps what it is sent.

`python -m tests.services.collector 4317` runs one, to measure what traces cost: see docs/metrics.md.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Kept:
    """A span, with its attributes as Python values."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    kind: int
    seconds: float
    failed: bool
    attributes: dict[str, Any]


@dataclass
class Collector(pb_grpc.TraceServiceServicer):
    """Answers when `gate` is set.

    Attributes:
        raw: all that was sent, as bytes.
    """

    spans: list[Kept] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        self.gate.wait()
        self.raw.append(request.SerializeToString())
        for resource in request.resource_spans:
            (service,) = (a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans += [_kept(service, span) for scope in resource.scope_spans for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Kept]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Kept:
        (found,) = self.named(name)
        return found


def running_collector(port: int = 0) -> Iterator[tuple[Collector, str]]:
    """A collector that answers at once, and its URL."""
    collector = Collector()
    collector.gate.set()
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    collector.gate.set()
    server.stop(0)


def _kept(service: str, span: Any) -> Kept:
    attributes = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
    return Kept(service, span.name, *ids, span.kind, seconds, span.status.code == 2, attributes)


if __name__ == "__main__":
    for running, url in running_collector(int(sys.argv[1])):
        print(url, flush=True)
        while True:
            time.sleep(10)
            print(f"{len(running.spans)} spans", flush=True)
