"""`qaq bench serve --chaos`: what clients lose while processes of a stack are killed and stopped."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import typer

from qaq_eval.serving.chaos import Chaos, NotWhole, Role, Stack, any_fault
from qaq_eval.serving.chaos_result import ChaosResult, outcome, sentence, table
from qaq_eval.serving.listeners import Listener, listening
from services.cli.terminal import screen
from services.common import log
from services.common.redis import connect
from services.common.routers import registered

ROLES: tuple[Role, ...] = ("worker", "cache service", "router")
"""Redis is not among them: that of a local stack keeps nothing when it dies."""


def run(
    redis_url: str,
    minutes: float,
    clients: int,
    stream_tokens: int,
    preset: str,
    workers: int,
    seed: int,
    json_path: Path | None,
) -> None:
    """Breaks a stack that Ray repairs, prints the verdict, and exits with code 1 if something was lost."""
    log.configure("error")
    result = asyncio.run(_broken(redis_url, 60 * minutes, clients, stream_tokens, preset, workers, seed))
    screen.print(table(result))
    screen.print(sentence(result), highlight=False)
    for damage in result.damages:
        screen.print(damage, highlight=False)
    if json_path is not None:
        json_path.write_text(result.model_dump_json(indent=1) + "\n")
    if not result.whole:
        raise typer.Exit(1)


async def _broken(
    redis_url: str, seconds: float, clients: int, stream_tokens: int, preset: str, workers: int, seed: int
) -> ChaosResult:
    began, not_whole = time.monotonic(), None
    redis = connect(redis_url)
    find = registered(redis)
    listeners = [
        Listener(f"client {place}", find, preset, stream_tokens, sessions=place % 2 == 0, seed=seed + place)
        for place in range(clients)
    ]
    expected: dict[Role, int] = {"worker": workers, "cache service": 1, "router": 1}
    chaos = Chaos(Stack(redis, expected), listeners, seed, lambda line: screen.print(line, highlight=False))
    try:
        async with listening(listeners):
            await chaos.run(any_fault(ROLES, seed), seconds)
    except NotWhole as error:
        not_whole = str(error)
    finally:
        await redis.aclose()
    facts = {
        "stream_tokens": stream_tokens,
        "preset": preset,
        "workers": workers,
        "routers": 1,
        "seconds": time.monotonic() - began,
        "not_whole": not_whole,
    }
    return outcome(chaos, listeners, {}, facts)
