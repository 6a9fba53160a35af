"""Settings, logs, metrics and the background loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import urllib.request
from concurrent.futures import Future

import pytest
import structlog
from pydantic import ValidationError

from services.common import background, log, metrics
from services.common.background import BackgroundLoop
from services.common.embedded_redis import free_port
from services.common.settings import OriginalsSettings, RouterSettings, WorkerSettings


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_REDIS_URL", "redis://:word@host:1/0")
    monkeypatch.setenv("QAQ_MODEL", "smollm2")
    monkeypatch.setenv("QAQ_TARGET_BITS", "2.5")
    settings = WorkerSettings()  # type: ignore[call-arg]
    assert settings.redis_url.get_secret_value() == "redis://:word@host:1/0"
    assert (settings.model, settings.target_bits, settings.host) == ("smollm2", 2.5, "127.0.0.1")
    assert "word" not in repr(settings)
    assert RouterSettings().port == 7700  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "bad", [{"port": 70_000}, {"target_bits": 0.0}, {"model": ""}, {"dtype": "int8"}, {"kv_budget_bytes": 0}]
)
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        WorkerSettings(**({"model": "m"} | bad))  # type: ignore[arg-type]


def test_pages_must_outlive_the_touches() -> None:
    with pytest.raises(ValidationError, match="page_ttl_s"):
        OriginalsSettings(page_ttl_s=10)


def test_once() -> None:
    assert log.once("a test's key")
    assert not log.once("a test's key")
    assert log.once("another key of a test")


def test_once_knows_the_last_keys_alone() -> None:
    for number in range(2 * log.MAX_SEEN):
        assert log.once(f"page {number}")
        assert not log.once("page 0")  # what comes again and again stays known
    assert len(log._seen) == log.MAX_SEEN


def test_logs_are_json_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        log.configure("info")
        structlog.get_logger().debug("not shown")
        structlog.get_logger().info("shown", pages=3)
        (line,) = capsys.readouterr().err.splitlines()
        assert json.loads(line)["event"] == "shown"
        assert json.loads(line)["pages"] == 3
    finally:
        structlog.reset_defaults()


def test_metrics_are_served() -> None:
    port = free_port()
    metrics.serve(port)
    metrics.originals_corrupt.inc()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    for name in ("qaq_originals_corrupt_total", "TYPE qaq_kv_bits gauge", "qaq_kv_lambda", "qaq_pages_unacked"):
        assert name in text


def test_a_port_of_metrics_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(metrics.MetricsPortError, match=f"127.0.0.1:{port} .*choose another --metrics-port"):
            metrics.serve(port)


def test_background_work_that_swallows_a_cancel_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CANCEL_AGAIN_S", 0.01)
    loop = BackgroundLoop("test", lambda: RuntimeError("closed"))
    begun = threading.Event()

    async def stubborn() -> None:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    async def clean_up() -> None:
        cleaned.append("up")

    cleaned: list[str] = []
    work = loop.submit(stubborn())
    assert begun.wait(10)
    loop.close(clean_up)
    with pytest.raises(RuntimeError, match="closed"):
        work.result(0)
    assert cleaned == ["up"]


def test_background_work_ends_with_the_loop() -> None:
    loop = BackgroundLoop("test", lambda: RuntimeError("closed"))
    cleaned: list[str] = []

    async def answer() -> int:
        return 7

    async def forever() -> None:
        await asyncio.Event().wait()

    async def clean_up() -> None:
        cleaned.append("yes")

    assert loop.submit(answer()).result(10) == 7
    running: list[Future[None]] = [loop.submit(forever()) for _ in range(20)]
    loop.close(clean_up)
    loop.close(clean_up)
    assert cleaned == ["yes"]
    for future in [*running, loop.submit(forever())]:
        with pytest.raises(RuntimeError, match="closed"):
            future.result(10)
