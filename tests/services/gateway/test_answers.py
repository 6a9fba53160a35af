"""Reading answers that a chat template has rendered, piece by piece."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from qaq.v1 import common_pb2
from transformers.utils.chat_template_utils import render_jinja_template

from services.gateway import families
from services.gateway.answers import AnswerReader, Parts
from tests.services.common.templates import CHAT_TEMPLATE

OPENING = "<|im_start|>assistant\n"
HERMES: Any = families.template(common_pb2.ModelInfo(model_type="qwen3"))
QWEN_XML = families.template(common_pb2.ModelInfo(model_type="qwen3_5"))
GEMMA = families.template(common_pb2.ModelInfo(model_type="gemma4"))
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"properties": {"days": {"type": "integer"}, "city": {}}}},
    }
]


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city, "days": 2}}}


def rendered(message: dict[str, Any]) -> str:
    """What a model would have written, and the mark of its end."""
    (text,), _ = render_jinja_template([[message]], chat_template=CHAT_TEMPLATE)
    return str(text).partition(OPENING)[2].removesuffix("\n")


def read(template: Any, text: str, size: int, opening: str = OPENING) -> Parts:
    reader, whole = AnswerReader(template, opening, TOOLS), Parts()
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    for part in [*map(reader.feed, pieces), reader.finish()]:
        whole.content += part.content
        whole.reasoning += part.reasoning
        whole.calls += part.calls
    return whole


def called(parts: Parts) -> list[tuple[str, Any]]:
    return [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in parts.calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "message",
    [
        {"content": "It is < 20 degrees, <b>I think</b>."},
        {"content": "I look.", "tool_calls": [call("Bern"), call('Zürich "city" <x>')]},
        {"content": "", "tool_calls": [call("Bern")]},
        {"content": "Fine.", "reasoning_content": "The user asks.\nI answer."},
        {"content": "", "reasoning_content": "I call.", "tool_calls": [call("Bern")]},
    ],
)
def test_reads_what_the_template_writes(message: dict[str, Any], size: int) -> None:
    parts = read(HERMES, rendered({"role": "assistant", **message}), size)
    assert parts.content == message["content"]
    assert parts.reasoning.strip() == message.get("reasoning_content", "")
    assert called(parts) == [("weather", each["function"]["arguments"]) for each in message.get("tool_calls", [])]
    ids = [each["id"] for each in parts.calls]
    assert len(set(ids)) == len(ids)
    assert all(each["type"] == "function" for each in parts.calls)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            QWEN_XML,
            "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n"
            "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        ),
        (GEMMA, 'I look.<|tool_call>call:weather{city:<|"|>Bern<|"|>,days:2}<tool_call|>'),
    ],
)
def test_reads_other_families(template: Any, text: str) -> None:
    for size in (1, 1000):
        parts = read(template, text, size)
        assert parts.content.strip() == "I look."
        assert called(parts) == [("weather", {"city": "Bern", "days": 2})]


def test_an_opening_can_begin_the_reasoning() -> None:
    opening = OPENING + "<think>\n"
    assert AnswerReader(HERMES, opening, []).reasons
    assert not AnswerReader(HERMES, OPENING + "<think>\n\n</think>\n\n", []).reasons
    parts = read(HERMES, "Well.\n</think>\n\nYes.", 2, opening)
    assert (parts.reasoning.strip(), parts.content) == ("Well.", "Yes.")


@pytest.mark.parametrize(
    "broken",
    [
        '<tool_call>\n{"name": "weather", "arguments": {"city": \n</tool_call> and more',
        '<tool_call>\n{"name": "weather", "argu',
        '<tool_call>\n{"city": "Bern"}\n</tool_call>',
    ],
)
def test_a_call_that_cannot_be_read_is_content(broken: str) -> None:
    parts = read(HERMES, f"I look. {broken}", 1000)
    assert parts.calls == []
    assert parts.content.removeprefix("I look.").strip() == broken
    assert read(HERMES, broken, 1).calls == []
    assert '"' in read(HERMES, broken, 1).content


def test_without_tools_a_call_is_content() -> None:
    text = rendered({"role": "assistant", "content": "", "tool_calls": [call("Bern")]}).removesuffix("<|im_end|>")
    parts = read(families.without_calls(HERMES), text, 5)
    assert (parts.calls, parts.content) == ([], text.lstrip())


def test_the_tokenizers_own_template_comes_first() -> None:
    own = common_pb2.ModelInfo(model_type="qwen3", response_template=json.dumps(GEMMA))
    assert families.template(own) == GEMMA
    assert families.template(common_pb2.ModelInfo(model_type="llama")) is None


def test_reading_needs_no_torch() -> None:
    program = (
        "import sys; from services.gateway.answers import AnswerReader, load_parser; load_parser();"
        f"print(AnswerReader({HERMES!r}, '', []).feed('hello').content, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hello", "False"]
