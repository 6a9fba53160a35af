"""`qaq top`: workers, sessions and bytes, live."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.client import Router
from services.cli.options import JsonPath
from services.cli.terminal import screen

if TYPE_CHECKING:
    from services.cli.inference import Inference
    from services.cli.top_frame import Frame
    from services.cluster.status import StackStatus

DEADLINE_S = 5.0
QUIT = "q"

Pressed = Callable[[float], bool]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Stack")(top)


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame, as without a terminal.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=60, help="Seconds between two frames.")] = 1.0,
    router: Router = None,
    json_path: JsonPath = None,
) -> None:
    """Shows workers, sessions, bytes and bits live; q ends it.

    Sessions of all tenants take an operator's key (QAQ_API_KEY); a stack of this machine has one.
    """
    from services.cli.inference import inference
    from services.cli.keys import caller_key
    from services.cli.top_frame import show

    with inference(router, key=caller_key(router, "operator")) as client:
        source = _source(client, router)
        if once or json_path is not None or not screen.is_terminal:
            first = source()
            time.sleep(interval)
            frame = source().after(first)
            if json_path is not None:
                json_path.write_text(json.dumps(frame.model_dump(), indent=1) + "\n")
            screen.print(show(frame), highlight=False)
            return
        with _ended_by_signals(), _keys() as pressed:
            _live(source, pressed, interval)


def _live(source: Callable[[], Frame], pressed: Pressed, interval: float) -> None:
    """Shows frames until a key ends it. While the servers do not answer, the last one stays and says so."""
    from grpc import RpcError
    from redis.exceptions import RedisError
    from rich.live import Live

    from qaq_core.base.errors import QAQError
    from services.cli.top_frame import show
    from services.common.errors import StatusError

    last = source()  # an address or a key that is wrong ends the command
    answered = time.monotonic()
    with Live(show(last, screen.height), console=screen, screen=True, auto_refresh=False) as live:
        while not pressed(interval):
            note = f"{QUIT} ends it"
            try:
                now = source()
                frame, last, answered = now.after(last), now, time.monotonic()
            except (RpcError, RedisError, QAQError, StatusError, OSError) as error:
                note = f"no answer since {time.monotonic() - answered:.0f} s: {type(error).__name__}; {note}"
                frame = last
            live.update(show(frame, screen.height, note), refresh=True)


def _source(client: Inference, router: str | None) -> Callable[[], Frame]:
    """Asks for a frame: of the stack of this machine, or of routers and of their workers. Who may not list these sees
    those that have sessions of theirs, if his certificate opens them."""
    import grpc
    from qaq.v1 import generate_pb2, inspect_pb2

    from services.cli.identity import identity
    from services.cli.inference import DEFAULT_ROUTER
    from services.cli.top_frame import Frame, session_row, store_rows, worker_row
    from services.cluster import state
    from services.cluster.status import described, stack_status

    running = None if router else state.load()
    who = identity(router)

    def models() -> str:
        found = client.once(lambda stub: stub.ListModels(generate_pb2.ListModelsRequest(), timeout=DEADLINE_S))
        return ", ".join(each.model.name for each in found.models)

    everyones = True

    def listed() -> list[generate_pb2.SessionInfo]:
        nonlocal everyones
        request = generate_pb2.ListSessionsRequest(all_tenants=everyones)
        try:
            return list(client.once(lambda stub: stub.ListSessions(request, timeout=DEADLINE_S)).sessions)
        except grpc.RpcError as error:
            if not everyones or error.code() is not grpc.StatusCode.PERMISSION_DENIED:
                raise
            everyones = False  # the frame says so
            return listed()

    def workers(sessions: list[generate_pb2.SessionInfo]) -> list[str]:
        found = {session.worker for session in sessions if session.worker}
        if everyones:
            request = inspect_pb2.ListWorkersRequest()
            reply = client.inspect(lambda stub: stub.ListWorkers(request, timeout=DEADLINE_S))
            found |= {worker.address for worker in reply.workers}
        return sorted(found)

    def frame() -> Frame:
        sessions = listed()
        found: StackStatus
        if running is not None and running.alive:
            found = asyncio.run(stack_status(running.access))
        else:
            found = asyncio.run(described((router or DEFAULT_ROUTER).split(","), workers(sessions), who))
        return Frame(
            at=time.time(),
            model=models(),
            routers=found.routers,
            workers=[
                worker_row(at, worker, at in found.draining)
                for at, worker in found.workers.items()
                if everyones or worker is not None  # else it may be gone, or closed to this caller
            ],
            sessions=[session_row(session) for session in sessions],
            originals=store_rows(found.originals),
            all_tenants=everyones,
        )

    return frame


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does, so that the terminal is as it was before."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _keys() -> Iterator[Pressed]:
    """A function that waits some seconds, and says whether the key that ends the command was pressed meanwhile."""
    try:
        import select
        import termios
        import tty

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (ImportError, OSError, ValueError, termios.error):  # no terminal to read from: Ctrl-C ends it

        def wait(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield wait
        return

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                typed = os.read(terminal, 64)
                if not typed or QUIT in typed.decode(errors="replace").lower():
                    return True
        return False

    tty.setcbreak(terminal)
    try:
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
