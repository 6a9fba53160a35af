"""Bodies as clients send them: what is accepted, and what is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError
from qaq.v1 import common_pb2, generate_pb2

from services.common.errors import InvalidArgument
from services.gateway import errors, requests, tools
from services.gateway.schema import ChatRequest, CompletionRequest

ASK = {"role": "user", "content": "Hello"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "strict": None, "parameters": None}}
MODEL = common_pb2.ModelInfo(name="small")


def chat(*messages: Any, **fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": list(messages or [ASK]), **fields})


def test_an_answer_is_sent_back_as_it_came() -> None:
    answer = ChatCompletionMessage(role="assistant", content="Hi.", annotations=[], tool_calls=[]).model_dump()
    assert None in answer.values()
    litellm = {"content": "Hi.", "role": "assistant", "tool_calls": None, "function_call": None, "annotations": None}
    for back in (answer, litellm, answer | {"audio": None, "refusal": None, "function_call": None}):
        told = requests.messages(chat(ASK, back, ASK).messages)
        assert told[1] == generate_pb2.ChatMessage(role="assistant", content="Hi.")


def test_calls_are_sent_back_as_they_came() -> None:
    """With nulls and fields of other clients."""
    call = {"id": "call_1", "index": 0, "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None, "refusal": None, "audio": None, "function_call": None}
    back = answer | {"tool_calls": [call], "reasoning_content": "Well."}
    told = requests.messages(chat(ASK, back, {"role": "tool", "tool_call_id": "call_1", "content": "12"}).messages)
    assert json.loads(told[1].tool_calls_json) == [{key: call[key] for key in ("id", "type", "function")}]
    assert (told[1].content, told[1].reasoning_content) == ("", "Well.")
    assert (told[2].role, told[2].tool_call_id, told[2].content) == ("tool", "call_1", "12")


def test_tools_reach_the_router_as_they_are() -> None:
    """Nulls within a schema mean something, those of a tool's fields do not."""
    parameters = {"type": "object", "properties": {"unit": {"enum": ["C", None], "default": None}}, "required": []}
    body = chat(ASK, tools=[TOOL, {"type": "function", "function": {"name": "f", "parameters": parameters}}])
    first, second = (json.loads(tool) for tool in tools.as_sent(body.tools or []))
    assert first == {"type": "function", "function": {"name": "weather"}}
    assert second["function"]["parameters"] == parameters
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": parameters, "strict": None}}
    asked = requests.chat(chat(ASK, response_format=named), MODEL)
    assert json.loads(asked.constraint.json_schema) == parameters


