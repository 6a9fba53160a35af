"""Requests of OpenAI's clients. An unsupported field that would change the answer is refused by its name.

Everything has a bound. A null is as if the field had been left out. docs/gateway.md lists the fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from services.common.errors import InvalidArgument
from services.common.limits import (
    MAX_BIASED_TOKENS,
    MAX_REPETITION_PENALTY,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
)
from services.gateway.constraints import Constrained
from services.gateway.messages import Messages
from services.gateway.objects import Bias, Int32, Name, Object, Penalty, SessionId, Stop, TokenId, TokenIds, Top
from services.gateway.tools import Tooled

MAX_PROMPTS = 64
MAX_ANSWERS = 256


class CacheOptions(Object):
    """As CacheParams. Fixed when a session is opened."""

    preset: Name | None = None
    target_bits: float | None = None
    target_compression: float | None = None
    target_error: float | None = None


class StreamOptions(Object):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Any = None


class WithoutEffect(Object):
    """Fields that are accepted and do not change the answer. Of some, only one value is."""

    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    metadata: Any = None
    store: bool | None = None
    service_tier: Any = None
    request_id: Any = None
    priority: Literal[0] | None = None
    use_beam_search: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: Literal[True] | None = None


class Request(WithoutEffect, Constrained):
    """Fields of completions and of chat completions.

    Attributes:
        top_k … session_id: extensions of OpenAI's API; sent with `extra_body`.
    """

    model: Name = ""
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, lt=2**31)] = 1  # as many as workers decode: `models.served` knows
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[Int32, Bias], Field(max_length=MAX_BIASED_TOKENS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = None
    min_tokens: Int32 = 0
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKENS)] = Field(
        default_factory=list
    )
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    prompt_logprobs: Top | None = None
    cache: CacheOptions | None = None
    session_id: SessionId = ""

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise InvalidArgument("stream_options is for streams alone; leave it out, or set stream")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidArgument("prompt_logprobs is not possible in a stream; leave one of them out")
        return self

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        """Whether every chunk of a stream has the usage so far; as in vLLM, only where the usage is wanted at all."""
        return self.usage_wanted and self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(Request):
    """`/v1/completions`. max_tokens is 16 by default, as in OpenAI's API."""

    prompt: (
        str | TokenIds | Annotated[list[str | TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Int32 = 16
    logprobs: Top | None = None
    echo: bool = False
    best_of: Int32 | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: Literal[True] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @model_validator(mode="after")
    def _answers_are_bounded(self) -> CompletionRequest:
        answers = self.n * len(self.prompts)
        if len(self.prompts) > 1 and answers > MAX_ANSWERS:
            raise InvalidArgument(f"n is {self.n}, which makes {answers} answers; ask for at most {MAX_ANSWERS}")
        if self.best_of not in (None, self.n):
            raise InvalidArgument(f"best_of is {self.best_of}, but answers are not chosen between; leave it out")
        return self


class ChatWithoutEffect(WithoutEffect):
    """As `WithoutEffect`, of chat completions alone."""

    reasoning_effort: Any = None
    verbosity: Literal["medium"] | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: Any = None
    function_call: Literal["none", "auto"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    echo: Literal[False] | None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None


class ChatRequest(Request, Tooled, ChatWithoutEffect):
    """`/v1/chat/completions`. Without a limit, an answer may fill the model's context."""

    messages: Messages
    max_tokens: Int32 | None = None
    max_completion_tokens: Int32 | None = None
    logprobs: bool = False
    top_logprobs: Top | None = None
