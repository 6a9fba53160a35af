"""Limits of tools, template variables and tool calls."""

from __future__ import annotations

from typing import Any

import pytest
from qaq.v1 import generate_pb2

from services.common.errors import InvalidArgument
from services.router.prompts import Conversation

KIB = 1024


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tools": ["{}"] * 129}, "tools has 129 entries; send at most 128"),
        ({"tools": ["x" * (256 * KIB + 1)]}, "tools is 262145 bytes"),
        ({"tools": ["{"]}, "tools[0] is not JSON"),
        ({"tools": ['{"type": "function", "type": "x"}']}, 'tools[0]: an object has the key "type" twice'),
        ({"tools": ['{"type": "function"}']}, "tools[0] is not"),
        ({"tools": ["[" * 100 + "]" * 100]}, "more than 64 levels deep"),
        ({"chat_template_kwargs": "[]"}, "not a JSON object"),
        ({"chat_template_kwargs": " " * (16 * KIB + 1)}, "chat_template_kwargs is 16385 bytes"),
        ({"calls": "{}"}, "messages[0].tool_calls_json is not a JSON array of at most 128 calls"),
        ({"calls": "[1]"}, "messages[0].tool_calls_json[0] is not"),
        ({"calls": '[{"function": {"name": "f", "arguments": "["}}]'}, "arguments is not JSON"),
        ({"calls": '[{"function": {"name": "f", "arguments": "[]"}}]'}, "arguments is not a JSON object"),
    ],
)
def test_refuses_a_conversation_with_what_to_change(fields: dict[str, Any], sentence: str) -> None:
    calls = fields.pop("calls", "")
    message = generate_pb2.ChatMessage(role="assistant", tool_calls_json=calls)
    with pytest.raises(InvalidArgument) as caught:
        Conversation.of(generate_pb2.ChatRequest(messages=[message], **fields))
    assert sentence in caught.value.message
