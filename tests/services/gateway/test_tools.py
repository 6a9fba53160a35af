"""Tools and constraints over HTTP, with a model whose chat template knows tools."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai as api
import pytest
from openai import AsyncOpenAI
from qaq.v1 import common_pb2
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from services.common.embedded_redis import EmbeddedRedis
from services.gateway import families
from tests.services.common.templates import CHAT_TEMPLATE
from tests.services.gateway.conftest import Served, running_stack

ASK = [{"role": "user", "content": "How is the weather in Bern?"}]
ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Paris"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": ARGUMENTS}}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
HOT = {"temperature": 1, "seed": 7, "max_tokens": 150}


@pytest.fixture(scope="module")
def model(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """One whose tokenizer has a chat template with tools, and says how calls are written; and where that one is."""
    tokenizer, path = copy.copy(smollm2.tokenizer), tmp_path_factory.mktemp("tools")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = families.template(common_pb2.ModelInfo(model_type="qwen3"))
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return dataclasses.replace(smollm2, tokenizer=tokenizer, source=str(path)), path


@pytest.fixture
async def tooled(
    redis: Redis, redis_server: EmbeddedRedis, model: tuple[LoadedModel, Path]
) -> AsyncIterator[AsyncOpenAI]:
    """A client of a stack with that model."""
    async with (
        running_stack(redis_server, *model) as stack,
        AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        yield client


async def ask(client: AsyncOpenAI, **fields: Any) -> Any:
    return await client.chat.completions.create(**({"model": "", "messages": ASK} | HOT | fields))


async def test_calls_that_are_required(tooled: AsyncOpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = await ask(tooled, tools=[WEATHER, TIME], tool_choice=choice, parallel_tool_calls=False)
        (found,) = answer.choices
        assert found.finish_reason == "tool_calls"
        assert found.message.content is None
        (call,) = found.message.tool_calls
        if call.function.name == "weather":
            jsonschema.validate(json.loads(call.function.arguments), ARGUMENTS)
        else:
            assert (choice, call.function.name) == ("required", "time")
    stream = await ask(tooled, tools=[WEATHER], tool_choice=named, stream=True)
    deltas = [chunk.choices[0] async for chunk in stream]
    (part,) = [part for each in deltas for part in each.delta.tool_calls or []]
    assert (part.index, part.type, part.function.name) == (0, "function", "weather")
    jsonschema.validate(json.loads(part.function.arguments), ARGUMENTS)
    assert deltas[-1].finish_reason == "tool_calls"
    assert not any(each.delta.content for each in deltas)
    # The answer to the call: the template has its history, and the text is plain again.
    history = [
        *ASK,
        {"role": "assistant", "tool_calls": [part.model_dump(exclude={"index"})]},
        {"role": "tool", "tool_call_id": part.id, "content": "12 degrees"},
    ]
    answer = await ask(tooled, messages=history, tools=[WEATHER], max_tokens=8)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content


async def test_tokens_of_a_chat_with_tools(tooled: AsyncOpenAI) -> None:
    """/tokenize gives the prompt that a chat computes."""
    variables = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = await ask(tooled, tools=[WEATHER, TIME], max_tokens=1, extra_body=variables)
    path, more = f"{str(tooled.base_url).removesuffix('/v1/')}/tokenize", {"tools": [WEATHER, TIME], **variables}
    counts = {}
    for name, fields in (("plain", {}), ("whole", more)):
        reply: Any = await tooled.post(path, cast_to=object, body={"messages": ASK, **fields})
        counts[name] = reply["count"]
    assert counts["plain"] < counts["whole"] == answer.usage.prompt_tokens
    with pytest.raises(api.BadRequestError, match="are for messages"):
        await tooled.post(path, cast_to=object, body={"prompt": "x", **more})


async def test_log_probabilities_of_calls(tooled: AsyncOpenAI) -> None:
    """They are of all tokens, whatever the text becomes."""
    named = {"type": "function", "function": {"name": "weather"}}
    answer = await ask(tooled, tools=[WEATHER], tool_choice=named, logprobs=True, top_logprobs=1)
    (found,) = answer.choices
    assert found.message.tool_calls
    text = b"".join(bytes(token.bytes) for token in found.logprobs.content).decode()
    assert text.startswith('<tool_call>\n{"name": "weather"')
    assert len(found.logprobs.content) == answer.usage.completion_tokens


async def test_reasoning_and_constraints(tooled: AsyncOpenAI) -> None:
    thinking = {"chat_template_kwargs": {"always_thinking": True}}
    answer = await ask(tooled, max_tokens=6, extra_body=thinking)
    message = answer.choices[0].message
    assert message.reasoning_content
    assert not message.content
    with pytest.raises(api.BadRequestError, match="begins every answer with reasoning"):
        await ask(tooled, extra_body=thinking | {"guided_regex": "[a-z]{3}"})
    answer = await ask(tooled, extra_body={"guided_regex": "[a-z]{3}"})
    assert re.fullmatch("[a-z]{3}", answer.choices[0].message.content)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tools": [WEATHER, WEATHER]}, "two tools have the same name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "not among the tools"),
        ({"tool_choice": "required"}, "there are no tools"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "leaves no room for tool_choice",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs has tokenize"),
    ],
)
async def test_refuses_with_what_to_change(tooled: AsyncOpenAI, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(api.BadRequestError, match=sentence):
        await ask(tooled, **fields)


async def test_formats_and_extensions(openai: AsyncOpenAI, served: Served) -> None:
    """With a model whose template knows neither tools nor reasoning."""
    named = {"type": "json_schema", "json_schema": {"name": "args", "schema": ARGUMENTS, "strict": True}}
    answer = await ask(openai, response_format=named)
    jsonschema.validate(json.loads(answer.choices[0].message.content), ARGUMENTS)
    for body in (
        {"guided_json": ARGUMENTS},
        {"guided_json": json.dumps(ARGUMENTS)},
        {"structured_outputs": {"json": ARGUMENTS}},
    ):
        answer = await openai.completions.create(model="", prompt="Arguments: ", **HOT, extra_body=body)
        jsonschema.validate(json.loads(answer.choices[0].text), ARGUMENTS)
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "fine"}}
    for body, fits in (
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_grammar": 'root ::= "a" | "b"'}, "a|b"),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, "red|blue"),
        ({"structured_outputs": {"structural_tag": tag}}, "fine"),
    ):
        answer = await ask(openai, extra_body=body)
        assert re.fullmatch(fits, answer.choices[0].message.content), body
    with pytest.raises(api.BadRequestError, match="response_format, guided_regex are set; send one"):
        await ask(openai, response_format={"type": "json_object"}, extra_body={"guided_regex": "a"})
    strange = {"type": "strange"}
    unique = named | {"json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    for fields, param, sentence in (
        (
            {"extra_body": {"guided_json": strange}, "stream": True},
            "guided_json",
            "guided_json cannot be compiled: Uns",
        ),
        ({"response_format": unique}, "response_format", "response_format: .*uniqueItems"),
        ({"extra_body": {"structured_outputs": {"regex": "a{5000}"}}}, "structured_outputs", "outputs.regex repeats"),
    ):
        with pytest.raises(api.BadRequestError, match=sentence) as caught:
            await ask(openai, **fields)
        assert caught.value.param == param
    with pytest.raises(api.BadRequestError, match=r"not known how .* writes tool calls"):
        await ask(openai, tools=[WEATHER])
