from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from qaq_core.models import load_tokenizer
from services.common.errors import FailedPrecondition, InvalidArgument
from services.router.prompts import Prompts

ASK = [{"role": "user", "content": "Name a colour."}]
AGAIN = [{"role": "user", "content": "Another?"}]


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
    whole = [*ASK, {"role": "assistant", "content": "Blue."}, *AGAIN]
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
