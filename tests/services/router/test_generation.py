"""Streams that outlive their worker: resumed with the tokens and pages so far, no token lost or repeated."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import grpc
import pytest
from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc, worker_pb2, worker_pb2_grpc
from redis.asyncio import Redis

from services.common.registry import Registry
from services.common.server import GrpcServer
from services.common.settings import RouterSettings
from services.router.generation import FRUITLESS

from .conftest import CountingWorker, running_router
from .test_service import replies, request

Code = grpc.StatusCode
Pages = worker_pb2.RunReply.Pages


@dataclass
class MortalWorker(CountingWorker):
    """Goes on counting where another worker stopped, tells of a page a token, and may go away."""

    lives: int | None = None
    """Tokens until it goes away."""
    echoes: int | None = None
    """Tokens of an echoed prompt until it goes away once."""
    look: Callable[[str], Awaitable[None]] | None = None
    """Called with the session before anything is sent."""

    async def Run(
        self, request: worker_pb2.RunRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.RunReply]:
        if self.refuse is not None:
            await context.abort(self.refuse, "closed")
        self.asked.append(request)
        if self.look is not None:
            await self.look(request.session_id)
        total, left = len(request.token_ids), request.stop.max_new_tokens - request.generated_tokens
        yield worker_pb2.RunReply(prefill=common_pb2.PrefillProgress(tokens_done=total, tokens_total=total))
        for place in range(total) if request.output.echo else ():
            if place == self.echoes:
                self.echoes = None
                await context.abort(Code.UNAVAILABLE, "gone")
            tokens = common_pb2.PromptTokens(tokens=[common_pb2.TokenInfo(token_id=request.token_ids[place])])
            yield worker_pb2.RunReply(prompt=tokens)
        for index in range(left):
            if index == self.lives:
                await context.abort(Code.UNAVAILABLE, "gone")
            token = common_pb2.Token(token_id=total + index, index=request.generated_tokens + index, text="é ")
            yield worker_pb2.RunReply(token=token)
            page = bytes([total + index]) * 32
            yield worker_pb2.RunReply(pages=Pages(first=len(request.page_ids) + index, ids=[page]))
        usage = common_pb2.Usage(generated_tokens=request.stop.max_new_tokens)
        finished = common_pb2.Finished(reason=common_pb2.FINISH_REASON_LENGTH, usage=usage)
        yield worker_pb2.RunReply(finished=finished)


@contextlib.asynccontextmanager
async def mortal(redis: Redis, lives: int | None = None) -> AsyncIterator[MortalWorker]:
    worker = MortalWorker(lives=lives)
    server = GrpcServer()
    server.add("qaq.v1.Worker", worker_pb2_grpc.add_WorkerServicer_to_server, worker)
    worker.address = await server.start()
    try:
        async with Registry(redis).announce("worker", worker.address, {}):
            yield worker
    finally:
        await server.stop(0)


async def stream(client: generate_pb2_grpc.InferenceStub, **more: object) -> list[common_pb2.Token]:
    """The tokens of a stream of nine, which must be whole."""
    got = await replies(client.Generate(request(new=9, **more)))
    kinds = [reply.WhichOneof("event") for reply in got]
    assert kinds == ["prefill", *["token"] * 9, "finished"]
    return [reply.token for reply in got[1:-1]]


async def test_a_stream_goes_on_on_other_workers(router_settings: RouterSettings, redis: Redis) -> None:
    async with (
        mortal(redis, 3) as a,
        mortal(redis, 4) as b,
        mortal(redis) as c,
        running_router(router_settings) as client,
    ):
        session = (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id
        # The last to come is the only one that lives; it is reached in the end, whoever is asked first.
        tokens = await stream(client, session_id=session)
        asked = sorted((r for w in (a, b, c) for r in w.asked), key=lambda r: r.generated_tokens)
        n = len(asked[0].token_ids)
        assert [token.token_id for token in tokens] == list(range(n, n + 9))
        assert [token.index for token in tokens] == list(range(9))
        assert asked[-1] == c.asked[-1]
        for before, after in itertools.pairwise(asked):
            # What was generated, and the pages of it, are what the next worker begins with.
            assert list(after.token_ids) == [*asked[0].token_ids, *range(n, n + after.generated_tokens)]
            assert list(after.page_ids) == [bytes([n + i]) * 32 for i in range(after.generated_tokens)]
            assert after.generated_tokens > before.generated_tokens
        (listed,) = (await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions
        assert (listed.tokens, listed.worker) == (n + 9, c.address)
        # The next turn starts from the pages that the first one told of, wherever it runs.
        await stream(client, session_id=session)
        assert [page[0] for page in c.asked[-1].page_ids[:9]] == list(range(n, n + 9))


async def test_who_has_the_cache_is_known_before_there_is_one(router_settings: RouterSettings, redis: Redis) -> None:
    """Else a client that leaves at once would leave a cache that closing the session does not find."""
    known: list[bytes | None] = []

    async def look(session: str) -> None:
        known.append(await redis.hget(f"qaq:session:{session}", "worker"))

    async with mortal(redis, 4) as a, mortal(redis, 4) as b, running_router(router_settings) as client:
        a.look = b.look = look
        session = (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id
        await stream(client, session_id=session)
        assert known == [worker.address.encode() for worker in (a, b, a)] or known == [
            worker.address.encode() for worker in (b, a, b)
        ]


async def test_a_stream_waits_for_a_worker_to_come_back(router_settings: RouterSettings, redis: Redis) -> None:
    async with mortal(redis, 4) as only, running_router(router_settings) as client:
        assert [token.index for token in await stream(client)] == list(range(9))
        assert [asked.generated_tokens for asked in only.asked] == [0, 4, 8]


async def test_a_generation_that_no_worker_survives_ends(router_settings: RouterSettings, redis: Redis) -> None:
    async with mortal(redis, 0) as only, running_router(router_settings) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream(client)
        assert caught.value.code() is Code.UNAVAILABLE
        assert "went away while it generated" in caught.value.details()
        assert len(only.asked) == FRUITLESS + 1


async def test_a_stream_that_nobody_takes_over_ends(router_settings: RouterSettings, redis: Redis) -> None:
    settings = router_settings.model_copy(update={"resume_timeout_s": 0.3})
    async with mortal(redis, 1) as only, running_router(settings) as client:
        call = client.Generate(request(new=9))
        assert (await call.read()).WhichOneof("event") == "prefill"
        only.refuse = Code.UNAVAILABLE
        assert (await call.read()).token.index == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is Code.UNAVAILABLE
        assert "no other worker could resume" in caught.value.details()


async def test_an_echoed_prompt_comes_once(router_settings: RouterSettings, redis: Redis) -> None:
    asked = generate_pb2.GenerateRequest(
        prompt_token_ids=range(5, 11), stop={"max_new_tokens": 0}, output={"echo": True, "logprobs": True}
    )
    async with mortal(redis) as one, mortal(redis) as other, running_router(router_settings) as client:
        one.echoes, other.echoes = 2, 4
        got = await replies(client.Generate(asked))
    assert [info.token_id for reply in got for info in reply.prompt.tokens] == list(range(5, 11))
    assert len(one.asked + other.asked) == 3
