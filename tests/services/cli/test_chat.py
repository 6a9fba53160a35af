"""A conversation on the terminal: its session, and what Ctrl-C ends."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from qaq.v1 import common_pb2, generate_pb2
from typer.testing import CliRunner

from services.cli import inference as module
from services.cli.main import app


class Asked:
    """Answers each question with its words, and is interrupted behind the first word of "stop this"."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.calls: list[str] = []
        self.metadata: Any = None
        self.ended = 0

    def once(self, call: Any) -> Any:
        return call(self)

    def OpenSession(self, request: Any, timeout: float) -> Any:
        self.calls.append("open")
        return generate_pb2.OpenSessionReply(session_id="new")

    def CloseSession(self, request: Any, timeout: float) -> Any:
        self.calls.append(f"close {request.session_id}")

    def stream(self, request: Any) -> Generator[generate_pb2.GenerateReply]:
        self.requests.append(request)
        text = request.messages[-1].content
        try:
            for index, word in enumerate(text.split()):
                yield generate_pb2.GenerateReply(token=common_pb2.Token(index=index, text=f"{word.upper()} "))
                if text == "stop this":
                    raise KeyboardInterrupt
        finally:
            self.ended += 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()

    @contextlib.contextmanager
    def inference(router: str | None, metadata: Any = ()) -> Iterator[Asked]:
        asked.metadata = metadata
        yield asked

    monkeypatch.setattr(module, "inference", inference)
    return asked


def test_ctrl_c_ends_an_answer_and_not_the_conversation(asked: Asked) -> None:
    result = CliRunner().invoke(app, ["chat"], input="stop this\ngo on\n")
    assert result.exit_code == 0
    assert "STOP" in result.output
    assert "THIS" not in result.output
    assert "stopped; Ctrl-C once more ends the conversation" in result.output
    assert "GO ON" in result.output
    assert [request.session_id for request in asked.requests] == ["new", "new"]
    assert asked.calls == ["open", "close new"]
    assert asked.ended == 2


def test_ctrl_c_ends_a_single_question(asked: Asked) -> None:
    result = CliRunner().invoke(app, ["chat", "stop this"])
    assert (result.exit_code, "interrupted" in result.output) == (130, True)
    assert asked.calls == ["open", "close new"]


def test_a_session_that_is_there_is_continued_and_stays(asked: Asked) -> None:
    result = CliRunner().invoke(app, ["chat", "go on", "--session", "mine"])
    assert result.exit_code == 0
    assert [request.session_id for request in asked.requests] == ["mine"]
    assert asked.calls == []
    refused = CliRunner().invoke(
        app, ["chat", "go on", "--session", "mine", "--preset", "fp16"], env={"COLUMNS": "300"}
    )
    assert (refused.exit_code, "chosen when it is opened" in refused.output) == (2, True)


def test_the_tenant_is_that_of_every_call(asked: Asked) -> None:
    CliRunner().invoke(app, ["chat", "go on", "--tenant", "ada"])
    assert asked.metadata == (("qaq-tenant", "ada"),)
