"""How families of models write reasoning and tool calls: templates of transformers' response parser.

A tokenizer that has a `response_template` of its own needs no entry here.
"""

from __future__ import annotations

import json
from typing import Any

from qaq.v1 import common_pb2

Template = dict[str, Any]

_FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_THINK = {"open": "<think>", "close": "</think>", "content": "text"}
_IM_END = {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"}

# <tool_call>{"name": …, "arguments": {…}}</tool_call>
_HERMES: Template = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": _THINK,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",  # what separates two calls is no content
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": _IM_END,
    },
}

# <tool_call><function=…><parameter=…>…</parameter></function></tool_call>
_QWEN_XML: Template = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": _THINK,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": _FUNCTION,
        },
        "content": _IM_END,
    },
}

# <|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>
_GEMMA: Template = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>[\w.-]+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": _FUNCTION,
        },
        "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"], "content": "text"},
    },
}

_FAMILIES: dict[tuple[str, ...], Template] = {
    ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_vl", "smollm3"): _HERMES,
    ("qwen3_next", "qwen3_vl_moe"): _HERMES,
    ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"): _QWEN_XML,
    ("gemma4", "gemma4_text"): _GEMMA,
}


def template(model: common_pb2.ModelInfo) -> Template | None:
    """How the model writes: by its tokenizer, or else by its family; None if it is not known."""
    if model.response_template:
        own: Template = json.loads(model.response_template)
        return own
    return next((found for types, found in _FAMILIES.items() if model.model_type in types), None)


def without_calls(found: Template) -> Template:
    """The template without tool calls: what looks like one is content."""
    fields = {name: field for name, field in found["fields"].items() if name != "tool_calls"}
    return found | {"fields": fields}


def call(found: Template, name: str, parameters: dict[str, Any] | bool, whitespace: int) -> dict[str, Any] | None:
    """A call of a function as a tag of xgrammar's structural tags; None if the form of calls is not known.

    Args:
        parameters: JSON schema of the arguments.
        whitespace: most whitespace characters in a row, outside of strings.
    """
    field = found["fields"].get("tool_calls", {})
    opening = field.get("open_pattern") or field.get("open") or ""
    arguments = {"type": "json_schema", "json_schema": parameters, "max_whitespace_cnt": whitespace}
    match opening if isinstance(opening, str) else "", field.get("content"):
        case str(text), "json" if text.endswith("<tool_call>") and field.get("close") == "</tool_call>":
            begin = f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '
            return {"type": "tag", "begin": begin, "content": arguments, "end": "}\n</tool_call>"}
        case str(text), "xml-inline" if "<function=" in text and "<parameter=" in str(field.get("content_args")):
            begin, end = f"<tool_call>\n<function={name}>\n", "\n</function>\n</tool_call>"
            return {"type": "tag", "begin": begin, "content": arguments | {"style": "qwen_xml"}, "end": end}
        case str(text), "json" if "<\\|tool_call>call:" in text:
            marks = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"]
            content = arguments | {"style": "gemma", "excludes": marks}
            return {"type": "tag", "begin": f"<|tool_call>call:{name}", "content": content, "end": "<tool_call|>"}
    return None


def trigger(tag: dict[str, Any]) -> str:
    """What begins every call of the same form as `tag`: its mark, up to the first line break or colon."""
    begin: str = tag["begin"]
    return begin.partition("\n")[0].partition("call:")[0]
