"""`qaq top`: what a frame says, how it is shown, and the keys that end it. A real stack: tests/e2e/test_top.py."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from qaq.v1 import generate_pb2, inspect_pb2, originals_pb2, worker_pb2
from rich.console import Console

from services.cli import top
from services.cli.top_frame import Frame, SessionRow, session_row, show, store_rows, worker_row

SCHEMA = json.loads((Path(__file__).parents[3] / "services" / "schemas" / "top.json").read_text())
DESCRIBED = worker_pb2.DescribeReply(
    running=3,
    waiting=2,
    sessions=7,
    max_sequences=8,
    kv_bytes=25_000_000,
    kv_bytes_fp16=150_000_000,
    kv_budget_bytes=100_000_000,
    bits=2.31,
    exceptions=4_321,
    rows_requantized=4_000,
)


def session(name: str, tokens: int, running: bool = True, opened_at: float = 0.0) -> SessionRow:
    found = generate_pb2.SessionInfo(
        session_id=name, tenant="acme", tokens=tokens, worker="127.0.0.1:1", running=running, opened_at=opened_at
    )
    return session_row(found)


def frame(at: float, *sessions: SessionRow, all_tenants: bool = True) -> Frame:
    stores = {"127.0.0.1:3": originals_pb2.StatsReply(pages=1_200, bytes=80_000_000), "127.0.0.1:4": None}
    return Frame(
        at=at,
        model="SmolLM2",
        routers=["127.0.0.1:0"],
        workers=[worker_row("127.0.0.1:1", DESCRIBED, False), worker_row("127.0.0.1:2", None, False)],
        sessions=list(sessions),
        originals=store_rows(stores),
        all_tenants=all_tenants,
    )


def shown(what: Frame, width: int = 80, **how: Any) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(show(what, **how), highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_speeds_are_of_sessions_that_ran_in_both_frames() -> None:
    before = frame(100.0, session("a", 50), session("turn", 10, running=False), session("new log", 90))
    after = frame(102.0, session("a", 90), session("turn", 800), session("new log", 30), session("born", 400))
    speeds = {each.id: each.tokens_per_second for each in after.after(before).sessions}
    assert speeds == {"a": 20.0, "turn": None, "new log": None, "born": None}
    assert after.after(before).tokens_per_second == 20.0
    assert after.tokens_per_second is None


def test_a_frame_is_as_its_schema_says() -> None:
    before = frame(1.0, session("a", 50))
    jsonschema.validate(frame(2.0, session("a", 60)).after(before).model_dump(), SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"workers": []}, SCHEMA)


def test_all_figures_are_shown_in_80_columns() -> None:
    text = shown(frame(2.0, session("a", 60)).after(frame(1.0, session("a", 50))))
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert "10.0 tokens/s, 3 running, 2 in the queue, 1 sessions; 25.0 MB of KV, 6.00x smaller than fp16" in flat
    assert "127.0.0.1:1 3/8 2 7 25.0 MB ##...... 25% 2.31 4,321" in flat
    assert "127.0.0.1:2: does not answer" in flat
    assert "a acme 60 10.0 127.0.0.1:1" in flat
    assert "originals 127.0.0.1:3: 1,200 pages, 80.0 MB in Redis" in flat
    assert "originals 127.0.0.1:4: does not answer" in flat


def test_running_sessions_come_first_and_the_rest_is_counted() -> None:
    many = [session(f"s{i}", i, running=i == 3, opened_at=i) for i in range(30)]
    lines = shown(frame(1.0, *many), height=20).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("session"))
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["s3", "s29", "s28"]
    assert any(line.strip() == "and 24 more" for line in lines)


def test_a_long_name_gives_way_and_no_figure_is_cut() -> None:
    text = shown(frame(1.0, session("0123456789abcdef" * 4, 12_345)))
    assert "…" not in text
    assert "12,345" in text
    assert "127.0.0.1:1" in text.partition("session")[2]
    assert "0123456789abcdef" * 4 in "".join(line.split("  ")[0] for line in text.partition("tokens/s")[2].splitlines())


def test_names_cannot_move_the_cursor() -> None:
    text = shown(frame(1.0, session("\x1b[2J\x1b[Hevil", 1)))
    assert "\x1b" not in text
    assert "?[2J?[Hevil" in text


def test_it_says_whose_sessions_they_are() -> None:
    assert "an operator's key shows all" in shown(frame(1.0, all_tenants=False))
    assert "operator" not in shown(frame(1.0))


class Client:
    """A router that knows who may see what."""

    def __init__(self, code: grpc.StatusCode | None = None) -> None:
        self.code, self.asked = code, []  # type: ignore[var-annotated]

    def once(self, call: Any) -> Any:
        return call(self)

    def inspect(self, call: Any) -> Any:
        return call(self)

    def ListWorkers(self, request: Any, timeout: float) -> Any:
        return inspect_pb2.ListWorkersReply(workers=[inspect_pb2.WorkerInfo(address="127.0.0.1:7")])

    def ListModels(self, request: Any, timeout: float) -> Any:
        return generate_pb2.ListModelsReply(models=[generate_pb2.GetModelReply(model={"name": "m"})])

    def ListSessions(self, request: Any, timeout: float) -> Any:
        self.asked.append(request.all_tenants)
        if self.code is not None and request.all_tenants:
            error = grpc.RpcError()
            error.code = lambda: self.code  # type: ignore[attr-defined]
            raise error
        mine = generate_pb2.SessionInfo(session_id="mine", tokens=3, worker="127.0.0.1:8")
        return generate_pb2.ListSessionsReply(sessions=[mine])


@pytest.mark.parametrize(
    ("code", "seen"), [(None, ["127.0.0.1:7", "127.0.0.1:8"]), (grpc.StatusCode.PERMISSION_DENIED, [])]
)
def test_an_operator_sees_workers_without_sessions(code: grpc.StatusCode | None, seen: list[str]) -> None:
    client: Any = Client(code)
    assert [each.address for each in top._source(client, "127.0.0.1:1")().workers] == seen


def test_a_caller_who_may_not_see_all_sees_the_own_and_is_told() -> None:
    client: Any = Client(grpc.StatusCode.PERMISSION_DENIED)
    source = top._source(client, "127.0.0.1:1")
    assert (source().all_tenants, source().all_tenants) == (False, False)
    assert client.asked == [True, False, False]
    assert [each.id for each in source().sessions] == ["mine"]


def test_another_error_is_not_taken_for_that() -> None:
    client: Any = Client(grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(grpc.RpcError):
        top._source(client, "127.0.0.1:1")()


@pytest.mark.parametrize(("typed", "ends"), [(b"q", True), (b"Q", True), (b"xyz", False), (b"", False)])
def test_q_ends_it(typed: bytes, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    main, terminal = pty.openpty()
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with top._keys() as pressed:
            os.write(main, typed)
            assert pressed(0.2) is ends
    os.close(main)


def test_the_last_frame_stays_while_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=100, height=30, force_terminal=True)
    monkeypatch.setattr(top, "screen", console)
    answers = iter([frame(time.time(), session("a", 1)), ConnectionResetError("gone")])
    left = iter([False, True])

    def source() -> Frame:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    top._live(source, lambda seconds: next(left), 0.0)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "no answer since 0 s: ConnectionResetError; q ends it" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_as_a_key_does(number: signal.Signals) -> None:
    before, ended = signal.getsignal(number), []

    def shown() -> None:
        try:
            signal.raise_signal(number)
        finally:
            ended.append(True)

    with pytest.raises(SystemExit) as end, top._ended_by_signals():
        shown()
    assert (end.value.code, ended) == (128 + number, [True])
    assert signal.getsignal(number) is before
