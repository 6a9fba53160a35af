"""Splits the text of an answer into content, reasoning and tool calls, with transformers' response parser."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from qaq_core.models import avoid_torch
from services.gateway.families import Template

_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = "tool_calls"


def load_parser() -> None:
    """Imports the parser, which takes a second at the first call."""
    avoid_torch()
    import transformers.utils.chat_parsing  # noqa: F401


@dataclass
class Parts:
    """What some text adds to an answer.

    Attributes:
        calls: complete tool calls, in OpenAI's format.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class AnswerReader:
    """Reads the answer of one choice as it arrives.

    A call that the parser cannot read stays in the content, and so does all that follows.

    Call `load_parser` before, in a thread.

    Args:
        opening: what the chat template puts before the answer.
        tools: as the template got them; arguments are converted to the types that they declare.

    Attributes:
        reasons: the text that comes next is reasoning.
    """

    def __init__(self, template: Template, opening: str, tools: list[dict[str, Any]]) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self._parser: Any = ResponseParser(template, prefix=opening, tools=tools)
        self._region = ""
        self._after: set[str] = set()  # fields whose text has begun; their leading whitespace is dropped before
        self._unread = ""  # text since the last event outside of a call
        self._take(self._parser.initial_events, Parts())

    @property
    def reasons(self) -> bool:
        return self._region in _REASONING

    def feed(self, text: str) -> Parts:
        """The parts that became certain with more text."""
        if self._parser is None:
            return Parts(content=text)
        self._unread += text
        try:
            return self._taken(self._parser.feed(text))
        except ValueError:
            return self._give_up()

    def finish(self) -> Parts:
        """The rest, at the end of the text."""
        if self._parser is None:
            return Parts()
        try:
            _, events = self._parser.finalize()
            return self._taken(events)
        except ValueError:
            return self._give_up()

    def _taken(self, events: list[dict[str, Any]]) -> Parts:
        parts = Parts()
        self._take(events, parts)
        for event in events if self._region == _CALLS else []:  # a call has begun after this text
            if event["type"] == "region_chunk" and event["field"] != _CALLS:
                self._unread = self._unread.partition(event["text"])[2]
        if events and self._region != _CALLS:
            self._unread = ""
        return parts

    def _take(self, events: list[dict[str, Any]], parts: Parts) -> None:
        for event in events:
            name = event["field"]
            match event["type"]:
                case "region_open":
                    self._region = name
                case "region_chunk" if name == "content":
                    parts.content += self._begun(name, event["text"])
                case "region_chunk" if name in _REASONING:
                    parts.reasoning += self._begun(name, event["text"])
                case "region_close":
                    self._region = ""
                    self._after.discard(name)
                    if name == _CALLS:
                        parts.calls += _calls(event["value"])

    def _begun(self, name: str, text: str) -> str:
        """The text, without whitespace between a mark and the first character."""
        if name in self._after:
            return text
        if text := text.lstrip():
            self._after.add(name)
        return text

    def _give_up(self) -> Parts:
        text, self._unread, self._parser = self._unread, "", None
        return Parts(content=text)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Calls in OpenAI's format, of what the parser made.

    Raises:
        ValueError: it has no name.
    """
    calls = []
    for each in value if isinstance(value, list) else [value]:
        function = each.get("function") if isinstance(each, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a tool call has no name")
        arguments = function.get("arguments", function.get("parameters", {}))  # some models write the second word
        told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        made = {"name": function["name"], "arguments": told}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": made})
    return calls
