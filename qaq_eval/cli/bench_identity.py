"""`qaq bench identity`: what mutual TLS and the check of roles cost a streamed token."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.table import Table

from services.cli.options import JsonPath
from services.cli.terminal import screen


class IdentityCost(BaseModel):
    """What `--json` writes.

    Attributes:
        plain_us, secured_us: time of a token without and with identity, for each round.
        plain_cpu_us, secured_cpu_us: the processor's time of it, which other programs change less.
        cost_us, cost_cpu_us: medians of the differences.
        call_plain_us, call_secured_us: median time of a unary call on a connection that is there.
    """

    tokens: int
    plain_us: list[float]
    secured_us: list[float]
    plain_cpu_us: list[float]
    secured_cpu_us: list[float]
    cost_us: float
    cost_cpu_us: float
    call_plain_us: float
    call_secured_us: float


def identity(
    tokens: Annotated[int, typer.Option(min=100, help="Tokens of a stream.")] = 5000,
    rounds: Annotated[int, typer.Option(min=1, help="Streams without and with identity, in turn.")] = 9,
    json_path: JsonPath = None,
) -> None:
    """Measures a stream of tokens over one hop without TLS, and with mutual TLS and the check of roles.

    Server and client share a process, so the time of a token is the work of both.
    """
    cost = asyncio.run(_measure(tokens, rounds))
    table = Table(show_header=False, title="Identity, one hop", title_justify="left")
    for name, plain, secured, added in (
        ("a streamed token", cost.plain_us, cost.secured_us, cost.cost_us),
        ("of it on a processor", cost.plain_cpu_us, cost.secured_cpu_us, cost.cost_cpu_us),
    ):
        medians = f"{statistics.median(plain):.1f} µs without, {statistics.median(secured):.1f} µs with"
        table.add_row(name, f"{medians}: [bold]{added:+.1f} µs[/]")
    table.add_row("a unary call", f"{cost.call_plain_us:.0f} µs without, {cost.call_secured_us:.0f} µs with")
    screen.print(table, highlight=False)
    if json_path is not None:
        json_path.write_text(cost.model_dump_json(indent=1) + "\n")


async def _measure(tokens: int, rounds: int) -> IdentityCost:
    from services.common.certificates import files, issue
    from services.common.channel import open_channel
    from services.common.identity import Identity

    with tempfile.TemporaryDirectory(prefix="qaq-bench-") as name:
        issue(Path(name))
        server, client = (Identity(*files(Path(name), role)) for role in ("worker", "router"))
        plain_server, secured_server = _server(None), _server(server)
        try:
            async with (
                open_channel(await plain_server.start()) as plain,
                open_channel(await secured_server.start(), client, "worker") as secured,
            ):
                for channel in (plain, secured):
                    await _stream(channel, tokens)  # connects, and warms up
                pairs = [(await _stream(plain, tokens), await _stream(secured, tokens)) for _ in range(rounds)]
                calls = [await _calls(channel, rounds * 50) for channel in (plain, secured)]
        finally:
            await plain_server.stop(0)
            await secured_server.stop(0)
    return IdentityCost(
        tokens=tokens,
        plain_us=[plain[0] for plain, _ in pairs],
        secured_us=[secured[0] for _, secured in pairs],
        plain_cpu_us=[plain[1] for plain, _ in pairs],
        secured_cpu_us=[secured[1] for _, secured in pairs],
        cost_us=statistics.median(secured[0] - plain[0] for plain, secured in pairs),
        cost_cpu_us=statistics.median(secured[1] - plain[1] for plain, secured in pairs),
        call_plain_us=calls[0],
        call_secured_us=calls[1],
    )


def _server(identity: Any) -> Any:
    from qaq.v1 import common_pb2, worker_pb2, worker_pb2_grpc

    from services.common.server import GrpcServer

    class Worker(worker_pb2_grpc.WorkerServicer):
        """Streams tokens as fast as they are taken."""

        async def Run(self, request: worker_pb2.RunRequest, context: Any) -> AsyncIterator[worker_pb2.RunReply]:
            for index in range(request.stop.max_new_tokens):
                yield worker_pb2.RunReply(token=common_pb2.Token(token_id=index, index=index, text=" token"))

        async def Describe(self, request: worker_pb2.DescribeRequest, context: Any) -> worker_pb2.DescribeReply:
            return worker_pb2.DescribeReply()

    server = GrpcServer(identity=identity)
    server.add("qaq.v1.Worker", worker_pb2_grpc.add_WorkerServicer_to_server, Worker())
    return server


async def _stream(channel: Any, tokens: int) -> tuple[float, float]:
    """Microseconds a token, elapsed and of this process' processor time."""
    from qaq.v1 import worker_pb2, worker_pb2_grpc

    begun, used, got = time.perf_counter(), time.process_time(), 0
    async for _ in worker_pb2_grpc.WorkerStub(channel).Run(worker_pb2.RunRequest(stop={"max_new_tokens": tokens})):
        got += 1
    assert got == tokens
    return (time.perf_counter() - begun) / tokens * 1e6, (time.process_time() - used) / tokens * 1e6


async def _calls(channel: Any, count: int) -> float:
    """Median microseconds of a unary call."""
    from qaq.v1 import worker_pb2, worker_pb2_grpc

    stub, took = worker_pb2_grpc.WorkerStub(channel), []
    for _ in range(count):
        begun = time.perf_counter()
        await stub.Describe(worker_pb2.DescribeRequest())
        took.append(time.perf_counter() - begun)
    return statistics.median(took) * 1e6
