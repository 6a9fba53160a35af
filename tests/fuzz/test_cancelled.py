"""Calls whose clients go away at any moment leave nothing behind: no place, no hold, no sequence, no byte.

Longer: QAQ_FUZZ=1000 pytest tests/fuzz/test_cancelled.py
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import Any

import grpc
import pytest
from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc, worker_pb2, worker_pb2_grpc

from services.common.turns import Turns
from services.originals.client import RemoteOriginals
from services.router.generations import Generations
from services.router.hold import LEFT_TTL_S
from tests.fuzz.conftest import CONTEXT, LONG, SEED, SETTLE_S, Fuzzed, all_of

CALLS = LONG or 60
TOGETHER = 12
SESSIONS = 4
LONGEST_S = 0.4
"""After this long a client goes away; some of the calls have ended then."""

TASKS = ("hold ", "log ", "quota ", "turn of ")
"""What names of the tasks of a call begin with."""

WEATHER = json.dumps({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}})
Call = Callable[[], Awaitable[None]]


class Clients:
    """Makes calls of every kind, and leaves each at a random moment."""

    def __init__(self, stack: Fuzzed, channels: dict[str, grpc.aio.Channel], sessions: list[str], seed: int) -> None:
        self._stack, self._random, self._sessions = stack, Random(seed), sessions
        self._router = generate_pb2_grpc.InferenceStub(channels["router"])
        self._worker = worker_pb2_grpc.WorkerStub(channels["worker"])
        self.ends: Counter[str] = Counter()

    async def one(self) -> None:
        name, call = self._random.choice(list(self._kinds().items()))
        task = asyncio.create_task(call())
        await asyncio.wait([task], timeout=self._random.choice((0.0, self._random.uniform(0, LONGEST_S))))
        task.cancel()
        await asyncio.wait([task])
        self.ends[f"{name}: {'left' if task.cancelled() else 'ended'}"] += 1
        if not task.cancelled():
            task.result()

    def _kinds(self) -> dict[str, Call]:
        return {
            "generate": self._generate,
            "choices": lambda: self._generate(choices=4),
            "constraint": lambda: self._generate(constraint={"regex": f"[a-z]{{{self._random.randint(2, 40)}}}"}),
            "session": lambda: self._generate(session_id=self._random.choice(self._sessions)),
            "chat": self._chat,
            "rejoin": self._rejoin,
            "branch": self._branch,
            "tokenize": self._tokenize,
            "worker": self._direct,
            "http": lambda: self._http({"prompt": self._text(), "max_tokens": 40, "stream": True, "ignore_eos": True}),
            "http prompts": lambda: self._http({"prompt": [self._text()] * 6, "max_tokens": 5, "n": 2}),
        }

    def _text(self) -> str:
        return "Once upon a time " * self._random.randint(1, CONTEXT // 6)

    async def _generate(self, **fields: Any) -> None:
        stop = common_pb2.StopParams(max_new_tokens=self._random.randint(1, 60), ignore_eos="constraint" not in fields)
        await _read(self._router.Generate(generate_pb2.GenerateRequest(prompt=self._text(), stop=stop, **fields)))

    async def _chat(self) -> None:
        message = generate_pb2.ChatMessage(role="user", content=self._text())
        asked = generate_pb2.ChatRequest(messages=[message], opening=True, stop={"max_new_tokens": 30})
        await _read(self._router.Chat(asked))

    async def _rejoin(self) -> None:
        await _read(self._router.Rejoin(generate_pb2.RejoinRequest(session_id=self._random.choice(self._sessions))))

    async def _branch(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):  # it is generating
            asked = generate_pb2.OpenSessionRequest(branch_of=self._random.choice(self._sessions))
            branch = await self._router.OpenSession(asked)
            self._sessions.append(branch.session_id)

    async def _tokenize(self) -> None:
        text = "word " * self._random.choice((10, 1000, 6000))
        await self._router.Tokenize(generate_pb2.TokenizeRequest(text=text, token_strings=True))

    async def _direct(self) -> None:
        ids = [self._random.randint(1, 300) for _ in range(self._random.randint(1, 200))]
        stop = common_pb2.StopParams(max_new_tokens=40, ignore_eos=True)
        await _read(self._worker.Run(worker_pb2.RunRequest(token_ids=ids, stop=stop, choices=2)))

    async def _http(self, body: dict[str, Any]) -> None:
        host, _, port = self._stack.addresses["gateway"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        raw = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        try:
            writer.write(f"{head}content-length: {len(raw)}\r\n\r\n".encode())
            cut = self._random.randrange(len(raw))
            for part in (raw[:cut], raw[cut:]):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)
            answer = await reader.read()
            assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 4")), answer[:300]
        finally:
            writer.close()


async def _read(call: Any) -> None:
    """Reads a stream; refusals that depend on the other calls are answers too."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        if error.code() not in (
            grpc.StatusCode.FAILED_PRECONDITION,  # another call has the session
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.INVALID_ARGUMENT,  # the session is full
            grpc.StatusCode.ABORTED,  # another call has rejoined it
        ):
            raise
    finally:
        call.cancel()


