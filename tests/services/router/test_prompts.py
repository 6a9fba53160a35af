from __future__ import annotations

import asyncio
import copy
import json
import threading
from pathlib import Path

import pytest
from qaq.v1 import generate_pb2
from transformers import PreTrainedTokenizerBase

from qaq_core.models import load_tokenizer
from services.common.errors import FailedPrecondition, InvalidArgument
from services.router.prompts import LONG_BYTES, Conversation, Prompts
from tests.services.common.templates import CHAT_TEMPLATE

ASK = Conversation([{"role": "user", "content": "Name a colour."}])
AGAIN = Conversation([{"role": "user", "content": "Another?"}])
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(model_path))


async def test_text_is_what_the_tokenizer_says(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = Prompts(tokenizer)
    assert await prompts.text("Once upon a time", special_tokens=True) == tokenizer("Once upon a time")["input_ids"]
    plain = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert await prompts.text("é", special_tokens=False) == plain


@pytest.mark.parametrize("model_ended_its_turn", [True, False])
async def test_turns_of_a_chat_are_the_whole_conversation(
    tokenizer: PreTrainedTokenizerBase, model_ended_its_turn: bool
) -> None:
    prompts = Prompts(tokenizer)
    history = await prompts.chat(ASK, [])
    history += tokenizer("Blue.", add_special_tokens=False)["input_ids"]
    if model_ended_its_turn:
        history.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    turn = await prompts.chat(AGAIN, history)
    whole = [*ASK.messages, {"role": "assistant", "content": "Blue."}, *AGAIN.messages]
    assert tokenizer.decode([*history, *turn]) == tokenizer.apply_chat_template(
        whole, tokenize=False, add_generation_prompt=True
    )


class Template:
    """A tokenizer with a template of its own."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        (text,), _ = render_jinja_template(
            [messages], chat_template=self.chat_template, add_generation_prompt=add_generation_prompt
        )
        return str(text)


@pytest.mark.parametrize(
    ("template", "history", "error", "sentence"),
    [
        (None, [], FailedPrecondition, "no chat template; use Generate"),
        ("{{ raise_exception('roles must alternate') }}", [], InvalidArgument, "roles must alternate"),
        ("{% for m in messages[-1:] %}{{ m.content }}{% endfor %}", [1], FailedPrecondition, "without a session"),
    ],
)
async def test_refuses_with_what_to_change(
    template: str | None, history: list[int], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        await Prompts(Template(template)).chat(ASK, history)


@pytest.fixture
def tooled(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a template that knows tools and reasoning."""
    made = copy.copy(tokenizer)
    made.chat_template = CHAT_TEMPLATE
    return made


async def test_tools_and_their_history_reach_the_template(tooled: PreTrainedTokenizerBase) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    request = generate_pb2.ChatRequest(
        messages=[
            generate_pb2.ChatMessage(role="user", content="How is it in Bern?"),
            generate_pb2.ChatMessage(role="assistant", tool_calls_json=json.dumps([call]), reasoning_content="Look."),
            generate_pb2.ChatMessage(role="tool", content="12 degrees", tool_call_id="c1", name="weather"),
        ],
        tools=[json.dumps(WEATHER)],
        chat_template_kwargs='{"enable_thinking": false}',
    )
    conversation = Conversation.of(request)
    text = tooled.decode(await Prompts(tooled).chat(conversation, []))
    assert json.dumps(WEATHER) in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>' in text
    assert "<think>\nLook.\n</think>" in text
    assert "12 degrees (c1)" in text
    opening = await Prompts(tooled).opening(conversation)
    assert opening == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert text.endswith(opening)


async def test_a_template_without_tools_refuses_them(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(FailedPrecondition, match="knows no tools"):
        await Prompts(tokenizer).chat(Conversation(ASK.messages, tools=[WEATHER]), [])


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "sanitize_control_tokens"])
async def test_variables_of_the_server_are_not_for_clients(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"chat_template_kwargs has {name}"):
        await Prompts(tokenizer).chat(Conversation(ASK.messages, variables={name: "x"}), [])


async def test_a_text_that_is_certainly_too_long_is_not_tokenized(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    prompts = Prompts(tokenizer)
    monkeypatch.setattr(prompts, "_encode", lambda text, special: encoded.append(len(text)) or [1])
    long = "x" * 1_000_000
    for call in (
        prompts.text(long, special_tokens=True, context=8192),
        prompts.chat(Conversation([{"role": "user", "content": long}]), [], context=8192),
        prompts.chat(Conversation([{"role": "user", "content": long}]), [1, 2], context=8192),
    ):
        with pytest.raises(InvalidArgument, match=r"prompt is at least 1\d{4} tokens.*length is 8192") as caught:
            await call
        assert caught.value.reason == "context_length_exceeded"
    assert encoded == []
    assert await prompts.text("x" * 600_000, special_tokens=True, context=8192) == [1]


async def test_short_texts_and_other_tenants_do_not_wait_for_long_texts(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, go, begun = Prompts(tokenizer), threading.Event(), []

    def encode(text: str, special: bool) -> list[int]:
        begun.append(text[0])
        if len(text) > LONG_BYTES:
            assert go.wait(60)
        return [1]

    monkeypatch.setattr(prompts, "_encode", encode)
    flood = [asyncio.create_task(prompts.text("a" * 70_000, special_tokens=True, tenant="a")) for _ in range(12)]
    while not begun:  # noqa: ASYNC110 (a thread says so)
        await asyncio.sleep(0.005)
    assert await prompts.text("short", special_tokens=True, tenant="a") == [1]
    other = asyncio.create_task(prompts.text("b" * 70_000, special_tokens=True, tenant="b"))
    await asyncio.sleep(0)
    go.set()
    await other
    assert begun.index("b") <= 3  # behind the one that ran, and one of the flood
    await asyncio.gather(*flood)
