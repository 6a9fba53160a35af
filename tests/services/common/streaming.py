"""A server whose stream a test holds open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from qaq.v1 import generate_pb2 as pb
from qaq.v1 import generate_pb2_grpc

from services.common.identity import Identity
from services.common.server import GrpcServer


class Counting(generate_pb2_grpc.InferenceServicer):
    """Streams a number of tokens, each when `step` is released."""

    def __init__(self) -> None:
        self.step = asyncio.Semaphore(0)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateReply]:
        for index in range(request.stop.max_new_tokens):
            await self.step.acquire()
            yield pb.GenerateReply(session_id=str(index))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeReply:
        return pb.TokenizeReply(token_ids=[len(request.text)])


def counting_server(identity: Identity | None, *, certificates: bool = True) -> tuple[GrpcServer, Counting]:
    server, service = GrpcServer(identity=identity, certificates=certificates), Counting()
    server.add("qaq.v1.Inference", generate_pb2_grpc.add_InferenceServicer_to_server, service)
    return server, service