def test_an_assistants_content_may_be_null() -> None:
    told = requests.messages(chat(ASK, {"role": "assistant", "content": None}).messages)
    assert told[1] == generate_pb2.ChatMessage(role="assistant")
    refused = requests.messages(chat(ASK, {"role": "assistant", "content": None, "refusal": "No."}).messages)
    assert refused[1].content == "No."
    for role in ("user", "system", "tool"):
        with pytest.raises(ValidationError, match="content is missing"):
            chat({"role": role, "content": None})


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True, "parallel_tool_calls": True, "reasoning_effort": "low", "tool_choice": "auto", "model": None},
        {"n": None, "stream": None, "stop": None, "logprobs": None, "tools": None, "functions": None, "audio": None},
        {"stream": False, "stream_options": None, "top_k": -1, "tools": [], "modalities": ["text"]},
        {"user": {"any": "thing"}, "metadata": {"a": "b"}, "service_tier": "auto", "prediction": {"type": "content"}},
        {"skip_special_tokens": True, "add_generation_prompt": True, "echo": False, "use_beam_search": False},
        {"min_tokens": 2, "response_format": {"type": "text"}, "prompt_cache_key": "k", "web_search_options": None},
    ],
)
def test_what_changes_nothing_is_accepted(fields: dict[str, Any]) -> None:
    asked = requests.chat(chat(ASK | {"name": "Ada"}, **fields), MODEL)
    assert (asked.choices, asked.sampling.top_k, asked.model) == (1, 0, "")
    assert [(message.role, message.content) for message in asked.messages] == [("user", "Hello")]


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"verbosity": "high"}, "verbosity"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"n": 0}, "n"),
        ({"n": 2**31}, "n"),
        ({"n": 10**400}, "n"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"prompt_logprobs": 10**9}, "prompt_logprobs"),
        ({"temperature": 1e999}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"session_id": "x" * 129}, "session_id"),
        ({"model": "x" * 257}, "model"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options"),
        ({"messages": [ASK] * 4097}, "messages"),
        ({"messages": [ASK | {"role": "function"}]}, "role"),
        ({"messages": [ASK | {"role": "wizard"}]}, "role"),
        ({"messages": [ASK | {"audio": {"id": "x"}}]}, "audio"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "content"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [TOOL | {"type": "custom"}]}, "tools"),
        ({"tools": [TOOL | {"other": 1}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x" * 257}}}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"functions": [TOOL["function"]]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        ({"guided_regex": "x" * 4097}, "guided_regex"),
        ({"guided_grammar": "x" * 65537}, "guided_grammar"),
        ({"guided_json": "x" * 65537}, "guided_json"),
        ({"guided_choice": ["x"] * 1025}, "guided_choice"),
        ({"structured_outputs": {"choice": ["x"] * 1025}}, "choice"),
        ({"structured_outputs": {"json": {}, "disable_fallback": True}}, "disable_fallback"),
        ({"messages": [ASK | {"tool_calls": [{"function": {"name": "f"}}] * 129}]}, "tool_calls"),
        ({"messages": [ASK | {"tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}]}, "tool_calls"),
        ({f"field{place}": 1 for place in range(200)}, ""),
    ],
)
def test_what_would_change_the_answer_is_refused(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"messages": [ASK], **fields})
    assert any(place in each["loc"] or not place for each in caught.value.errors())
    assert len(caught.value.errors()) < 5


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options is for streams alone"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs is not possible in a stream"),
        ({"best_of": 3}, "best_of is 3"),
        ({"prompt": ["x"] * 64, "n": 16}, "n is 16, which makes 1024 answers; ask for at most 256"),
    ],
)
def test_fields_that_do_not_fit_together(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        CompletionRequest.model_validate({"prompt": "x", **fields})


@pytest.mark.parametrize("prompt", ["x", [1, 2], ["x", "y"], [[1, 2], "y"]])
def test_prompts(prompt: Any) -> None:
    body = CompletionRequest.model_validate({"prompt": prompt, "best_of": 1})
    assert len(requests.completions(body, MODEL)) == len(body.prompts)


@pytest.mark.parametrize("prompt", [None, [], [[]], 5, ["x"] * 65, [-1], [2**31], [["x"] * 1_000_000], [1, "x"] * 1000])
def test_prompts_that_are_refused(prompt: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": prompt})
    assert len(caught.value.errors()) < 8


def test_an_unset_temperature() -> None:
    """Where the model's own default is greedy, it is OpenAI's: several choices are expected to differ."""
    sampling = {"temperature": 0.6, "top_p": 0.9}
    own = common_pb2.ModelInfo(name="own", sampling=sampling)
    assert requests.chat(chat(), MODEL).sampling.temperature == 1
    assert requests.chat(chat(), own).sampling.temperature == pytest.approx(0.6)
    assert requests.chat(chat(temperature=0), own).sampling.temperature == 0
    assert not requests.chat(chat(), own).sampling.HasField("top_p")  # the worker knows it


def test_usage_so_far_is_told_where_usage_is() -> None:
    """As vLLM has it."""
    for wanted, continuous in ((True, True), (True, False), (False, True), (False, False)):
        body = chat(stream=True, stream_options={"include_usage": wanted, "continuous_usage_stats": continuous})
        assert (body.usage_wanted, body.usage_in_chunks) == (wanted, wanted and continuous)


@pytest.mark.parametrize(
    ("message", "fields", "param", "said"),
    [
        ("stop.max_new_tokens is 9; lower it", {"max_completion_tokens": 9}, "max_completion_tokens", "is 9; lower it"),
        ("stop.max_new_tokens is 9; lower it", {"max_tokens": 9}, "max_tokens", "is 9; lower it"),
        ("prompt is 9 tokens; shorten it", {}, "messages", "are 9 tokens; shorten it"),
        ("output.top_logprobs needs output.logprobs; set it", {}, "top_logprobs", "needs logprobs; set it"),
        ("stop.min_new_tokens is 3; send 0 to stop.max_new_tokens", {}, "min_tokens", "is 3; send 0 to max_tokens"),
    ],
)
def test_an_error_names_the_field_that_was_sent(message: str, fields: dict[str, Any], param: str, said: str) -> None:
    refused = InvalidArgument(message, reason="context_length_exceeded", limits=[("x-ratelimit-limit-requests", "1")])
    told = requests.retold(refused, chat(**fields))
    error = errors.body(told)["error"]
    assert (error["param"], error["message"], error["code"]) == (param, f"{param} {said}", "context_length_exceeded")
    assert errors.response(told).headers["x-ratelimit-limit-requests"] == "1"
