"""What a session's cache holds, over HTTP: once, or as server-sent events while it is used. The price of its bits."""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, Iterable
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field, model_validator
from qaq.v1 import common_pb2, inspect_pb2

from services.common.errors import InvalidArgument
from services.common.precision import MAX_COLUMNS, MAX_INTERVAL_S, MAX_TOKENS, MIN_INTERVAL_S, SHADOW_INTERVAL_S
from services.common.routers import Routers
from services.gateway.caller import caller
from services.gateway.calls import ClientGone, events, while_connected
from services.gateway.models import SHORT_DEADLINE_S
from services.gateway.objects import Object
from services.gateway.replies import Json
from services.gateway.wire import CLIENT_CLOSED_REQUEST, JsonRoute

WATCH_DEADLINE_S = 3700.0
"""Longer than a router's watch lasts."""
MAX_EXCEPTIONS = 256
"""Tokens with exceptions that one event names."""

Tokens = Annotated[int, Query(ge=1, le=MAX_TOKENS)]
Columns = Annotated[int, Query(ge=1, le=MAX_COLUMNS)]
Rate = Annotated[float, Query(ge=1 / MAX_INTERVAL_S, le=1 / MIN_INTERVAL_S, description="Events a second, at most.")]
Compare = Annotated[bool, Query(description="Compare with full precision, for as long as it is asked for.")]

_PHASES = {
    inspect_pb2.CacheView.PHASE_IDLE: "idle",
    inspect_pb2.CacheView.PHASE_PREFILL: "prefill",
    inspect_pb2.CacheView.PHASE_DECODE: "decode",
    inspect_pb2.CacheView.PHASE_PREEMPTED: "preempted",
}

_STATES = {
    inspect_pb2.Shadow.STATE_CATCHING_UP: "catching_up",
    inspect_pb2.Shadow.STATE_COMPARING: "comparing",
    inspect_pb2.Shadow.STATE_BUSY: "busy",
    inspect_pb2.Shadow.STATE_TOO_LONG: "too_long",
}


class PrecisionRequest(Object):
    """The least price of a bit: as λ, or as the bits that it should leave; neither is none."""

    lambda_floor: float | None = None
    target_bits: float | None = None

    @model_validator(mode="after")
    def _one(self) -> PrecisionRequest:
        if self.lambda_floor is not None and self.target_bits is not None:
            raise InvalidArgument("both lambda_floor and target_bits are set; send one of them")
        return self


class BudgetRequest(Object):
    """0 is what the worker was started with."""

    kv_budget_bytes: Annotated[int, Field(ge=0, lt=1 << 62)]


def routes(routers: Routers) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.get("/v1/sessions/{session_id}/cache")
    async def cache(
        session_id: str, request: Request, tokens: Tokens = 1024, columns: Columns = 64, shadow: Compare = False
    ) -> Json:
        asked = inspect_pb2.InspectCacheRequest(session_id=session_id, options=_options(tokens, columns, shadow))
        async with routers.inspector() as stub:
            return Told().json(await stub.InspectCache(asked, timeout=SHORT_DEADLINE_S, metadata=caller(request)))

    @router.get("/v1/sessions/{session_id}/cache/events", response_model=None)
    async def watch(
        session_id: str,
        request: Request,
        tokens: Tokens = 1024,
        columns: Columns = 64,
        rate: Rate = 4,
        shadow: Compare = False,
    ) -> Response:
        if shadow and rate < 1 / SHADOW_INTERVAL_S:
            raise InvalidArgument(f"rate is {rate:g}; with shadow send at least {1 / SHADOW_INTERVAL_S:g}")
        options = _options(tokens, columns, shadow)
        asked = inspect_pb2.WatchCacheRequest(session_id=session_id, options=options, interval_s=1 / rate)
        metadata, told = caller(request), Told()

        async def reports() -> AsyncGenerator[Json, None]:
            async with routers.inspector() as stub:
                call = stub.WatchCache(asked, timeout=WATCH_DEADLINE_S, metadata=metadata)
                try:
                    async for report in call:
                        yield told.json(report)
                finally:
                    call.cancel()

        try:
            return await while_connected(request, events(reports()))
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    @router.put("/v1/sessions/{session_id}/cache")
    async def price(session_id: str, request: Request, body: PrecisionRequest) -> Json:
        asked = inspect_pb2.SetPrecisionRequest(
            session_id=session_id, lambda_floor=body.lambda_floor, target_bits=body.target_bits
        )
        async with routers.inspector() as stub:
            reply = await stub.SetPrecision(asked, timeout=SHORT_DEADLINE_S, metadata=caller(request))
        return {"id": session_id, "object": "session.precision", "lambda_floor": reply.lambda_floor}

    @router.get("/v1/workers")
    async def workers(request: Request) -> Json:
        async with routers.inspector() as stub:
            asked = inspect_pb2.ListWorkersRequest()
            reply = await stub.ListWorkers(asked, timeout=SHORT_DEADLINE_S, metadata=caller(request))
        return {"object": "list", "data": [_worker(each) for each in reply.workers]}

    @router.put("/v1/workers/{name}")
    async def budget(name: str, request: Request, body: BudgetRequest) -> Json:
        asked = inspect_pb2.SetWorkerBudgetRequest(worker=name, kv_budget_bytes=body.kv_budget_bytes)
        async with routers.inspector() as stub:
            await stub.SetWorkerBudget(asked, timeout=SHORT_DEADLINE_S, metadata=caller(request))
        return {"id": name, "object": "worker.budget", "kv_budget_bytes": body.kv_budget_bytes}

    return router


