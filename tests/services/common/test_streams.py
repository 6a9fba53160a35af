"""A stream whose router breaks goes on with another one; each token comes once."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import pytest
from qaq.v1 import generate_pb2

from services.common import streams
from services.common.errors import Unavailable
from services.common.routers import Routers, named
from services.common.streams import Stream
from tests.services.common.routing import NEW, TEXT, Foreseen, serving


async def text(routers: Sequence[Foreseen], choices: int = 1, deadline_s: float = 60.0) -> str:
    """What a stream says, asked of the routers in this order."""
    reached = Routers(named(",".join(router.address for router in routers)))
    request = generate_pb2.GenerateRequest(prompt="x", choices=choices)
    said = [reply async for reply in Stream(reached, request, deadline_s, ())]
    await reached.close()
    return "".join(reply.token.text + reply.finished.text for reply in said)


@pytest.mark.parametrize("at", [1, 4, NEW - 1])
async def test_the_rest_comes_from_the_next_router(at: int) -> None:
    async with serving(Foreseen(breaks_at=at)) as one, serving(Foreseen()) as other:
        assert await text([one, other]) == TEXT
        assert (one.generated, one.received) == (1, [])
        assert (other.generated, other.received) == (0, [("s", at)])


async def test_it_moves_as_often_as_routers_break() -> None:
    async with serving(Foreseen(breaks_at=2)) as one, serving(Foreseen(breaks_at=5)) as other:
        assert await text([one, other]) == TEXT
        assert (other.received, one.received) == ([("s", 2)], [("s", 5)])


async def test_a_router_that_comes_back_goes_on() -> None:
    async with serving(Foreseen(breaks_at=3, times=3)) as one:
        assert await text([one]) == TEXT
        assert one.received == [("s", 3)] * 3


async def test_without_another_it_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PATIENCE_S", 1.0)
    async with serving(Foreseen(breaks_at=4)) as one, serving(Foreseen(breaks_at=4)) as other:
        with pytest.raises(Unavailable, match="went away after 4 tokens, and no other has continued session s"):
            await text([one, other])
        assert {asked for router in (one, other) for asked in router.received} == {("s", 4)}
        assert len(one.received + other.received) > 1


async def test_patience_ends_with_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PATIENCE_S", 1e9)
    async with serving(Foreseen(breaks_at=4)) as one:
        with pytest.raises((Unavailable, grpc.aio.AioRpcError)):
            await text([one], deadline_s=1.0)


@pytest.mark.parametrize(("at", "refuses", "choices"), [(0, False, 1), (4, True, 1), (4, False, 2)])
async def test_what_is_not_taken_up(at: int, refuses: bool, choices: int) -> None:
    """One that has not begun may be sent again as it is; a router's own refusal; several choices."""
    async with serving(Foreseen(breaks_at=at, refuses=refuses)) as one, serving(Foreseen()) as other:
        with pytest.raises(grpc.aio.AioRpcError, match="gone"):
            await text([one, other], choices)
        assert (other.generated, other.received) == (0, [])


async def test_an_echoed_prompt_comes_once() -> None:
    async with serving(Foreseen(echo=4, times=1)) as one, serving(Foreseen(echo=4, times=1)) as other:
        reached = Routers(named(f"{one.address},{other.address}"))
        replies = [reply async for reply in Stream(reached, generate_pb2.GenerateRequest(prompt="x"), 60.0, ())]
        await reached.close()
    assert [info.token_id for reply in replies for info in reply.prompt.tokens] == [0, 1, 2, 3]
    assert [reply.token.index for reply in replies if reply.HasField("token")] == list(range(NEW))
