"""Time of calls to a cache service, from the worker's side: put, fetch, rows that are quantized again.

The service is a process of its own, over a Redis of its own; everything is on one machine. Beside them is what Redis
takes for a value of a page's size alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import redis
import torch

from qaq_core.base.errors import QAQError
from qaq_core.base.pages import Page, PageShape
from qaq_eval.speed.encode import random_quantizer, random_request
from services.common.embedded_redis import EmbeddedRedis
from services.originals.client import RemoteOriginals

ROWS = 64
"""Scattered rows of a request."""
START_S = 120.0


@dataclass(frozen=True)
class CallSpeed:
    """One kind of call, made one after another.

    Attributes:
        call: "put", "fetch": of one page; "rows": `ROWS` rows of as many pages; "redis set", "redis get": of a page's
            bytes, without the service.
        calls: how many. nbytes: of the page or the reply.
    """

    call: str
    calls: int
    nbytes: int
    p50_ms: float
    p99_ms: float


@contextlib.contextmanager
def running_service(form: str = "plain") -> Iterator[tuple[str, str]]:
    """A Redis and a cache service. Yields the URL of the one and the secret of the other.

    Raises:
        QAQError: the service does not serve.
    """
    secret = secrets.token_hex(16)
    with EmbeddedRedis() as server:
        told = {"QAQ_REDIS_URL": server.url, "QAQ_SECRET": secret, "QAQ_PAGE_FORM": form, "QAQ_LOG_LEVEL": "error"}
        command = [sys.executable, "-m", "services.cli", "originals", "--port", "0"]
        process = subprocess.Popen(command, env={**os.environ, **told}, stdout=subprocess.DEVNULL)
        try:
            _await(redis.Redis.from_url(server.url), process)
            yield server.url, secret
        finally:
            process.terminate()
            process.wait(30)


def call_speed(
    url: str,
    client: RemoteOriginals,
    pages: Sequence[Page],
    calls: int,
    report: Callable[[str, float], None] | None = None,
) -> list[CallSpeed]:
    """Times each kind of call.

    Args:
        url: of the service's Redis.
        pages: of one shape, with different ids.
    """
    shape, store = pages[0].shape, redis.Redis.from_url(url)
    generator = torch.Generator().manual_seed(0)
    sizes = shape.layers, shape.kv_heads, shape.head_dim
    quantizer = random_quantizer(*sizes, generator)
    drawn, _ = random_request(quantizer, sizes, len(pages) * shape.tokens, generator)
    rows = drawn.select(np.arange(ROWS))
    numbers = rows.position // shape.tokens
    rows = replace(rows, shape=shape, page_ids={one: pages[one].id for one in np.unique(numbers).tolist()})
    value = pages[0].to_bytes()

    def page(place: int) -> Page:
        return pages[place % len(pages)]

    kinds: dict[str, tuple[Callable[[int], object], int]] = {
        "put": (lambda place: client.put([page(place)]).result(), shape.nbytes),
        "fetch": (lambda place: client.fetch([page(place).id], shape).result(), shape.nbytes),
        "rows": (lambda _: client.requantize(rows, quantizer).result(), int(rows.payload_bytes().sum())),
        "redis set": (lambda _: store.set("qaq:bench", value), shape.nbytes),
        "redis get": (lambda _: store.get("qaq:bench"), shape.nbytes),
    }
    measured = []
    for number, (name, (call, nbytes)) in enumerate(kinds.items()):
        if report is not None:
            report(name, number / len(kinds))
        call(0)  # connections, and the quantizer
        times = [_seconds(call, place) for place in range(calls)]
        p50, p99 = np.percentile(1e3 * np.array(times), [50, 99])
        measured.append(CallSpeed(name, calls, nbytes, float(p50), float(p99)))
    return measured


def made_pages(values: torch.Tensor, count: int) -> list[Page]:
    """So many pages with ids of their own, of keys and values [layers, 2, kv_heads, tokens, head_dim] over and over."""
    layers, _, heads, tokens, dim = values.shape
    shape = PageShape(layers, heads, tokens, dim, str(values.dtype).removeprefix("torch."))
    return [Page(secrets.token_bytes(32), shape, values) for _ in range(count)]


def _seconds(call: Callable[[int], object], place: int) -> float:
    begun = time.perf_counter()
    call(place)
    return time.perf_counter() - begun


def _await(server: redis.Redis, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + START_S
    while not server.smembers("qaq:members:originals"):
        if process.poll() is not None or time.monotonic() > ends:
            raise QAQError("the cache service did not start; see what it says above")
        time.sleep(0.1)
