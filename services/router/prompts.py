"""Token ids of texts and chat messages, with the model's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from qaq_core.models import load_tokenizer
from services.common.errors import FailedPrecondition, InvalidArgument

T = TypeVar("T")
Message = dict[str, str]

# A conversation with unique texts, which shows what a template puts around messages.
_EXCHANGE = [{"role": "user", "content": "<qaq:asked>"}, {"role": "assistant", "content": "<qaq:answered>"}]


class Prompts:
    """Encodes prompts in threads: a long text takes seconds, and running streams must not wait for it.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    @classmethod
    async def load(cls, source: str) -> Prompts:
        """Raises:
        ModelLoadError: no tokenizer can be loaded from there.
        """
        return cls(await asyncio.to_thread(load_tokenizer, source))

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._tokenizer

    async def text(self, text: str, *, special_tokens: bool) -> list[int]:
        """Ids of a text; `special_tokens` adds those that the model's prompts begin with."""
        return await self._in_thread(lambda: self._encode(text, special=special_tokens))

    async def chat(self, messages: Sequence[Message], history: Sequence[int]) -> list[int]:
        """Ids of messages and of the beginning of the answer.

        Args:
            history: the session's token log, which these ids continue.
        Raises:
            FailedPrecondition: the model has no chat template, or its template changes earlier messages.
            InvalidArgument: the template rejects the messages.
        """
        if not self._tokenizer.chat_template:
            raise FailedPrecondition("this model has no chat template; use Generate")
        return await self._in_thread(lambda: self._chat(list(messages), history))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _chat(self, messages: list[Message], history: Sequence[int]) -> list[int]:
        if not history:
            return self._encode(self._render(messages), special=False)
        # After an answer, the template adds the end of the assistant's turn and then the new messages. The history
        # already has the end-of-turn token if the model generated it.
        before, answer, _ = self._render(_EXCHANGE, answer=False).rpartition(_EXCHANGE[1]["content"])
        after = self._render([*_EXCHANGE, *messages])
        if not answer or not after.startswith(before + answer):
            raise FailedPrecondition(
                "this model's chat template rewrites earlier messages; send all of them, without a session"
            )
        ids = self._encode(after.removeprefix(before + answer), special=False)
        ended = bool(ids) and ids[0] == history[-1] and ids[0] in self._tokenizer.all_special_ids
        return ids[1:] if ended else ids

    def _render(self, messages: list[Message], *, answer: bool = True) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
        except TemplateError as error:
            raise InvalidArgument(f"the model's chat template rejects these messages: {error}") from error

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
