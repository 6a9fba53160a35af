"""Requests of OpenAI's clients. An unsupported field that would change the answer is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.constraints import Constrained
from services.gateway.tools import ToolCall, Tooled

TokenIds = Annotated[list[int], Field(min_length=1)]
MAX_PROMPTS = 64


class CacheOptions(BaseModel):
    """As CacheParams. Fixed when a session is opened."""

    model_config = ConfigDict(extra="forbid")

    preset: str | None = None
    target_bits: float | None = None
    target_compression: float | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class Request(Constrained):
    """Fields of completions and of chat completions. The router checks their ranges.

    Attributes:
        top_k … session_id: extensions of OpenAI's API; sent with `extra_body`.
        user … service_tier: accepted and ignored.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    cache: CacheOptions | None = None
    session_id: str = ""

    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    metadata: Any = None
    store: Literal[False] | None = None
    service_tier: Any = None

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request):
    """`/v1/completions`. max_tokens is 16 by default, as in OpenAI's API."""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    best_of: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ChatRequest(Request, Tooled):
    """`/v1/chat/completions`. Without a limit, an answer may fill the model's context."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
