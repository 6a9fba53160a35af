"""Sends requests to a router and records when their tokens arrive."""

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
from qaq.v1 import common_pb2, generate_pb2

from qaq_eval.serving.arrivals import Arrival, Script

DEADLINE_S = 1200.0
_TEXT_BYTES = 300_000


@dataclass
class Record:
    """One request as measured by its client; times in seconds of time.perf_counter.

    Attributes:
        tokens: time of arrival of each token.
        transit: seconds from the sampling of each token to its arrival, by the wall clock.
        error: name of a gRPC status, or "".
    """

    sent: float
    tokens: list[float] = field(default_factory=list)
    transit: list[float] = field(default_factory=list)
    error: str = ""

    def arrived(self, chosen_at: float) -> None:
        self.tokens.append(time.perf_counter())
        self.transit.append(time.time() - chosen_at)


class Prompts:
    """Token ids of generated prompts: pieces of Python's documentation."""

    def __init__(self, ids: Sequence[int], seed: int) -> None:
        self._ids, self._rng = ids, random.Random(seed)

    @classmethod
    async def load(cls, stub: Any, seed: int) -> Prompts:
        text = "\n\n".join(topics[name] for name in sorted(topics))[:_TEXT_BYTES]
        reply = await stub.Tokenize(generate_pb2.TokenizeRequest(text=text, no_special_tokens=True), timeout=60)
        return cls(list(reply.token_ids), seed)

    def shared(self, name: str, tokens: int) -> list[int]:
        """The same piece for the same name."""
        return self._piece(zlib.crc32(name.encode()), tokens)

    def own(self, tokens: int) -> list[int]:
        """Another piece at each call."""
        return self._piece(self._rng.randrange(len(self._ids)), tokens)

    def _piece(self, start: int, tokens: int) -> list[int]:
        return [self._ids[(start + place) % len(self._ids)] for place in range(tokens)]


class Load:
    """Runs scripts against a router.

    Args:
        cache: CacheParams of every session and request.
        regex: constraint of every request; empty for none.

    Attributes:
        records: all requests, in the order they were sent.
        sessions: number of sessions opened.
    """

    def __init__(
        self,
        stub: Any,
        prompts: Prompts,
        cache: dict[str, Any] | None = None,
        regex: str = "",
    ) -> None:
        self._constraint = common_pb2.Constraint(regex=regex) if regex else None
        self._stub, self._prompts, self._cache = stub, prompts, cache
        self.records: list[Record] = []
        self.sessions = 0

    async def closed_loop(self, scripts: Sequence[Script], clients: int) -> None:
        """Runs scripts with a number of clients. Each begins the next script when it has ended one; `at` is ignored."""
        waiting = list(reversed(scripts))

        async def client() -> None:
            while waiting:
                await self._run(waiting.pop(), None)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def open_loop(self, scripts: Sequence[Script]) -> None:
        """Sends every request at its own time."""
        start = time.perf_counter()
        await asyncio.gather(*(self._run(script, start) for script in scripts))

    async def _run(self, script: Script, start: float | None) -> None:
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
            await self._request(arrival, session, first_turn=turn == 0)
        if session:
            await self._stub.CloseSession(generate_pb2.CloseSessionRequest(session_id=session), timeout=60)

    async def _request(self, arrival: Arrival, session: str, first_turn: bool) -> None:
        request = generate_pb2.GenerateRequest(
            prompt=arrival.prompt,
            prompt_token_ids=[] if arrival.prompt else self._tokens(arrival, first_turn),
            sampling={"temperature": 0.0},
            stop={"max_new_tokens": arrival.new_tokens, "ignore_eos": self._constraint is None},
            constraint=self._constraint,
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

    def _tokens(self, arrival: Arrival, first_turn: bool) -> list[int]:
        shared = self._prompts.shared(arrival.shared, arrival.shared_tokens) if arrival.shared and first_turn else []
        return [*shared, *self._prompts.own(arrival.prompt_tokens)]
