"""SMG, the real program, in front of two routers: what it brings works with this engine's protocol."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from openai import OpenAI
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc

from .conftest import Run
from .smg import Smg, in_front_of
from .stack import Stack

QUESTION: list[Any] = [{"role": "user", "content": "Name the capital of France."}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def smg(stack: Stack, clients: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Smg]:
    if not (clients / "smg").exists():
        pytest.skip("smg is not installed; it has wheels for Linux and macOS only")
    log = tmp_path_factory.mktemp("smg") / "log"
    with in_front_of(clients / "smg", stack.routers, log, "--tool-call-parser", "qwen") as smg:
        yield smg


@pytest.fixture(scope="module")
def client(smg: Smg) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{smg.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def engine(address: str, method: str, request: Any) -> Any:
    """An answer of a router's `VllmEngine`."""
    with grpc.insecure_channel(address) as channel:
        return getattr(vllm_engine_pb2_grpc.VllmEngineStub(channel), method)(request, timeout=30)


def until(holds: Callable[[], bool]) -> None:
    """Waits for something of other threads; the test's own timeout ends a wait in vain."""
    while not holds():
        time.sleep(0.05)


def test_chat(client: OpenAI, stack: Stack) -> None:
    said = client.chat.completions.create(model=stack.model, messages=QUESTION, max_tokens=20, temperature=0)
    assert "Paris" in (said.choices[0].message.content or "")
    assert said.usage is not None
    assert said.usage.completion_tokens <= 20


def test_the_gateway_gives_the_same_answer(client: OpenAI, stack: Stack) -> None:
    asked: Any = {"model": stack.model, "messages": QUESTION, "max_tokens": 20, "temperature": 0}
    with OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=120) as gateway:
        ours, theirs = (each.chat.completions.create(**asked) for each in (gateway, client))
    assert theirs.choices[0].message.content == ours.choices[0].message.content
    assert theirs.choices[0].finish_reason == ours.choices[0].finish_reason
    assert theirs.usage.prompt_tokens == ours.usage.prompt_tokens


def test_a_stream(client: OpenAI, stack: Stack) -> None:
    parts = client.chat.completions.create(
        model=stack.model, messages=QUESTION, max_tokens=20, temperature=0, stream=True
    )
    texts = [part.choices[0].delta.content for part in parts if part.choices]
    assert "Paris" in "".join(text or "" for text in texts)
    assert len(texts) > 3


def test_choices_stop_strings_and_log_probabilities(client: OpenAI, stack: Stack) -> None:
    said = client.chat.completions.create(
        model=stack.model,
        messages=QUESTION,
        max_tokens=20,
        temperature=0,
        n=2,
        stop=["Paris"],
        logprobs=True,
        top_logprobs=2,
    )
    assert [choice.finish_reason for choice in said.choices] == ["stop", "stop"]
    assert all("Paris" not in (choice.message.content or "") for choice in said.choices)
    scored = said.choices[0].logprobs
    assert scored is not None
    assert scored.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in scored.content)


def test_completions(client: OpenAI, stack: Stack) -> None:
    said = client.completions.create(model=stack.model, prompt="The capital of France is", max_tokens=8, temperature=0)
    assert "Paris" in said.choices[0].text


def test_responses(client: OpenAI, stack: Stack) -> None:
    said = client.responses.create(
        model=stack.model, input="Name the capital of France.", max_output_tokens=20, temperature=0
    )
    assert "Paris" in said.output_text


def test_messages(smg: Smg, stack: Stack) -> None:
    said = smg.post("/v1/messages", model=stack.model, messages=QUESTION, max_tokens=20, temperature=0)
    assert "Paris" in said["content"][0]["text"]


def test_tokenize(smg: Smg, stack: Stack, tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    said = smg.post("/v1/tokenize", model=stack.model, prompt="Once upon a time")
    assert said["tokens"] == AutoTokenizer.from_pretrained(tokenizer_dir)("Once upon a time")["input_ids"]


def test_a_json_schema(client: OpenAI, stack: Stack) -> None:
    said = client.chat.completions.create(
        model=stack.model,
        messages=QUESTION,
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": CITY}},
    )
    assert json.loads(said.choices[0].message.content or "") in ({"city": "Paris"}, {"city": "Rome"})


def test_a_tool_that_must_be_called(client: OpenAI, stack: Stack) -> None:
    """Any number of times, which a model this small goes on with until the penalty ends the array."""
    said = client.chat.completions.create(
        model=stack.model,
        messages=[{"role": "user", "content": "What is the weather in Rome?"}],
        max_tokens=400,
        temperature=0,
        frequency_penalty=2,
        tools=[WEATHER],
        tool_choice="required",
    )
    calls = said.choices[0].message.tool_calls
    assert calls, said.model_dump_json()
    assert said.choices[0].finish_reason == "tool_calls"
    for call in calls:
        assert call.type == "function"
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == {"city"}


def test_langchain_calls_a_tool(run: Run, smg: Smg, stack: Stack) -> None:
    got = json.loads(run("langchain_client.py", smg.url, stack.model, "weather").splitlines()[-1])
    assert "Paris" in got["answer"]
    assert "".join(got["streamed"]) == got["answer"]
    assert got["structured"] in ("Paris", "Rome")
    ((name, arguments),) = got["called"]
    assert name == "weather"
    assert arguments["city"] in ("Paris", "Rome")
    assert got["weather"] == [f"It rains in {arguments['city']}."]


def test_a_tool_that_may_be_called(client: OpenAI, stack: Stack) -> None:
    """A model this small calls none by itself; the request and its answer are sound all the same."""
    said = client.chat.completions.create(
        model=stack.model, messages=QUESTION, max_tokens=20, temperature=0, tools=[WEATHER], tool_choice="auto"
    )
    assert said.choices[0].message.content or said.choices[0].message.tool_calls


def test_a_client_that_leaves_frees_the_sequence(client: OpenAI, stack: Stack) -> None:
    stream = client.chat.completions.create(
        model=stack.model, messages=QUESTION, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(3):
        next(iter(stream))
    running = [engine(router, "GetServerInfo", vllm.GetServerInfoRequest()) for router in stack.routers]
    assert sum(each.active_requests for each in running) == 1
    stream.close()
    until(lambda: all(_idle(router) for router in stack.routers))


def _idle(router: str) -> bool:
    server = engine(router, "GetServerInfo", vllm.GetServerInfoRequest())
    (load,) = engine(router, "GetLoads", vllm.GetLoadsRequest()).loads
    return bool(server.active_requests == load.num_total_reqs == 0)


def test_both_routers_are_asked_and_one_is_enough(client: OpenAI, stack: Stack) -> None:
    """The last test, as a router goes."""
    asked: Any = {"model": stack.model, "messages": QUESTION, "max_tokens": 4, "temperature": 0}
    before = time.time()
    answers = [client.chat.completions.create(**asked).choices[0].message.content for _ in range(4)]
    servers = [engine(router, "GetServerInfo", vllm.GetServerInfoRequest()) for router in stack.routers]
    assert all(server.last_receive_timestamp >= before for server in servers)
    stack.stop(stack.routers[0])
    answers += [client.chat.completions.create(**asked).choices[0].message.content for _ in range(4)]
    assert len(set(answers)) == 1