async def left(stack: Fuzzed) -> dict[str, Any]:
    """What calls have left behind."""
    found: dict[str, Any] = await stack.held()
    async with grpc.aio.insecure_channel(stack.addresses["worker"]) as channel:
        described = await worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=30)
    found |= {"sequences": described.sessions, "KV bytes": described.kv_bytes}
    found["streams"] = sum(len(made._streams) for made in all_of(Generations))
    found["late"] = sum(made.late for made in all_of(Turns))
    found["pages under way"] = sum(made.pending_bytes for made in all_of(RemoteOriginals))
    found["tasks"] = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(TASKS)]
    return {name: count for name, count in found.items() if count}


async def expiring(stack: Fuzzed) -> int:
    """Sessions that expire: their clients may still rejoin them. No session is there that does not."""
    keys = [key async for key in stack.redis.scan_iter("qaq:session:*")]
    for key in keys:
        ttl = await stack.redis.ttl(key)  # -1: never; -2: it has expired meanwhile
        assert ttl != -1, key
        assert ttl <= LEFT_TTL_S, (key, ttl)
    assert await stack.redis.zcard("qaq:sessions") == 0
    return len(keys)


@contextlib.asynccontextmanager
async def opened(stack: Fuzzed) -> AsyncIterator[dict[str, grpc.aio.Channel]]:
    async with contextlib.AsyncExitStack() as exits:
        yield {
            role: await exits.enter_async_context(grpc.aio.insecure_channel(stack.addresses[role]))
            for role in ("router", "worker")
        }


@pytest.mark.timeout(120 + LONG)
async def test_calls_that_are_left_at_any_moment_leave_nothing(fuzzed: Fuzzed) -> None:
    async with opened(fuzzed) as channels:
        router = generate_pb2_grpc.InferenceStub(channels["router"])
        sessions = [(await router.OpenSession(generate_pb2.OpenSessionRequest())).session_id for _ in range(SESSIONS)]
        clients = Clients(fuzzed, channels, sessions, SEED)

        async def some() -> None:
            while clients.ends.total() < CALLS:
                await clients.one()

        await asyncio.gather(*(some() for _ in range(TOGETHER)))
        print(dict(sorted(clients.ends.items())))
        await fuzzed.check()
        for session in (await router.ListSessions(generate_pb2.ListSessionsRequest())).sessions:
            await router.CloseSession(generate_pb2.CloseSessionRequest(session_id=session.session_id))
    ends = asyncio.get_running_loop().time() + SETTLE_S
    while found := await left(fuzzed):
        assert asyncio.get_running_loop().time() < ends, f"left behind: {found}"
        await asyncio.sleep(0.1)
    print(f"{await expiring(fuzzed)} keys of sessions that expire")
    assert sum(count for name, count in clients.ends.items() if name.endswith("left")) > CALLS // 4
