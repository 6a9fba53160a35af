"""Sends a load to a router and notes when everything came."""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import grpc
from qaq.v1 import generate_pb2, generate_pb2_grpc

from qaq_eval.serving.arrivals import Arrival, Script

DEADLINE_S = 1200.0
_TEXT_BYTES = 300_000


@dataclass
class Record:
    """One request as its client saw it; times in seconds of time.perf_counter.

    Attributes:
        tokens: when each arrived.
        carried: seconds each took from the worker's choice to its arrival, by the wall clock.
        error: a status' name, or "".
    """

    sent: float
    tokens: list[float] = field(default_factory=list)
    carried: list[float] = field(default_factory=list)
    error: str = ""

    def arrived(self, chosen_at: float) -> None:
        self.tokens.append(time.perf_counter())
        self.carried.append(time.time() - chosen_at)


class Prompts:
    """Token ids of made-up prompts: pieces of the documentation that every Python brings."""

    def __init__(self, ids: Sequence[int], seed: int) -> None:
        self._ids, self._chance = ids, random.Random(seed)

    @classmethod
    async def load(cls, stub: generate_pb2_grpc.InferenceStub, seed: int) -> Prompts:
        text = "\n\n".join(topics[name] for name in sorted(topics))[:_TEXT_BYTES]
        reply = await stub.Tokenize(generate_pb2.TokenizeRequest(text=text, no_special_tokens=True), timeout=60)
        return cls(list(reply.token_ids), seed)

    def shared(self, name: str, tokens: int) -> list[int]:
        """The same for the same name."""
        return self._piece(zlib.crc32(name.encode()), tokens)

    def own(self, tokens: int) -> list[int]:
        """Another every time."""
        return self._piece(self._chance.randrange(len(self._ids)), tokens)

    def _piece(self, start: int, tokens: int) -> list[int]:
        return [self._ids[(start + place) % len(self._ids)] for place in range(tokens)]


class Load:
    """Runs scripts against a router.

    Args:
        cache: CacheParams of every session.

    Attributes:
        records: of all requests, in the order they were sent.
        sessions: how many were opened.
    """

    def __init__(
        self, stub: generate_pb2_grpc.InferenceStub, prompts: Prompts, cache: dict[str, Any] | None = None
    ) -> None:
        self._stub, self._prompts, self._cache = stub, prompts, cache
        self.records: list[Record] = []
        self.sessions = 0

    async def closed(self, scripts: Sequence[Script], clients: int) -> None:
        """So many clients, each of which begins a script when it has ended one. `at` is not looked at."""
        waiting = list(reversed(scripts))

        async def client() -> None:
            while waiting:
                await self._play(waiting.pop(), None)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def timed(self, scripts: Sequence[Script]) -> None:
        """Every request at its own time, whatever becomes of the others."""
        start = time.perf_counter()
        await asyncio.gather(*(self._play(script, start) for script in scripts))

    async def _play(self, script: Script, start: float | None) -> None:
        session = ""
        for turn, arrival in enumerate(script):
            if start is not None:
                await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            if arrival.session and not session:
                try:
                    opened = generate_pb2.OpenSessionRequest(cache=self._cache)
                    session = (await self._stub.OpenSession(opened, timeout=60)).session_id
                except grpc.aio.AioRpcError as error:
                    self.records.append(Record(time.perf_counter(), error=error.code().name))
                    return
                self.sessions += 1
            await self._request(arrival, session, begins=turn == 0)
        if session:
            await self._stub.CloseSession(generate_pb2.CloseSessionRequest(session_id=session), timeout=60)

    async def _request(self, arrival: Arrival, session: str, begins: bool) -> None:
        request = generate_pb2.GenerateRequest(
            prompt=arrival.prompt,
            prompt_token_ids=[] if arrival.prompt else self._tokens(arrival, begins),
            sampling={"temperature": 0.0},
            stop={"max_new_tokens": arrival.new_tokens, "ignore_eos": True},
            cache=None if session else self._cache,
            session_id=session,
        )
        self.records.append(record := Record(time.perf_counter()))
        try:
            async for reply in self._stub.Generate(request, timeout=DEADLINE_S):
                if reply.HasField("token"):
                    record.arrived(reply.token.chosen_at)
        except grpc.aio.AioRpcError as error:
            record.error = error.code().name

    def _tokens(self, arrival: Arrival, begins: bool) -> list[int]:
        shared = self._prompts.shared(arrival.shared, arrival.shared_tokens) if arrival.shared and begins else []
        return [*shared, *self._prompts.own(arrival.prompt_tokens)]
