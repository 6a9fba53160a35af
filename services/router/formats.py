"""Limits of constraints, tools and template variables, checked before anything parses them."""

from __future__ import annotations

import json
import re
from typing import Any

from qaq.v1 import common_pb2, generate_pb2

from services.common.errors import InvalidArgument
from services.common.limits import (
    MAX_CHOICE_BYTES,
    MAX_CHOICE_TEXTS,
    MAX_DEPTH,
    MAX_GRAMMAR_BYTES,
    MAX_REGEX_BYTES,
    MAX_REPEATS,
    MAX_SCHEMA_BYTES,
    MAX_STRUCTURAL_TAG_BYTES,
    MAX_TEMPLATE_KWARGS_BYTES,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
)

Asked = generate_pb2.ChatRequest | generate_pb2.TokenizeRequest

# Strings of a JSON text, whose brackets do not count as nesting.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[{}\]]")
_REPEATS = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


def constraint(request: common_pb2.Constraint) -> None:
    """Raises:
    InvalidArgument: names the field and its limit.
    """
    match request.WhichOneof("kind"):
        case "json_schema":
            _size("constraint.json_schema", request.json_schema, MAX_SCHEMA_BYTES)
            _patterns("constraint.json_schema", parsed("constraint.json_schema", request.json_schema))
        case "json_object" if not request.json_object:
            raise InvalidArgument("constraint.json_object is false; send true, or no constraint")
        case "regex":
            _size("constraint.regex", request.regex, MAX_REGEX_BYTES)
            _repeats("constraint.regex", request.regex)
        case "grammar":
            _size("constraint.grammar", request.grammar, MAX_GRAMMAR_BYTES)
            _repeats("constraint.grammar", request.grammar)
        case "choice":
            _choice(request.choice)
        case "structural_tag":
            _size("constraint.structural_tag", request.structural_tag, MAX_STRUCTURAL_TAG_BYTES)
            _patterns("constraint.structural_tag", parsed("constraint.structural_tag", request.structural_tag))


def tools(request: Asked) -> list[dict[str, Any]]:
    """The tools of a request, parsed; raises as `constraint`."""
    if len(request.tools) > MAX_TOOLS:
        raise InvalidArgument(f"tools has {len(request.tools)} entries; send at most {MAX_TOOLS}")
    size = sum(len(tool.encode()) for tool in request.tools)
    if size > MAX_TOOLS_BYTES:
        raise InvalidArgument(f"tools is {size} bytes of UTF-8; send at most {MAX_TOOLS_BYTES}")
    found = [parsed(f"tools[{place}]", tool) for place, tool in enumerate(request.tools)]
    for place, tool in enumerate(found):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidArgument(f'tools[{place}] is not {{"type": "function", "function": {{"name": …}}}}')
    return found


def template_kwargs(request: Asked) -> dict[str, Any]:
    """More variables of the chat template, parsed; raises as `constraint`."""
    if not request.chat_template_kwargs:
        return {}
    _size("chat_template_kwargs", request.chat_template_kwargs, MAX_TEMPLATE_KWARGS_BYTES)
    variables = parsed("chat_template_kwargs", request.chat_template_kwargs)
    if not isinstance(variables, dict):
        raise InvalidArgument("chat_template_kwargs is not a JSON object; send one, or leave it unset")
    return variables


def message(place: int, sent: generate_pb2.ChatMessage) -> dict[str, Any]:
    """A message as chat templates expect it; raises as `constraint`."""
    told: dict[str, Any] = {"role": sent.role, "content": sent.content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if text := getattr(sent, name):
            told[name] = text
    if sent.tool_calls_json:
        told["tool_calls"] = _tool_calls(f"messages[{place}].tool_calls_json", sent.tool_calls_json)
    return told


def parsed(field: str, text: str) -> Any:
    """A JSON value that is at most `MAX_DEPTH` levels deep; raises as `constraint`."""
    depth = deepest = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise InvalidArgument(f"{field} is {deepest} levels deep; send at most {MAX_DEPTH}")
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"{field} is not JSON: {error}") from error


def _tool_calls(field: str, text: str) -> list[dict[str, Any]]:
    calls = parsed(field, text)
    if not isinstance(calls, list) or len(calls) > MAX_TOOL_CALLS:
        raise InvalidArgument(f"{field} is not a JSON array of at most {MAX_TOOL_CALLS} calls")
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidArgument(f'{field}[{place}] is not {{"type": "function", "function": {{"name": …}}}}')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # as OpenAI's API has them; templates take objects
            arguments = parsed(f"{field}[{place}].function.arguments", arguments or "{}")
        if not isinstance(arguments, dict):
            raise InvalidArgument(f"{field}[{place}].function.arguments is not a JSON object")
        function["arguments"] = arguments
    return calls


def _choice(choice: common_pb2.Constraint.Choice) -> None:
    texts = choice.texts
    if not 1 <= len(texts) <= MAX_CHOICE_TEXTS:
        raise InvalidArgument(f"constraint.choice has {len(texts)} texts; send 1 to {MAX_CHOICE_TEXTS}")
    if not all(texts):
        raise InvalidArgument("constraint.choice has an empty text; leave it out")
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_CHOICE_BYTES:
        raise InvalidArgument(f"constraint.choice is {size} bytes of UTF-8; send at most {MAX_CHOICE_BYTES}")
    if len(set(texts)) < len(texts):
        raise InvalidArgument("constraint.choice has the same text twice; send it once")


def _patterns(field: str, value: Any) -> None:
    """Checks the regular expressions and grammars in a schema or a structural tag."""
    if isinstance(value, list):
        for part in value:
            _patterns(field, part)
    if isinstance(value, dict):
        for key, part in value.items():
            if key in ("pattern", "grammar") and isinstance(part, str):
                _repeats(field, part)
            elif key == "patternProperties" and isinstance(part, dict):
                for pattern in part:
                    _repeats(field, pattern)
            _patterns(field, part)


def _repeats(field: str, text: str) -> None:
    """A large count, as in [a-z]{1,100000}, takes minutes to compile."""
    largest = max((int(count) for found in _REPEATS.findall(text) for count in found if count), default=0)
    if largest > MAX_REPEATS:
        raise InvalidArgument(f"{field} repeats something {largest} times; write at most {MAX_REPEATS}, or * or +")


def _size(field: str, text: str, limit: int) -> None:
    size = len(text.encode())
    if size == 0:
        raise InvalidArgument(f"{field} is empty; leave it unset")
    if size > limit:
        raise InvalidArgument(f"{field} is {size} bytes of UTF-8; send at most {limit}")
