"""Every Prometheus metric of QAQ, declared once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    start_http_server,
)

from qaq_core.base.errors import QAQError
from services.common import tls
from services.common.identity import Identity

if TYPE_CHECKING:
    from services.common.settings import CommonSettings


class MetricsPortError(QAQError):
    """The port of the metrics cannot be bound. The message has the address."""


SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

# Worker: the cache.
kv_bytes = Gauge("qaq_kv_bytes", "Allocated bytes of caches", ["tier"])
kv_compression_ratio = Gauge("qaq_kv_compression_ratio", "Bytes at 16 bits an element over resident bytes")
kv_bits = Gauge(
    "qaq_kv_bits", "Vectors in the cache of the last finished generation, by their bits per element", ["side", "bits"]
)
kv_mean_bits = Gauge(
    "qaq_kv_mean_bits", "Bits per packed element of all caches, scales and tags included; 0 if nothing is packed"
)
kv_lambda = Gauge("qaq_kv_lambda", "Floor of lambda for all caches of the worker; 0 if memory is not short")
preempted = Counter("qaq_preempted_total", "Generations that were preempted because the caches exceeded their budget")
kv_budget_exceeded = Counter(
    "qaq_kv_budget_exceeded_total", "Times that the caches exceeded their budget and no generation could be preempted"
)
exceptions = Counter(
    "qaq_exceptions_total", "Attention-window exceptions: vectors whose required width rose above their own"
)
rows_corrected = Counter(
    "qaq_rows_corrected_total", "Rows whose originals were fetched for the decode step that looked at them"
)
corrections_late = Counter(
    "qaq_corrections_late_total", "Rows that a decode step asked for and that did not come in time: it went on without"
)
predicted_error = Histogram(
    "qaq_predicted_error",
    "Predicted KL divergence from full precision of a generated token, in nats",
    buckets=(1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0),
)

# Originals: client and server.
requantize_seconds = Histogram("qaq_requantize_seconds", "Duration of a re-quantization batch", buckets=SECONDS)
requantize_bytes = Counter("qaq_requantize_bytes_total", "Bytes of packed rows in replies")
requantize_failures = Counter(
    "qaq_requantize_failures_total", "Batches that failed because the originals store did not answer"
)
originals_missing = Counter("qaq_originals_missing_total", "Rows without an original in the store")
originals_corrupt = Counter(
    "qaq_originals_corrupt_total", "Pages that were not used or not stored: checksum, seal, model or values are wrong"
)
pages_unknown = Counter("qaq_pages_unknown_total", "Pages of a version that another release writes, treated as missing")
pages_put = Counter("qaq_pages_put_total", "Pages that the originals store has acknowledged")
pages_unacked = Gauge("qaq_pages_unacked", "Pages that the originals store has not acknowledged yet")
page_bytes = Gauge("qaq_page_bytes", "Bytes of pages and codecs in Redis, with their keys")
page_plain_bytes = Counter("qaq_page_plain_bytes_total", "Bytes of the pages that were stored, as workers sent them")
page_stored_bytes = Counter("qaq_page_stored_bytes_total", "Bytes of the same pages as they were stored")
page_budget_bytes = Gauge("qaq_page_budget_bytes", "Bytes that pages and codecs may take in Redis now")
pages_evicted = Counter("qaq_pages_evicted_total", "Pages and codecs that nobody held, dropped for others")
pages_refused = Counter("qaq_pages_refused_total", "Pages and codecs that were refused because all others were held")
put_retries = Counter("qaq_put_retries_total", "Times that a page was sent again")
redis_row_reads = Counter("qaq_redis_row_reads_total", "Rows of originals read from Redis")

# Worker: prompts.
prompt_tokens = Counter(
    "qaq_prompt_tokens_total", "Tokens of prompts, by the source of their keys and values", ["source"]
)
prefix_failures = Counter("qaq_prefix_failures_total", "Stored prefixes that could not be loaded completely")

# Worker: prompt lookup.
shadow_tokens = Counter("qaq_shadow_tokens_total", "Tokens computed in full precision beside a session that is watched")
drafted_tokens = Counter("qaq_drafted_tokens_total", "Tokens that prompt lookup drafted")
accepted_tokens = Counter("qaq_accepted_tokens_total", "Drafted tokens that were the tokens sampled")

# Requests.
time_to_first_token_seconds = Histogram(
    "qaq_time_to_first_token_seconds",
    "From the start of a generation to its first token",
    buckets=(*SECONDS, 60.0, 120.0),
)
inter_token_seconds = Histogram("qaq_inter_token_seconds", "From one token to the next", buckets=SECONDS)
relay_seconds = Histogram(
    "qaq_relay_seconds",
    "A token in the router: from its arrival until gRPC has taken it for the client",
    buckets=(0.00005, 0.0001, 0.00015, 0.0002, 0.0003, *SECONDS),
)
resumed = Counter("qaq_resumed_total", "Streams that were resumed on another worker")
orphans_lapsed = Counter("qaq_orphans_lapsed_total", "Generations whose router was lost and that nobody took over")
taken_over = Counter("qaq_taken_over_total", "Generations of this worker that went on for another call")
sessions = Gauge("qaq_sessions", "Sessions with a cache on this worker")
generated_tokens = Counter("qaq_generated_tokens_total", "Tokens that this worker has sampled")
queue_seconds = Histogram(
    "qaq_queue_seconds", "From a generation's arrival to its admission", buckets=(*SECONDS, 60.0, 120.0)
)
queue_depth = Gauge("qaq_queue_depth", "Requests in the queue")
running = Gauge("qaq_running", "Generations in prefill or decode on this worker")
unauthenticated = Counter("qaq_unauthenticated_total", "Calls of the router without the key of a tenant")
tenants_failures = Counter("qaq_tenants_failures_total", "Tenants files that could not be used when they changed")
quota_refusals = Counter("qaq_quota_refusals_total", "Calls that exceeded a quota of their tenant", ["quota"])
quota_failures = Counter("qaq_quota_failures_total", "Counts of quotas that Redis did not answer")
late_work = Counter("qaq_late_work_total", "Pieces of work in threads that took too long, and go on", ["of"])
spans_lost = Counter("qaq_spans_lost_total", "Spans that the collector of traces did not take")
registry_failures = Counter("qaq_registry_failures_total", "Heartbeats and member listings that Redis did not answer")


http_requests = Counter("qaq_http_requests_total", "Requests to the gateway", ["path", "status"])
http_seconds = Histogram(
    "qaq_http_seconds", "From a request to the end of its response", ["path"], buckets=(*SECONDS, 60.0, 300.0)
)


restarts = Counter("qaq_restarts_total", "Times that a server of `qaq up` was started again after its process ended")


# What a gateway measures. It declares the metrics of the other roles, too, but has no values for them.
GATEWAY = CollectorRegistry()
for _collector in (
    *(PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR),
    *(http_requests, http_seconds, registry_failures, spans_lost, restarts),
):
    GATEWAY.register(_collector)


def serve(
    port: int,
    host: str = "127.0.0.1",
    identity: Identity | None = None,
    registry: CollectorRegistry = REGISTRY,
) -> Any:
    """Serves /metrics on `port` from a daemon thread; 0 takes any free port. Returns the HTTP server.

    Args:
        identity: serves HTTPS, to those who show a certificate of the CA.
    Raises:
        MetricsPortError: the port cannot be bound.
    """
    secured: dict[str, Any] = {}
    if identity is not None:
        secured = {
            "certfile": str(identity.cert),
            "keyfile": str(identity.key),
            "client_cafile": str(identity.ca),
            "client_auth_required": True,
        }
    try:
        server, _ = start_http_server(port, addr=host, registry=registry, **secured)
    except OSError as error:
        raise MetricsPortError(
            f"metrics cannot be served on {host}:{port} ({error.strerror or error}); choose another --metrics-port"
        ) from error
    if identity is not None:
        listening: Any = server.socket
        listening.do_handshake_on_connect = False  # in the thread of the request: a silent client keeps nobody waiting
        tls.renew(listening.context, identity, certificates=True)
    return server


@contextlib.contextmanager
def serving(
    settings: CommonSettings, identity: Identity | None, registry: CollectorRegistry = REGISTRY
) -> Iterator[str]:
    """Serves a role's metrics while the context lasts, if its settings name a port.

    Yields:
        host:port, if they are in clear for this machine alone; else "".
    Raises:
        MetricsPortError: the port cannot be bound.
    """
    if settings.metrics_port is None:
        yield ""
        return
    host, who = (settings.host, identity) if settings.metrics_https else ("127.0.0.1", None)
    server = serve(settings.metrics_port, host, who, registry)
    try:
        yield f"{host}:{server.server_port}" if who is None and host == "127.0.0.1" else ""
    finally:
        server.shutdown()
        server.server_close()
