"""Clients that keep streams running and write down what they hear.

They recover as a user's client does: with `Stream`, which takes up a stream on another router when its own is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator

import grpc
from qaq.v1 import common_pb2, generate_pb2

from qaq_eval.serving.history import Entry, History
from services.common.channel import Dial, open_channel
from services.common.errors import StatusError
from services.common.keys import WithMetadata, authorization
from services.common.routers import Find, Routers
from services.common.streams import Stream

DEADLINE_S = 3600.0
CALL_S = 30.0
RETRY_S = 0.5
PROMPT_WORDS = "The ferryman counted his passengers twice, because one of them was a ghost who paid like the others."

Failure = (grpc.aio.AioRpcError, StatusError)


class Listener:
    """One client, which asks for one stream after the other.

    Args:
        find: the routers.
        preset: of its streams' caches.
        tokens: length of the longest stream; the others have at least a quarter.
        sessions: each stream is a turn of a session of its own. Otherwise a session is made for the call.
        dial: opens a channel to a router.
        key: of the caller; empty sends none.

    Attributes:
        histories: of its streams, in order.
        refused: streams that could not begin; they are asked for again and not lost.
    """

    def __init__(
        self,
        name: str,
        find: Find,
        preset: str,
        tokens: int,
        *,
        sessions: bool,
        seed: int,
        dial: Dial = open_channel,
        key: str = "",
    ) -> None:
        self.name, self.histories, self.refused = name, list[History](), 0
        self._routers, self._preset, self._tokens = Routers(find, dial), preset, tokens
        self._caller = authorization(key)
        self._sessions, self._rng = sessions, random.Random(seed)

    async def run(self) -> None:
        """Streams until it is cancelled."""
        while True:
            await self.hear(self._rng.randint(self._tokens // 4, self._tokens))

    async def hear(self, tokens: int) -> History:
        """One stream to its end; one that is refused is asked for again."""
        while True:
            history = History(f"{self.name}, stream {len(self.histories)}", self.name, tokens)
            try:
                await self._listen(history)
            except Failure as error:
                if not history.entries and history not in self.histories:
                    self.refused += 1
                    await asyncio.sleep(RETRY_S)
                    continue
                history.error = _said(error)
            history.ended = time.monotonic()
            return history

    def heard_since(self, moment: float) -> bool:
        """Whether a token has come after a moment."""
        last = self.histories[-1].entries[-1:] if self.histories else []
        return any(entry.at > moment for entry in last)

    async def close(self) -> None:
        await self._routers.close()

    async def _listen(self, history: History) -> None:
        async with self._session() as session:
            stream = Stream(self._routers, self._request(session, history.asked), DEADLINE_S, self._caller)
            async with contextlib.aclosing(aiter(stream)) as replies:
                async for reply in replies:
                    if not self.histories or self.histories[-1] is not history:
                        self.histories.append(history)  # it has begun: from now on it may not break
                    match reply.WhichOneof("event"):
                        case "token":
                            history.entries.append(Entry(reply.token.index, reply.token.token_id, time.monotonic()))
                        case "finished":
                            history.told = reply.finished.usage.generated_tokens

    def _request(self, session: str, tokens: int) -> generate_pb2.GenerateRequest:
        """Greedy, and the same prompt each time, so that tokens can be compared."""
        return generate_pb2.GenerateRequest(
            prompt=f"{self.name}. " + PROMPT_WORDS,
            sampling=common_pb2.SamplingParams(temperature=0),
            stop=common_pb2.StopParams(max_new_tokens=tokens, ignore_eos=True),
            cache=None if session else common_pb2.CacheParams(preset=self._preset),
            session_id=session,
        )

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[str]:
        """The id of a new session; "" if the streams have none of their own."""
        if not self._sessions:
            yield ""
            return
        cache = common_pb2.CacheParams(preset=self._preset)
        opening = generate_pb2.OpenSessionRequest(cache=cache)
        async with self._routers.stub() as stub:
            session = (await WithMetadata(stub, self._caller).OpenSession(opening, timeout=CALL_S)).session_id
        try:
            yield session
        finally:
            with contextlib.suppress(*Failure):  # it expires by itself
                async with self._routers.stub() as stub:
                    closing = generate_pb2.CloseSessionRequest(session_id=session)
                    await WithMetadata(stub, self._caller).CloseSession(closing, timeout=CALL_S)


def _said(error: grpc.aio.AioRpcError | StatusError) -> str:
    if isinstance(error, StatusError):
        return f"{error.code.name}: {error.message}"
    return f"{error.code().name}: {error.details()}"


@contextlib.asynccontextmanager
async def listening(listeners: list[Listener]) -> AsyncIterator[None]:
    """They stream while the context lasts. Streams that run at its end are neither finished nor lost."""
    tasks = [asyncio.create_task(listener.run(), name=listener.name) for listener in listeners]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()  # a listener never ends by itself: raises what ended it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in listeners:
            await listener.close()
