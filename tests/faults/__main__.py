"""`python -m tests.faults`: breaks a stack of processes as often as asked, and prints what its clients lost.

With --journal it can be stopped and run again: it goes on with what has not been broken yet. The exit code is 1 if
something was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from qaq_eval.serving.chaos import Chaos, Fault, NotWhole, Role
from qaq_eval.serving.chaos_result import ChaosResult, outcome, sentence, table
from qaq_eval.serving.listeners import Listener, listening
from services.cli.terminal import screen
from services.common import log
from services.common.embedded_redis import EmbeddedRedis
from services.common.redis import connect
from services.common.routers import registered
from tests.faults.processes import Processes, ProcessStack

LONG: dict[Fault, int] = {
    Fault("worker", "killed"): 100,
    Fault("worker", "stopped"): 20,
    Fault("cache service", "killed"): 20,
    Fault("cache service", "stopped"): 20,
    Fault("router", "killed"): 20,
    Fault("router", "stopped"): 20,
    Fault("Redis", "killed"): 20,
    Fault("Redis", "stopped"): 20,
}
UNDISTURBED_TOKENS = 128
SAVE_EVERY = 5

# Pages of streams that have ended go soon: Redis reads all of its data again whenever it was killed.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "QAQ_PAGE_TTL_S": "180"}


async def faults(
    plan: dict[Fault, int],
    *,
    seconds: float,
    clients: int,
    tokens: int,
    preset: str,
    spare: int = 1,
    seed: int = 0,
    save: Callable[[ChaosResult], None] = lambda _: None,
    running: Processes | None = None,
) -> ChaosResult:
    """Makes the faults of a plan in a random order.

    Args:
        tokens: length of the longest streams.
        spare: workers beside the two that make the stack whole. A killed one starts while the next fault is made.
        save: gets the result so far, now and then.
        running: workers and a cache service that run already; only routers are started beside them.
    """
    began, not_whole = time.monotonic(), None
    order = random.Random(seed).sample(
        [fault for fault, count in plan.items() for _ in range(count)], sum(plan.values())
    )
    expected: dict[Role, int] = {"worker": 2, "router": 2, "cache service": 1, "Redis": 1}
    with contextlib.ExitStack() as stack:
        processes, started = running or _processes(stack), []
        if running is None:
            started = [processes.start(role) for role in ("originals", *["worker"] * (2 + spare))]
        for _ in range(2):
            started.append(processes.start("router"))
            stack.callback(processes.end, started[-1])
        await asyncio.to_thread(processes.until_serving, *started)
        redis = connect(processes.redis.url)
        listeners = [
            Listener(f"client {place}", registered(redis), preset, tokens, sessions=place % 2 == 0, seed=place)
            for place in range(clients)
        ]
        undisturbed = await _undisturbed(listeners, min(tokens, UNDISTURBED_TOKENS))

        def result() -> ChaosResult:
            facts = {
                "stream_tokens": tokens,
                "preset": preset,
                "workers": 2 + spare,
                "routers": 2,
                "seconds": time.monotonic() - began,
                "not_whole": not_whole,
            }
            return outcome(chaos, listeners, undisturbed, facts)

        def report(line: str) -> None:
            screen.print(line, highlight=False)
            if len(chaos.broken) % SAVE_EVERY == 0:
                save(result())

        chaos = Chaos(ProcessStack(processes, redis, expected), listeners, seed, report)
        try:
            async with listening(listeners):
                await chaos.run(order, seconds)
        except NotWhole as error:
            not_whole = str(error)
        finally:
            await redis.aclose()
    return result()


def _processes(stack: contextlib.ExitStack) -> Processes:
    """None yet, over a Redis of their own."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qaq-faults-")))
    processes = Processes(stack.enter_context(EmbeddedRedis(persist=True)), directory, ENVIRONMENT)
    stack.callback(processes.stop)
    return processes


async def _undisturbed(listeners: list[Listener], tokens: int) -> dict[str, list[int]]:
    """The first tokens of each client's streams, while nothing is broken."""
    heard = await asyncio.gather(*(listener.hear(tokens) for listener in listeners))
    return {history.prompt: [entry.token_id for entry in history.entries] for history in heard}


def main(
    minutes: Annotated[float, typer.Option(help="Stop after so long.")] = 60.0,
    share: Annotated[float, typer.Option(help="Of the long form's counts, rounded up.")] = 1.0,
    clients: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int, typer.Option(min=8, help="Of the longest streams.")] = 1000,
    preset: str = "fp16",
    spare: Annotated[int, typer.Option(min=0, help="Workers beyond two.")] = 1,
    seed: int = 0,
    journal: Annotated[Path | None, typer.Option(help="Keep the result here; go on from it if it exists.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
) -> None:
    """Breaks a stack of processes and prints what its clients lost."""
    log.configure("error")
    before = ChaosResult.model_validate_json(journal.read_text()) if journal and journal.exists() else None
    wanted = {fault: -int(-count * share // 1) for fault, count in LONG.items()}
    left = {fault: count - (before.times(fault) if before else 0) for fault, count in wanted.items()}
    plan = {fault: count for fault, count in left.items() if count > 0}
    seed += sum(row.times for row in before.faults) if before else 0  # another order than before

    def save(result: ChaosResult) -> ChaosResult:
        whole = before + result if before else result
        for path in (journal, json):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(whole.model_dump_json(indent=1) + "\n")
        return whole

    sizes = {"clients": clients, "tokens": tokens, "spare": spare, "seed": seed}

    async def run() -> ChaosResult:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # else its processes would be left
        return await faults(plan, seconds=60 * minutes, preset=preset, save=save, **sizes)

    whole = save(asyncio.run(run()))
    screen.print(table(whole))
    screen.print(sentence(whole), highlight=False)
    for damage in whole.damages:
        screen.print(damage, highlight=False)
    if any(whole.times(fault) < count for fault, count in wanted.items()):
        screen.print("Not everything was broken yet; with --journal the next run goes on.")
    if not whole.whole:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
