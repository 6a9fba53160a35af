"""Options of a generation as messages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from qaq.v1 import common_pb2, generate_pb2
from typer.testing import CliRunner

from services.cli import inference
from services.cli.main import app
from services.common.errors import Unavailable

ALL = (
    *("--temperature", "0.5", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.05", "--seed", "7"),
    *("--repetition-penalty", "1.1", "--frequency-penalty", "0.2", "--presence-penalty", "-0.1"),
    *("--logit-bias", "504=-100", "--logit-bias", "7=2.5"),
)
OF_TEXT = ("--stop", "x", "--stop", "y", "--stop-token-id", "9", "--ignore-eos", "--max-new-tokens", "3")
OF_CACHE = ("--preset", "paper", "--target-bits", "3", "--target-compression", "5", "--target-error", "0.5")


class Recorder:
    """Stands for routers and keeps what they are asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.metadata: list[Any] = []

    def inference(self, router: str | None, *, metadata: Any) -> contextlib.nullcontext[Recorder]:
        self.metadata.append(metadata)
        return contextlib.nullcontext(self)

    def stream(self, request: Any) -> Iterator[Any]:
        self.asked.append(request)
        yield generate_pb2.GenerateReply(finished=common_pb2.Finished())

    def once(self, call: Callable[[Any], Any]) -> Any:
        return call(self)

    def OpenSession(self, request: generate_pb2.OpenSessionRequest, timeout: float) -> Any:
        self.asked.append(request)
        return generate_pb2.OpenSessionReply(session_id="s")

    def CloseSession(self, request: Any, timeout: float) -> None:
        raise Unavailable("the router is gone")  # nobody has to be told: sessions expire


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(inference, "inference", made.inference)
    return made


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_every_sampling_parameter_has_an_option(recorder: Recorder) -> None:
    assert run("generate", "Hi", *ALL, *OF_TEXT, *OF_CACHE, "--tenant", "me").exit_code == 0
    assert run("chat", "Hi", *ALL).exit_code == 0
    request, opened, chat = recorder.asked
    for sampling in (request.sampling, chat.sampling):
        told = {field.name for field, _ in sampling.ListFields()}
        assert told == {field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields}
        assert dict(sampling.logit_bias) == {504: -100, 7: 2.5}
        assert (sampling.top_k, sampling.seed) == (40, 7)
    assert request.stop == common_pb2.StopParams(max_new_tokens=3, stop=["x", "y"], stop_token_ids=[9], ignore_eos=True)
    assert {field.name for field, _ in request.cache.ListFields()} == {
        field.name for field in common_pb2.CacheParams.DESCRIPTOR.fields
    }
    assert recorder.metadata == [(("qaq-tenant", "me"),), ()]
    assert not opened.HasField("cache")


def test_what_is_not_given_is_left_to_the_server(recorder: Recorder) -> None:
    assert run("generate", "Hi").exit_code == 0
    (request,) = recorder.asked
    assert request == generate_pb2.GenerateRequest(
        prompt="Hi", sampling=common_pb2.SamplingParams(), stop=common_pb2.StopParams(max_new_tokens=128)
    )
    assert recorder.metadata == [()]


def test_a_bias_that_is_none(recorder: Recorder) -> None:
    result = run("generate", "Hi", "--logit-bias", "many")
    assert result.exit_code == 2
    assert "TOKEN=BIAS" in result.output
    assert recorder.asked == []