class Told:
    """Turns reports on one cache into JSON. Remembers what the last one said, for what has happened since."""

    def __init__(self) -> None:
        self._first, self._worker, self._stats = 0, "", common_pb2.CacheStats()
        self._asked: list[int] = []
        self._answered: list[int] = []
        self._decoder, self._decoded = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def json(self, report: inspect_pb2.CacheReport) -> Json:
        told: Json = {
            "id": report.session_id,
            "object": "session.cache",
            "worker": report.worker or None,
            "moves": report.moves,
            "unreachable": report.unreachable,
            "cache": None,
        }
        if report.HasField("view"):
            told["cache"] = self._view(report.view, report.worker)
        return told

    def _view(self, view: inspect_pb2.CacheView, worker: str) -> Json:
        since = self._since(view, worker)
        return {
            "phase": _PHASES.get(view.phase, "idle"),
            "cached": view.cached,
            "total": view.total,
            "exact_before": view.exact_before,
            "exact_from": view.exact_from,
            "first": view.first,
            "key_bits": _rounded(view.key_bits, 2),
            "value_bits": _rounded(view.value_bits, 2),
            "attention": [float(f"{value:.3g}") for value in view.attention],
            "requantized": list(view.answered),
            "grid": {
                "layers": view.layers,
                "columns": view.columns,
                "key_eighths": list(view.key_grid),
                "value_eighths": list(view.value_grid),
            },
            "text": {"first": view.text_first, "tokens": self._text(view)},
            "since": since,
            "bytes": {
                "resident": view.stats.kv_bytes,
                "fp16": view.stats.kv_bytes_fp16,
                "staging": view.stats.staging_bytes,
                "worker": view.worker_kv_bytes,
                "worker_budget": view.worker_budget_bytes or None,
            },
            "counts": _counts(view.stats),
            "price": {
                "elastic": view.price.elastic,
                "lambda": getattr(view.price, "lambda"),
                "own": view.price.own,
                "session_floor": view.price.session_floor,
                "worker_floor": view.price.worker_floor,
                "recovering": view.price.recovering,
                "bits": round(view.price.bits, 3),
                "own_bits": round(view.price.own_bits, 3),
            },
            "shadow": _shadow(view.shadow) if view.HasField("shadow") else None,
        }

    def _since(self, view: inspect_pb2.CacheView, worker: str) -> Json:
        """The exceptions since the last report: tokens with the number of their vectors. Counts begin anew with another
        cache."""
        before = self._stats if worker == self._worker else view.stats
        known = worker == self._worker
        since: Json = {
            name: max(0, count - _counts(before)[name]) if known else 0 for name, count in _counts(view.stats).items()
        }
        for name, now, last in (("asked_at", view.asked, self._asked), ("answered_at", view.answered, self._answered)):
            shift = view.first - self._first
            changed = []
            for place, count in enumerate(now if known else ()):
                if count and (more := count - (last[place + shift] if 0 <= place + shift < len(last) else 0)) > 0:
                    changed.append([view.first + place, more])
            since[name] = changed[-MAX_EXCEPTIONS:]
        self._first, self._worker, self._stats = view.first, worker, view.stats
        self._asked, self._answered = list(view.asked), list(view.answered)
        return since

    def _text(self, view: inspect_pb2.CacheView) -> list[Json]:
        """Each token with the text that became certain with it: a character of several tokens belongs to the last."""
        if view.text_first != self._decoded:
            self._decoder.reset()
        self._decoded = view.text_first + len(view.text)
        told = []
        for token in view.text:
            if token.special:
                self._decoder.reset()
            text = self._decoder.decode(token.bytes, final=token.special)
            told.append({"id": token.token_id, "text": text, "special": token.special})
        return told


def _options(tokens: int, columns: int, shadow: bool) -> inspect_pb2.ViewOptions:
    return inspect_pb2.ViewOptions(tokens=tokens, columns=columns, shadow=shadow)


def _shadow(shadow: inspect_pb2.Shadow) -> Json:
    return {
        "state": _STATES.get(shadow.state, "failed"),
        "cached": shadow.cached,
        "kv_bytes": shadow.kv_bytes,
        "compared": shadow.compared,
        "missed": shadow.missed,
        "kl_mean": shadow.kl_mean,
        "kl_recent": shadow.kl_recent,
        "kl_max": shadow.kl_max,
        "same_top": shadow.same_top,
        "same_top_recent": shadow.same_top_recent,
        "positions": list(shadow.positions),
        "kl": [float(f"{value:.3g}") for value in shadow.kl],
        "same": list(shadow.same),
    }


def _counts(stats: common_pb2.CacheStats) -> dict[str, int]:
    return {
        "exceptions": stats.exceptions,
        "requantized": stats.rows_requantized,
        "narrowed": stats.rows_narrowed,
        "missing": stats.originals_missing,
        "fetched_bytes": stats.requantize_bytes,
    }


def _rounded(values: Iterable[float], digits: int) -> list[float]:
    return [round(value, digits) for value in values]


def _worker(each: inspect_pb2.WorkerInfo) -> Json:
    return {
        "id": each.address,
        "object": "worker",
        "model": each.model,
        "running": each.running,
        "waiting": each.waiting,
        "sessions": each.sessions,
        "max_sequences": each.max_sequences,
        "kv_bytes": each.kv_bytes,
        "kv_budget_bytes": each.kv_budget_bytes or None,
        "lambda_floor": each.lambda_floor,
    }
