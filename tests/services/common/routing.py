"""Routers whose answers a test can foresee."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc

from services.common.server import GrpcServer

NEW = 9
TEXT = "".join(f"{index} " for index in range(NEW)) + "end"


@dataclass
class Foreseen(generate_pb2_grpc.InferenceServicer):
    """Streams the tokens 0, 1, … of session "s".

    Attributes:
        breaks_at: the stream breaks before this token, as if the connection did; so many times.
        refuses: it breaks as a router's own refusal.
        echo: tokens of the prompt, each in a message; the stream breaks once before the last of them.
        received: what each `Rejoin` said.
    """

    address: str = ""
    breaks_at: int | None = None
    times: int = 1000
    refuses: bool = False
    echo: int = 0
    generated: int = 0
    received: list[tuple[str, int]] = field(default_factory=list)

    async def GetModel(
        self, request: generate_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.GetModelReply:
        return generate_pb2.GetModelReply(model=common_pb2.ModelInfo(name=self.address))

    async def Generate(
        self, request: generate_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generate_pb2.GenerateReply]:
        self.generated += 1
        async for reply in self._tokens(0, context):
            yield reply

    async def Rejoin(
        self, request: generate_pb2.RejoinRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generate_pb2.GenerateReply]:
        self.received.append((request.session_id, request.received))
        async for reply in self._tokens(request.received, context):
            yield reply

    async def _tokens(self, first: int, context: grpc.aio.ServicerContext) -> AsyncIterator[generate_pb2.GenerateReply]:
        for place in range(self.echo):
            if place == self.echo - 1 and self.times:
                self.times -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            tokens = common_pb2.PromptTokens(tokens=[common_pb2.TokenInfo(token_id=place)])
            yield generate_pb2.GenerateReply(session_id="s", prompt=tokens)
        for index in range(first, NEW):
            if index == self.breaks_at and self.times:
                self.times -= 1
                told = (("retry-after-ms", "100"),) if self.refuses else ()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone", trailing_metadata=told)
            token = common_pb2.Token(token_id=index, index=index, text=f"{index} ")
            yield generate_pb2.GenerateReply(session_id="s", token=token)
        yield generate_pb2.GenerateReply(session_id="s", finished=common_pb2.Finished(text="end"))


@contextlib.asynccontextmanager
async def serving(router: Foreseen) -> AsyncIterator[Foreseen]:
    """A router that answers while the context lasts."""
    server = GrpcServer()
    server.add("qaq.v1.Inference", generate_pb2_grpc.add_InferenceServicer_to_server, router)
    router.address = await server.start()
    try:
        yield router
    finally:
        await server.stop(0)
