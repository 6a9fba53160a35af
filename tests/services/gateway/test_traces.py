"""One call is one trace, from the gateway to the cache service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from services.common import metrics, trace_export, tracing
from services.common.embedded_redis import EmbeddedRedis
from tests.services.collector import Collector, Kept, running_collector
from tests.services.metric import value

from .conftest import Served, running_stack

# Longer than what is computed again of a stored prompt.
PROMPT = "The keeper of the xylophone lighthouse lit the lamp and wrote the weather in his book. " * 12
TRACES = ["0af7651916cd43dd8448eb211c80319c", "1af7651916cd43dd8448eb211c80319c"]
CLIENT = "b7ad6b7169203331"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    for collector, url in running_collector():
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        yield collector
        collector.gate.set()
        tracing.shut_down()


@pytest.fixture
async def traced(
    collector: Collector, redis: Redis, redis_server: EmbeddedRedis, shallow_smollm2: LoadedModel, model_path: Path
) -> AsyncIterator[Served]:
    async with running_stack(redis_server, shallow_smollm2, model_path) as stack:
        yield stack


async def complete(stack: Served, trace: str = TRACES[0], model: str = "") -> int:
    """Status of a completion of 4 tokens."""
    body = {"model": model or stack.model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    headers = {"traceparent": f"00-{trace}-{CLIENT}-01", "x-request-id": "request-7"}
    async with httpx2.AsyncClient(base_url=stack.url, timeout=120) as client:
        return (await client.post("/v1/completions", json=body, headers=headers)).status_code


async def test_one_call_is_one_trace_over_every_role(collector: Collector, traced: Served) -> None:
    assert await complete(traced, TRACES[0]) == 200
    assert await complete(traced, TRACES[1]) == 200  # whose prompt is in the store
    await tracing.flush()
    spans = collector.spans
    assert {span.trace for span in spans} == {*TRACES}  # heartbeats and health checks begin none
    of = {trace: [span for span in spans if span.trace == trace] for trace in TRACES}
    for trace in of.values():
        by_id = {span.id: span for span in trace}
        assert {span.parent for span in trace} - by_id.keys() == {CLIENT}

        def parents(name: str, trace: list[Kept] = trace, by_id: dict[str, Kept] = by_id) -> set[str]:
            return {by_id[span.parent].name for span in trace if span.name == name}

        assert parents("Inference/Generate") == {"POST"}
        assert parents("run") == {"Inference/Generate"}
        assert parents("Worker/Run") == {"run"}
        for child in ("queue", "prefill", "decode"):
            assert parents(child) == {"Worker/Run"}
    assert any(span.name == "Originals/Put" for span in of[TRACES[0]])
    assert any(span.name == "Originals/Fetch" for span in of[TRACES[1]])
    _have_ids_and_counts(collector, of[TRACES[0]])


def _have_ids_and_counts(collector: Collector, spans: list[Kept]) -> None:
    """And no text of the prompt."""
    decode, prefill, run, asked, http = (
        next(span for span in spans if span.name == name)
        for name in ("decode", "prefill", "Worker/Run", "Inference/Generate", "POST")
    )
    assert decode.attributes["gen_ai.usage.output_tokens"] == 4
    assert decode.attributes["qaq.finish_reason"] == "FINISH_REASON_LENGTH"
    assert prefill.attributes["gen_ai.usage.input_tokens"] > 100
    assert run.attributes["qaq.request"] == "request-7"
    assert run.attributes["qaq.session"] == asked.attributes["qaq.session"]
    assert http.attributes["http.route"] == "/v1/completions"
    assert run.seconds >= prefill.seconds + decode.seconds > 0
    assert not any(b"xylophone" in raw for raw in collector.raw)


async def test_a_collector_that_does_not_answer_delays_nothing(
    collector: Collector, traced: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector.gate.clear()
    monkeypatch.setattr(trace_export, "QUEUE", 5)
    before = value(metrics.spans_lost)
    assert await complete(traced) == 200
    await tracing.flush(timeout_s=0.05)
    assert await complete(traced) == 200  # while the collector has the first spans and keeps them
    assert collector.spans == []
    assert value(metrics.spans_lost) > before
    collector.gate.set()
