"""Token ids of texts and chat messages, with the model's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError
from qaq.v1 import generate_pb2

from qaq_core.models import load_tokenizer
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.turns import Turns
from services.router import formats, validation
from services.router.least_tokens import LeastTokens

T = TypeVar("T")
Message = dict[str, Any]

LONG_BYTES = 64 << 10
"""A text of more is long: tokenizing it takes from 50 ms to seconds. Long texts have a thread of their own."""

MAX_SHORT, MAX_LONG = 512, 64
"""Texts that may wait."""

LIMIT_S = 60.0
"""Longest time that a text waits, and that it is worked on."""

# A conversation with unique texts, which shows what a template puts around messages.
_EXCHANGE = [{"role": "user", "content": "<qaq:asked>"}, {"role": "assistant", "content": "<qaq:answered>"}]
# A tool that shows whether a template knows tools.
_TOOL = {"type": "function", "function": {"name": "qaq_tool", "description": "", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Conversation:
    """What a chat template gets.

    Attributes:
        variables: more variables of the template.
        size: characters of the messages, about.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    size: int = 0

    @classmethod
    def of(cls, request: generate_pb2.ChatRequest | generate_pb2.TokenizeRequest) -> Conversation:
        """Raises:
        InvalidArgument: a field is too large, or not JSON.
        """
        messages = [formats.message(place, sent) for place, sent in enumerate(request.messages)]
        return cls(messages, formats.tools(request), formats.template_kwargs(request), request.ByteSize())


class Prompts:
    """Encodes prompts in threads: a long text takes seconds, and running streams must not wait for it. Nor do short
    texts wait for long ones, or a tenant for another one's. The methods raise as `Turns.run`.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
        self._least = LeastTokens(tokenizer)
        self._short = Turns("short texts", 2, MAX_SHORT, LIMIT_S)
        self._long = Turns("long texts", 1, MAX_LONG, LIMIT_S)
        self._knows_tools: bool | None = None

    @classmethod
    async def load(cls, source: str) -> Prompts:
        """Raises:
        ModelLoadError: no tokenizer can be loaded from there.
        """
        return await asyncio.to_thread(lambda: cls(load_tokenizer(source)))

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._tokenizer

    async def text(self, text: str, *, special_tokens: bool, context: int | None = None, tenant: str = "") -> list[int]:
        """Ids of a text.

        Args:
            special_tokens: add those that the model's prompts begin with.
            context: the model's context in tokens. A text that certainly has more is refused without tokenizing it.
        Raises:
            InvalidArgument: the text has more.
        """
        self._check(text, context)
        return await self._turn(tenant, len(text), lambda: self._encode(text, special=special_tokens))

    async def decode(self, ids: Sequence[int], tenant: str = "") -> str:
        """The text of ids, special tokens included."""
        return await self._turn(tenant, len(ids), lambda: str(self._tokenizer.decode(ids, skip_special_tokens=False)))

    async def written(self, ids: Sequence[int], tenant: str = "") -> list[str]:
        """Ids as the vocabulary writes them."""
        return await self._turn(
            tenant, len(ids), lambda: [str(token) for token in self._tokenizer.convert_ids_to_tokens(ids)]
        )

    async def chat(
        self,
        conversation: Conversation,
        history: Sequence[int],
        *,
        answer: bool = True,
        context: int | None = None,
        tenant: str = "",
    ) -> list[int]:
        """Ids of messages and of the beginning of the answer.

        Args:
            history: the session's token log, which these ids continue.
            answer: add the beginning of the answer; without a history only.
            context: as for `text`.
        Raises:
            FailedPrecondition: the model has no chat template, or its template knows no tools or changes earlier
                messages.
            InvalidArgument: the template rejects the messages, or they are too long.
        """
        if not self._tokenizer.chat_template:
            raise FailedPrecondition("this model has no chat template; use Generate")
        return await self._turn(tenant, conversation.size, lambda: self._chat(conversation, history, answer, context))

    async def opening(self, conversation: Conversation, tenant: str = "") -> str:
        """What the template puts before the answer, after all messages; raises as `chat`."""
        if not self._tokenizer.chat_template:
            raise FailedPrecondition("this model has no chat template; use Generate")
        return await self._turn(tenant, conversation.size, lambda: self._opening(conversation))

    def _opening(self, conversation: Conversation) -> str:
        whole, messages = self._render(conversation), self._render(conversation, answer=False)
        if not whole.startswith(messages):
            raise FailedPrecondition("this model's chat template does not end with the beginning of the answer")
        return whole.removeprefix(messages)

    def _chat(self, conversation: Conversation, history: Sequence[int], answer: bool, context: int | None) -> list[int]:
        if conversation.tools:
            self._check_tools()
        if not history:
            text = self._render(conversation, answer=answer)
            self._check(text, context)
            return self._encode(text, special=False)
        # After an answer, the template adds the end of the assistant's turn and then the new messages. The history
        # already has the end-of-turn token if the model generated it.
        exchange, more = replace(conversation, messages=_EXCHANGE), [*_EXCHANGE, *conversation.messages]
        before, answered, _ = self._render(exchange, answer=False).rpartition(_EXCHANGE[1]["content"])
        after = self._render(replace(conversation, messages=more))
        if not answered or not after.startswith(before + answered):
            raise FailedPrecondition(
                "this model's chat template rewrites earlier messages; send all of them, without a session"
            )
        turn = after.removeprefix(before + answered)
        self._check(turn, context)
        ids = self._encode(turn, special=False)
        ended = bool(ids) and ids[0] == history[-1] and ids[0] in self._tokenizer.all_special_ids
        return ids[1:] if ended else ids

    def _check_tools(self) -> None:
        """Raises:
        FailedPrecondition: the chat template renders the same text with a tool and without.
        """
        if self._knows_tools is None:
            asked = Conversation(_EXCHANGE[:1])
            self._knows_tools = self._render(replace(asked, tools=[_TOOL])) != self._render(asked)
        if not self._knows_tools:
            raise FailedPrecondition("this model's chat template knows no tools; send none, or serve another model")

    def _render(self, conversation: Conversation, *, answer: bool = True) -> str:
        taken = conversation.variables.keys() & self._taken
        if taken:
            raise InvalidArgument(f"chat_template_kwargs has {min(taken)}, which the server sets; leave it out")
        more: dict[str, Any] = {"tools": conversation.tools} if conversation.tools else {}
        try:
            text = self._tokenizer.apply_chat_template(
                conversation.messages, tokenize=False, add_generation_prompt=answer, **more, **conversation.variables
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidArgument(f"the model's chat template rejects these messages: {error}") from error
        return str(text)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _check(self, text: str, context: int | None) -> None:
        if context is not None:
            validation.may_fit(self._least.of(text), context)

    async def _turn(self, tenant: str, size: int, work: Callable[[], T]) -> T:
        return await (self._long if size > LONG_BYTES else self._short).run(tenant, work)
