"""`qaq bench serve --chaos`: what clients lose while processes of a stack are killed and stopped."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

import typer

from qaq_eval.serving.chaos import Chaos, NotWhole, Role, Stack, any_fault
from qaq_eval.serving.chaos_result import ChaosResult, outcome, sentence, table
from qaq_eval.serving.listeners import Listener, listening
from services.cli.terminal import screen
from services.cluster.state import StackState
from services.common import log
from services.common.channel import open_channel
from services.common.redis import connect
from services.common.routers import registered

ROLES: tuple[Role, ...] = ("worker", "cache service", "router")
"""Redis is not among them: that of a local stack keeps nothing when it dies."""


def run(
    running: StackState,
    minutes: float,
    clients: int,
    stream_tokens: int,
    preset: str,
    seed: int,
    json_path: Path | None,
) -> None:
    """Breaks a stack that Ray repairs, prints the verdict, and exits with code 1 if something was lost."""
    log.configure("error")
    result = asyncio.run(_broken(running, 60 * minutes, clients, stream_tokens, preset, seed))
    screen.print(table(result))
    screen.print(sentence(result), highlight=False)
    for damage in result.damages:
        screen.print(damage, highlight=False)
    if json_path is not None:
        json_path.write_text(result.model_dump_json(indent=1) + "\n")
    if not result.whole:
        raise typer.Exit(1)


async def _broken(
    running: StackState, seconds: float, clients: int, stream_tokens: int, preset: str, seed: int
) -> ChaosResult:
    began, not_whole = time.monotonic(), None
    redis = connect(running.redis["url"])
    find, key = registered(redis), running.key("client")
    dial = partial(open_channel, identity=running.access.identity("client"), role="router")
    listeners = [
        Listener(
            f"client {place}",
            find,
            preset,
            stream_tokens,
            sessions=place % 2 == 0,
            seed=seed + place,
            dial=dial,
            key=key,
        )
        for place in range(clients)
    ]
    workers = running.settings.workers
    expected: dict[Role, int] = {"worker": workers, "cache service": running.settings.originals, "router": 1}
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
