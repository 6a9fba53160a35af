"""The phases of `qaq bench serve`, a load test of a stack."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, SecretStr
from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc

from qaq_eval.serving import figures
from qaq_eval.serving.arrivals import Arrival, Script
from qaq_eval.serving.figures import Percentiles
from qaq_eval.serving.load import Load, Prompts, Record
from qaq_eval.serving.probe import Probe
from services.common.channel import open_channel
from services.common.identity import Identity
from services.common.keys import WithMetadata, authorization
from services.common.redis import connect

Report = Callable[[str, float | None], None]

_ROUNDS = 4
_WARM = 0.2  # share of the sessions opened before memory is first measured


class RouterCost(BaseModel):
    """The latency that a router adds to one stream, from medians with and without it.

    Attributes:
        way_ms: added between the sampling of a token and its arrival at the client.
        inside_ms: the part from the token's arrival in the router until gRPC has accepted it for the client, as the
            router measures it.
    """

    way_ms: float
    inside_ms: float | None


class Streams(BaseModel):
    """Equal concurrent streams, against one alone.

    Attributes:
        slowest_to_median: mean time per token of the slowest stream over that of the median stream.
    """

    streams: int
    tokens_per_second: float
    tokens_per_second_alone: float
    ratio: float
    slowest_to_median: float | None


class ConstraintCost(BaseModel):
    """What a constraint adds to the time between tokens: equal streams without and with it, in turn.

    Attributes:
        free_ms, constrained_ms: mean milliseconds between the tokens of a stream, one number per round.
        ratio: median over the rounds of constrained_ms / free_ms.
    """

    free_ms: list[float]
    constrained_ms: list[float]
    ratio: float


class Growth(BaseModel):
    """Resident bytes of one process while sessions are opened, used and closed."""

    process: str
    warm: int
    end: int
    bytes_per_session: float


class Memory(BaseModel):
    """`warm_sessions` were closed before `Growth.warm` was measured, `sessions` before `Growth.end`."""

    sessions: int
    warm_sessions: int
    processes: list[Growth]


class ServeResult(BaseModel):
    """The object of `--json`, see qaq_eval/schemas/bench_serve.json.

    The first fields describe the mix or the trace. Fields that need the stack's Redis are None without it.
    """

    clients: int | None
    sessions: int
    requests: int
    errors: dict[str, int]
    tokens_per_second: float
    ttft_ms: Percentiles
    itl_ms: Percentiles
    router: RouterCost | None
    kv_bytes_peak: int | None
    sessions_per_gb: float | None
    streams: Streams | None
    constraint: ConstraintCost | None = None
    memory: Memory | None


@dataclass(frozen=True)
class Plan:
    """The phases to run.

    Attributes:
        scripts: the requests; sent by `clients` in a closed loop, or at their own times if `clients` is None.
        streams: number of equal concurrent streams; 0 skips the phase.
        memory_sessions: number of sessions to open and close; 0 skips the phase.
        cache: CacheParams.
        regex: a constraint whose cost is measured on the equal streams, or "". Its text must not be able to end before
            `stream_tokens`.
    """

    scripts: Sequence[Script]
    clients: int | None
    streams: int
    stream_tokens: int
    memory_sessions: int
    cache: dict[str, Any]
    seed: int
    regex: str = ""


async def measure(
    router: str,
    redis_url: SecretStr | None,
    plan: Plan,
    report: Report,
    who: Identity | None = None,
    key: str = "",
) -> ServeResult:
    """Runs all phases against a stack.

    Args:
        router: host:port.
        redis_url: the stack's Redis, if it can be reached.
        who: calls router and workers, so its role must be router where TLS is on; None without TLS.
        key: of the caller; empty sends none.
    Raises:
        grpc.aio.AioRpcError: the router does not answer.
    """
    async with open_channel(router, who, "router") as channel, _probe(redis_url, who) as probe:
        stub = WithMetadata(generate_pb2_grpc.InferenceStub(channel), authorization(key))
        await stub.GetModel(generate_pb2.GetModelRequest(), timeout=30)
        bench = _Bench(stub, await Prompts.load(stub, plan.seed), probe, plan)
        report("warm-up", None)
        await bench.streams(1)
        report("latency of the router", 0.1)
        cost = await bench.router()
        report(f"{plan.streams} concurrent streams", 0.2)
        streams = await bench.together()
        report("cost of a constraint", 0.3)
        constraint = await bench.constraint()
        report("requests", 0.4)
        load = await bench.load()
        report("memory over sessions", 0.8)
        memory = await bench.memory()
    records = load.records
    failed = [record.error for record in records if record.error]
    peak = probe.kv_bytes_peak if probe else None
    return ServeResult(
        clients=plan.clients,
        sessions=load.sessions,
        requests=len(records),
        errors={name: failed.count(name) for name in sorted(set(failed))},
        tokens_per_second=figures.tokens_per_second(records),
        ttft_ms=figures.first_tokens(records),
        itl_ms=figures.between_tokens(records),
        router=cost,
        kv_bytes_peak=peak,
        sessions_per_gb=probe.sessions_at_peak / peak * 1e9 if probe and peak else None,
        streams=streams,
        constraint=constraint,
        memory=memory,
    )


class _Bench:
    def __init__(self, stub: Any, prompts: Prompts, probe: Probe | None, plan: Plan) -> None:
        self._stub, self._prompts, self._probe, self._plan = stub, prompts, probe, plan

    async def streams(self, count: int, regex: str = "") -> list[Record]:
        """`count` equal concurrent requests."""
        load = Load(self._stub, self._prompts, self._plan.cache, regex)
        arrival = Arrival(prompt_tokens=64, new_tokens=self._plan.stream_tokens)
        await load.closed_loop([[arrival]] * count, count)
        return load.records

    async def router(self) -> RouterCost | None:
        """Streams with and without the router, in turn."""
        if self._probe is None:
            return None
        routed: list[Record] = []
        direct: list[Record] = []
        cache = common_pb2.CacheParams(**self._plan.cache)
        for _ in range(_ROUNDS):
            routed += await self.streams(1)
            direct.append(await self._probe.direct(self._prompts.own(64), self._plan.stream_tokens, cache))
        return RouterCost(way_ms=figures.added_ms(routed, direct), inside_ms=await self._probe.router_ms())

    async def together(self) -> Streams | None:
        if not self._plan.streams:
            return None
        alone = figures.tokens_per_second(await self.streams(1))
        records = await self.streams(self._plan.streams)
        rate = figures.tokens_per_second(records)
        return Streams(
            streams=self._plan.streams,
            tokens_per_second=rate,
            tokens_per_second_alone=alone,
            ratio=rate / alone,
            slowest_to_median=figures.slowest_to_median(records),
        )

    async def constraint(self) -> ConstraintCost | None:
        if not (self._plan.streams and self._plan.regex):
            return None
        await self.streams(1, self._plan.regex)  # the worker compiles it once
        free, constrained = [], []
        for _ in range(_ROUNDS):
            free.append(figures.mean_gap_ms(await self.streams(self._plan.streams)))
            constrained.append(figures.mean_gap_ms(await self.streams(self._plan.streams, self._plan.regex)))
        ratios = [with_it / without for with_it, without in zip(constrained, free, strict=True)]
        return ConstraintCost(free_ms=free, constrained_ms=constrained, ratio=statistics.median(ratios))

    async def load(self) -> Load:
        load = Load(self._stub, self._prompts, self._plan.cache)
        async with self._probe.watching() if self._probe else contextlib.nullcontext():
            if self._plan.clients is None:
                await load.open_loop(self._plan.scripts)
            else:
                await load.closed_loop(self._plan.scripts, self._plan.clients)
        return load

    async def memory(self) -> Memory | None:
        """Resident memory after the first sessions and after all of them."""
        sessions = self._plan.memory_sessions
        if not sessions or self._probe is None:
            return None
        warm = max(1, int(sessions * _WARM))
        await self._open_and_close(warm)
        before = await self._probe.resident()
        await self._open_and_close(sessions - warm)
        after = await self._probe.resident()
        return Memory(
            sessions=sessions,
            warm_sessions=warm,
            processes=[
                Growth(
                    process=name,
                    warm=before[name],
                    end=after[name],
                    bytes_per_session=(after[name] - before[name]) / max(1, sessions - warm),
                )
                for name in sorted(before.keys() & after.keys())
            ],
        )

    async def _open_and_close(self, sessions: int) -> None:
        script = [Arrival(prompt_tokens=48, new_tokens=4, session=f"m{place}") for place in range(sessions)]
        await Load(self._stub, self._prompts, self._plan.cache).closed_loop([[turn] for turn in script], 4)


@contextlib.asynccontextmanager
async def _probe(redis_url: SecretStr | None, who: Identity | None) -> AsyncIterator[Probe | None]:
    if redis_url is None:
        yield None
        return
    redis = connect(redis_url, who)
    try:
        yield Probe(redis, who)
    finally:
        await redis.aclose()
