"""The calls that a constraint allows are those that the parser reads, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xgrammar
from qaq.v1 import common_pb2, generate_pb2

from qaq_core.models import load_tokenizer
from services.common.errors import FailedPrecondition
from services.gateway import families, tools
from services.gateway.answers import AnswerReader

WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    },
}
CALLS = {
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>',
    "qwen3_5": "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
    "gemma4": '<|tool_call>call:weather{city:<|"|>Bern<|"|>,days:2}<tool_call|>',
}


@pytest.fixture(scope="module")
def compiler(model_path: Path) -> xgrammar.GrammarCompiler:
    tokenizer = load_tokenizer(str(model_path))
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[tokenizer.eos_token_id])
    return xgrammar.GrammarCompiler(info, max_threads=1)


def model(family: str) -> common_pb2.ModelInfo:
    return common_pb2.ModelInfo(name="it", model_type=family)


def asked(family: str, **fields: Any) -> generate_pb2.ChatRequest:
    """The request to the router that a body becomes."""
    body = tools.Tooled.model_validate({"tools": [{"type": "function", "function": WEATHER}]} | fields)
    request = generate_pb2.ChatRequest()
    tools.prepare(body, request, model(family))
    return request


@pytest.mark.parametrize("family", CALLS)
def test_what_is_allowed_is_read(compiler: xgrammar.GrammarCompiler, family: str) -> None:
    call = CALLS[family]
    reader = AnswerReader(families.template(model(family)) or {}, "", [{"type": "function", "function": WEATHER}])
    parts = [reader.feed(call), reader.finish()]
    (found,) = [each["function"] for part in parts for each in part.calls]
    assert (found["name"], json.loads(found["arguments"])) == ("weather", {"city": "Bern", "days": 2})

    def allowed(text: str, **fields: Any) -> bool:
        tag = asked(family, **fields).constraint.structural_tag
        matcher = xgrammar.GrammarMatcher(compiler.compile_structural_tag(tag))
        return bool(matcher.accept_string(text) and matcher.is_completed())

    wrong, two = call.replace("2", "two"), f"{call}\n{call}"
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        assert allowed(call, tool_choice=choice)
        assert not allowed("", tool_choice=choice)
        assert not allowed(f"Well. {call}", tool_choice=choice)
        assert not allowed(wrong, tool_choice=choice)
        assert allowed(two, tool_choice=choice) == (choice == "required")
    assert not allowed(two, tool_choice="required", parallel_tool_calls=False)
    for text, fits in (("Well.", True), (f"Well. {call}", True), (f"Well. {wrong}", False), (two, False)):
        assert allowed(text, parallel_tool_calls=False) == fits, text


def test_auto_is_no_constraint() -> None:
    request = asked("qwen3", tool_choice="auto")
    assert request.constraint.WhichOneof("kind") is None
    assert (len(request.tools), request.opening, request.output.special_tokens) == (1, True, True)
    assert asked("qwen3", tool_choice="none").tools == []


def test_an_unknown_form_of_calls_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="not known how it writes tool calls; leave tools out"):
        asked("llama")
    own = {
        "start_anchor": "A",
        "fields": {"tool_calls": {"open": "[", "close": "]", "content": "json"}, "content": {}},
    }
    odd = common_pb2.ModelInfo(name="it", response_template=json.dumps(own))
    body = tools.Tooled.model_validate({"tools": [{"type": "function", "function": WEATHER}]})
    assert tools.prepare(body, generate_pb2.ChatRequest(), odd) is not None
    body.tool_choice = "required"
    with pytest.raises(FailedPrecondition, match="send tool_choice auto"):
        tools.prepare(body, generate_pb2.ChatRequest(), odd)
