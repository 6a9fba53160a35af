"""A session is compared with full precision while somebody looks, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from qaq.v1 import inspect_pb2

from qaq_core.models import LoadedModel
from services.common import metrics
from services.worker import inspection, shadows
from services.worker.inspection import Inspector
from services.worker.shadow import Shadow
from tests.services.metric import value
from tests.services.worker.conftest import EXACT, STORY, Ids, MakeScheduler, outcome, request, settled
from tests.services.worker.test_memory_controller import next_token

State = inspect_pb2.Shadow.State


@pytest.fixture(autouse=True)
def looks_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views take no share of the worker's time, and comparisons all of it."""
    monkeypatch.setattr(inspection, "SHARE", 1)
    monkeypatch.setattr(shadows, "SHARE", 1)


def asked(session: str = "s", tokens: int = 1) -> inspect_pb2.InspectRequest:
    options = inspect_pb2.ViewOptions(tokens=tokens, columns=1, shadow=True)
    return inspect_pb2.InspectRequest(session_id=session, tenant="t", known_text=-1, options=options)


async def seen(inspector: Inspector, holds: Callable[[Any], bool], session: str = "s") -> Any:
    """The first comparison of which something holds."""
    while not holds(shadow := (await inspector.view(asked(session))).shadow):  # noqa: ASYNC110 (it is asked)
        await asyncio.sleep(0.01)
    return shadow


async def test_a_squeezed_cache_is_further_from_full_precision(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids
) -> None:
    async with make_scheduler() as scheduler:
        inspector = Inspector(scheduler, smollm2, 4096)
        before = value(metrics.shadow_tokens)
        running = scheduler.submit(request(ids(STORY * 8), 3000, session_id="s", tenant="t", keep=True))
        await next_token(running)
        full = await seen(inspector, lambda shadow: shadow.compared >= 64)
        assert full.state == State.STATE_COMPARING
        assert full.kv_bytes > 0
        assert full.kl_max >= full.kl_mean > 0
        assert 0 < full.same_top <= full.compared
        assert len(full.positions) == len(full.kl) == len(full.same) == min(full.compared, 256)
        assert value(metrics.shadow_tokens) > before
        floor = inspect_pb2.SetFloorRequest(session_id="s", tenant="t", target_bits=0.5)
        await inspector.set_floor(floor)
        await seen(inspector, lambda shadow: shadow.kl_recent > 3 * full.kl_mean)
        scheduler.cancel(running.call)
        await settled(scheduler, running=0)
        # Between two turns it computes what is left, and tells it as long as somebody asks.
        rest = await seen(inspector, lambda shadow: shadow.cached == shadow.positions[-1] + 1)
        assert rest.state == State.STATE_COMPARING


async def test_an_exact_cache_is_no_distance_away(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids
) -> None:
    async with make_scheduler(speculative_tokens=4) as scheduler:
        inspector = Inspector(scheduler, smollm2, 4096)
        running = scheduler.submit(request(ids(STORY * 4), 3000, session_id="s", tenant="t", cache=EXACT))
        await next_token(running)
        same = await seen(inspector, lambda shadow: shadow.compared >= 40)
        assert same.kl_max < 1e-4
        assert same.same_top == same.compared
        scheduler.cancel(running.call)


async def test_one_at_a_time_for_as_long_as_somebody_looks(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadows, "LEASE_S", 0.5)
    async with make_scheduler() as scheduler:
        inspector = Inspector(scheduler, smollm2, 4096)
        for name in ("s", "other"):
            await outcome(scheduler.submit(request(ids(STORY), 3, session_id=name, tenant="t", keep=True)))
        await settled(scheduler, running=0)
        await seen(inspector, lambda shadow: shadow.cached > 0)
        one = next(s for s in scheduler.sessions.idle if s.shadow is not None)
        assert (await inspector.view(asked("other"))).shadow.state == State.STATE_BUSY
        await seen(inspector, lambda shadow: shadow.state != State.STATE_BUSY, "other")
        assert one.shadow is None
        # One at rest gives way.
        monkeypatch.setattr(shadows, "LEASE_S", 1000.0)
        monkeypatch.setattr(shadows, "AT_REST_S", 0.2)
        await seen(inspector, lambda shadow: shadow.cached > 0, "other")
        await seen(inspector, lambda shadow: shadow.cached > 0)
        # A look without a comparison begins none.
        view = await inspector.view(inspect_pb2.InspectRequest(session_id="s", tenant="t"))
        assert not view.HasField("shadow")


async def test_what_cannot_be_compared_says_why(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_scheduler() as scheduler:
        asks = request(ids(STORY), 3, session_id="s", tenant="t", keep=True)
        await outcome(scheduler.submit(asks))
        await outcome(scheduler.submit(request(ids("Hello"), 3, session_id="short", tenant="t", keep=True)))
        for most in (0, len(asks.token_ids)):
            inspector = Inspector(scheduler, smollm2, most)
            for _ in range(3):
                assert (await inspector.view(asked())).shadow.state == State.STATE_TOO_LONG
            short = (await inspector.view(asked("short"))).shadow  # it has the place
            assert short.state == (State.STATE_CATCHING_UP if most else State.STATE_TOO_LONG)

        def fails(self: Shadow, tokens: Any, flush: bool) -> int:
            self.failed = "no memory"
            return 0

        monkeypatch.setattr(Shadow, "step", fails)
        inspector = Inspector(scheduler, smollm2, 4096)
        await seen(inspector, lambda shadow: shadow.state == State.STATE_FAILED)
        monkeypatch.undo()
        assert (await inspector.view(asked())).shadow.state == State.STATE_FAILED  # it is not tried again at once
        await seen(inspector, lambda shadow: shadow.cached > 0, "short")
        more = request([*ids(STORY)] * 2, 3, session_id="s", tenant="t", keep=True)
        assert (await outcome(scheduler.submit(more))).tokens  # the session goes on
