"""Views of a worker's caches while it decodes, and prices that callers set."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from qaq.v1 import inspect_pb2

from qaq_core.models import LoadedModel
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from services.worker import inspection
from services.worker.inspection import Inspector
from services.worker.scheduler.scheduler import Scheduler
from tests.services.worker.conftest import EXACT, STORY, Ids, MakeScheduler, outcome, request, settled
from tests.services.worker.test_memory_controller import decoding

View = inspect_pb2.CacheView


def asked(session: str = "s", **fields: Any) -> inspect_pb2.InspectRequest:
    return inspect_pb2.InspectRequest(session_id=session, tenant="t", **fields)


async def until_recovered(inspector: Inspector) -> View:
    """The first view, as a watcher gets them, in which no row waits for the bits that a price took."""
    for _ in range(200):
        view = await inspector.view(asked(known_text=-1))
        if not view.price.recovering:
            return view
    raise AssertionError(view.price)


async def test_a_session_is_seen_while_it_decodes_and_when_it_rests(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids
) -> None:
    tokens = ids(STORY * 8)
    async with make_scheduler() as scheduler:
        inspector = Inspector(scheduler, smollm2)
        with pytest.raises(NotFound):
            await inspector.view(asked())
        running = scheduler.submit(request(tokens, 3000, session_id="s", tenant="t", keep=True))
        await decoding(running)
        view = await inspector.view(asked(options=inspect_pb2.ViewOptions(tokens=4096, columns=16)))
        assert view.phase == View.PHASE_DECODE
        assert view.cached >= len(tokens)
        assert view.total >= view.cached
        assert (view.first, view.text_first, len(view.text)) == (0, 0, view.total)
        assert [token.token_id for token in view.text[: len(tokens)]] == tokens
        assert b"".join(token.bytes for token in view.text[: len(tokens)]).decode() == STORY * 8
        assert len(view.key_bits) == len(view.value_bits) == len(view.attention) == view.cached
        assert set(view.key_bits[: view.exact_before]) == set(view.key_bits[view.exact_from :]) == {16}
        assert max(view.key_bits[view.exact_before : view.exact_from]) < 16
        assert (view.layers, view.columns, len(view.key_grid)) == (6, 16, 6 * 16)
        assert view.stats.kv_bytes < view.stats.kv_bytes_fp16
        assert view.price.elastic
        assert view.price.own > 0
        assert view.worker_kv_bytes == view.stats.kv_bytes  # its only cache
        assert not view.worker_budget_bytes
        later = await inspector.view(asked(known_text=view.total, options=inspect_pb2.ViewOptions(tokens=8)))
        assert later.first == later.cached - 8
        assert len(later.key_bits) == 8
        assert later.text_first + len(later.text) == later.total
        assert not (await inspector.view(asked(known_text=-1))).text
        scheduler.cancel(running.call)
        await settled(scheduler, running=0)
        assert (await inspector.view(asked())).phase == View.PHASE_IDLE
        for other in (asked("other"), inspect_pb2.InspectRequest(session_id="s", tenant="another")):
            with pytest.raises(NotFound):
                await inspector.view(other)


async def test_a_price_takes_bits_and_gives_them_back_between_two_turns(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids
) -> None:
    async with make_scheduler() as scheduler:
        inspector = Inspector(scheduler, smollm2)
        floor = inspect_pb2.SetFloorRequest
        with pytest.raises(NotFound):
            await inspector.set_floor(floor(session_id="s", tenant="t", lambda_floor=1))
        await outcome(scheduler.submit(request(ids(STORY * 8), 3, session_id="s", tenant="t", keep=True)))
        await settled(scheduler, running=0)
        before = await inspector.view(asked())
        half = before.price.bits / 2
        lam = await inspector.set_floor(floor(session_id="s", tenant="t", target_bits=half))
        squeezed = await inspector.view(asked())
        assert lam == squeezed.price.session_floor > before.price.own
        assert squeezed.price.bits <= 1.1 * half
        assert squeezed.price.own_bits > 0.8 * before.price.bits
        assert squeezed.stats.kv_bytes < before.stats.kv_bytes
        assert await inspector.set_floor(floor(session_id="s", tenant="t")) == 0
        recovered = await until_recovered(inspector)
        assert recovered.price.bits > 0.9 * before.price.bits
        assert sum(recovered.answered) == recovered.stats.rows_requantized > 0
        # It holds in the next turn, too, which says it.
        again = request([*ids(STORY * 8)] * 2, 3, session_id="s", tenant="t", keep=True, lambda_floor=lam)
        await outcome(scheduler.submit(again))
        await settled(scheduler, running=0)
        view = await inspector.view(asked())
        assert getattr(view.price, "lambda") == view.price.session_floor == lam


async def test_what_cannot_be_priced_or_shown_is_said(
    make_scheduler: MakeScheduler, smollm2: LoadedModel, ids: Ids
) -> None:
    async with make_scheduler(kv_budget_bytes=1 << 30) as scheduler:
        inspector = Inspector(scheduler, smollm2)
        await outcome(scheduler.submit(request(ids(STORY), 1, session_id="s", tenant="t", keep=True, cache=EXACT)))
        floor = inspect_pb2.SetFloorRequest
        with pytest.raises(FailedPrecondition, match="balanced"):
            await inspector.set_floor(floor(session_id="s", tenant="t", lambda_floor=1))
        await outcome(scheduler.submit(request(ids("Hello"), 1, session_id="short", tenant="t", keep=True)))
        with pytest.raises(FailedPrecondition, match="nothing is packed"):
            await inspector.set_floor(floor(session_id="short", tenant="t", target_bits=2))
        for wrong in (
            {"lambda_floor": -1.0},
            {"lambda_floor": float("nan")},
            {"target_bits": 0.1},
            {"target_bits": 17},
        ):
            with pytest.raises(InvalidArgument, match=next(iter(wrong))):
                await inspector.set_floor(floor(session_id="s", tenant="t", **wrong))
        with pytest.raises(InvalidArgument, match="lambda_floor"):
            scheduler.submit(request(ids(STORY), 1, lambda_floor=float("inf")))
        for options in ({"tokens": 5000}, {"tokens": -1}, {"columns": 257}):
            with pytest.raises(InvalidArgument, match=next(iter(options))):
                await inspector.view(asked(options=inspect_pb2.ViewOptions(**options)))
        with pytest.raises(InvalidArgument, match="kv_budget_bytes"):
            inspector.set_budget(1)
        inspector.set_budget(2 << 20)
        assert scheduler.budget == 2 << 20
        inspector.set_budget(0)
        assert scheduler.budget == 1 << 30


class Working:
    """In place of a scheduler: does at once what is asked, or never."""

    budget = None

    def __init__(self, at_once: bool) -> None:
        self.at_once, self.began = at_once, 0

    def between_steps(self, work: Any) -> Any:
        from concurrent.futures import Future

        self.began += 1
        done: Future[Any] = Future()
        if self.at_once:
            done.set_result((View(), 0.01))
        return done


async def test_views_keep_to_their_share_of_the_time(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def noted(seconds: float) -> None:
        waits.append(seconds)

    inspector = Inspector(Working(at_once=True), smollm2)  # type: ignore[arg-type]
    monkeypatch.setattr(inspection.asyncio, "sleep", noted)
    await inspector.view(asked())
    await inspector.view(asked())
    assert waits[0] <= 0
    assert 0.3 < waits[1] <= 0.01 * 49


async def test_views_that_wait_are_bounded_and_end_with_their_callers(smollm2: LoadedModel) -> None:
    working = Working(at_once=False)
    inspector = Inspector(working, smollm2)  # type: ignore[arg-type]
    waiting = [asyncio.create_task(inspector.view(asked())) for _ in range(inspection.MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted):
        await inspector.view(asked())
    assert working.began <= 1
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    again = asyncio.create_task(inspector.view(asked()))
    await asyncio.sleep(0.01)
    assert not again.done()  # there is room again
    again.cancel()


async def test_an_error_between_steps_is_its_callers(make_scheduler: MakeScheduler, ids: Ids) -> None:
    def fail() -> None:
        raise ValueError("mine")

    async with make_scheduler() as scheduler:
        assert isinstance(scheduler, Scheduler)
        with pytest.raises(ValueError, match="mine"):
            await asyncio.wrap_future(scheduler.between_steps(fail))
        assert (await outcome(scheduler.submit(request(ids("Hello"), 2)))).tokens
