"""Limits of tools, template variables and tool calls, checked before a chat template sees them."""

from __future__ import annotations

from typing import Any

from qaq.v1 import generate_pb2

from services.common.errors import InvalidArgument
from services.common.json_text import check_size, parsed
from services.common.limits import MAX_TEMPLATE_KWARGS_BYTES, MAX_TOOL_CALLS, MAX_TOOLS, MAX_TOOLS_BYTES

Asked = generate_pb2.ChatRequest | generate_pb2.TokenizeRequest


def tools(request: Asked) -> list[dict[str, Any]]:
    """The tools of a request, parsed.

    Raises:
        InvalidArgument: names the field and its limit.
    """
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
    """More variables of the chat template, parsed; raises as `tools`."""
    if not request.chat_template_kwargs:
        return {}
    check_size("chat_template_kwargs", request.chat_template_kwargs, MAX_TEMPLATE_KWARGS_BYTES)
    variables = parsed("chat_template_kwargs", request.chat_template_kwargs)
    if not isinstance(variables, dict):
        raise InvalidArgument("chat_template_kwargs is not a JSON object; send one, or leave it unset")
    return variables


def message(place: int, sent: generate_pb2.ChatMessage) -> dict[str, Any]:
    """A message as chat templates expect it; raises as `tools`."""
    told: dict[str, Any] = {"role": sent.role, "content": sent.content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if text := getattr(sent, name):
            told[name] = text
    if sent.tool_calls_json:
        told["tool_calls"] = _tool_calls(f"messages[{place}].tool_calls_json", sent.tool_calls_json)
    return told


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
