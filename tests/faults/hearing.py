"""Clients that check what they hear while it comes."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass, field

from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc

Stub = generate_pb2_grpc.InferenceStub
STORY = "The ferryman counted his passengers twice, because one of them was a ghost who paid like the others. " * 2
NEW = 40
EXACT = common_pb2.CacheParams(preset="fp16")


@dataclass
class Heard:
    """What a client was told, token by token; the order is checked as it comes."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    usage: common_pb2.Usage = field(default_factory=common_pb2.Usage)


async def hear(
    client: Stub,
    session: str,
    prompt: str = STORY,
    at: int = 0,
    event: Callable[[], Awaitable[None]] | None = None,
) -> Heard:
    """A greedy stream of NEW tokens; `event` happens when token `at` has come."""
    heard = Heard()
    await listen(client.Generate(asked(session, prompt), timeout=300), heard, at, event)
    assert len(heard.tokens) == NEW
    return heard


def asked(session: str, prompt: str = STORY) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        prompt=prompt,
        session_id=session,
        sampling=common_pb2.SamplingParams(temperature=0),
        stop=common_pb2.StopParams(max_new_tokens=NEW, ignore_eos=True),
    )


async def listen(
    call: AsyncIterable[generate_pb2.GenerateReply],
    heard: Heard,
    at: int = 0,
    event: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Adds what comes to what was heard before."""
    async for reply in call:
        match reply.WhichOneof("event"):
            case "token":
                assert reply.token.index == len(heard.tokens)
                heard.tokens.append(reply.token.token_id)
                heard.text += reply.token.text
                if event is not None and len(heard.tokens) == at:
                    await event()
            case "finished":
                heard.text += reply.finished.text
                heard.usage = reply.finished.usage


async def opened(client: Stub, cache: common_pb2.CacheParams = EXACT) -> str:
    return (await client.OpenSession(generate_pb2.OpenSessionRequest(cache=cache))).session_id


async def holder(client: Stub, session: str) -> str:
    listed = (await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions
    return next(info.worker for info in listed if info.session_id == session)
