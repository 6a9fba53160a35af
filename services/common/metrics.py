"""Every Prometheus metric of QAQ, declared once."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, start_http_server

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

# Worker: the cache.
kv_bytes = Gauge("qaq_kv_bytes", "Allocated bytes of caches", ["tier"])
kv_compression_ratio = Gauge("qaq_kv_compression_ratio", "Bytes at 16 bits an element over resident bytes")
kv_bits = Gauge("qaq_kv_bits", "Vectors of that many bits in the cache of the last generation", ["side", "bits"])
kv_lambda = Gauge("qaq_lambda", "Floor of lambda for all caches of the worker; 0 if memory is not short")
preempted = Counter("qaq_preempted_total", "Generations preempted to bring the caches within the budget")
kv_budget_exceeded = Counter(
    "qaq_kv_budget_exceeded_total", "Times that the caches exceeded the budget and no generation could be preempted"
)
exceptions = Counter("qaq_exceptions_total", "Vectors whose predicted need rose above what they hold")

# Originals: both ends.
requantize_seconds = Histogram("qaq_requantize_seconds", "Time of a re-quantization batch", buckets=SECONDS)
requantize_bytes = Counter("qaq_requantize_bytes_total", "Bytes of packed rows in answers")
requantize_failures = Counter("qaq_requantize_failures_total", "Batches skipped because the store failed")
originals_missing = Counter("qaq_originals_missing_total", "Rows whose original was not to be had")
originals_corrupt = Counter("qaq_originals_corrupt_total", "Stored pages that do not match their header or checksum")
pages_unacked = Gauge("qaq_pages_unacked", "Pages handed over that the store has not acknowledged")
put_retries = Counter("qaq_put_retries_total", "Times that a page was sent again")
redis_row_reads = Counter("qaq_redis_row_reads_total", "Rows of originals read from Redis")

# Worker: prompts.
prompt_tokens = Counter(
    "qaq_prompt_tokens_total", "Tokens of prompts, by where their keys and values came from", ["source"]
)
prefix_failures = Counter("qaq_prefix_failures_total", "Stored prefixes that could not be loaded whole")

# Requests.
time_to_first_token_seconds = Histogram(
    "qaq_time_to_first_token_seconds", "From a request to its first token", buckets=(*SECONDS, 60.0, 120.0)
)
inter_token_seconds = Histogram("qaq_inter_token_seconds", "Between one token and the next", buckets=SECONDS)
relay_seconds = Histogram(
    "qaq_relay_seconds",
    "A token in the router: from its arrival from the worker until it is on its way to the client",
    buckets=(0.00005, 0.0001, 0.00015, 0.0002, 0.0003, *SECONDS),
)
resumed = Counter("qaq_resumed_total", "Streams that went on on another worker")
sessions = Gauge("qaq_sessions", "Sessions that hold a cache")
queue_depth = Gauge("qaq_queue_depth", "Requests that wait")
registry_failures = Counter("qaq_registry_failures_total", "Heartbeats or member listings that Redis did not answer")


def serve(port: int | None, host: str = "127.0.0.1") -> None:
    """Serves /metrics on `port` from a daemon thread; None serves nothing."""
    if port is not None:
        start_http_server(port, addr=host)
