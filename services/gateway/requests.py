"""Converts OpenAI's requests to those of the gRPC API."""

from __future__ import annotations

from typing import Any

from qaq.v1 import common_pb2, generate_pb2

from services.common.errors import InvalidArgument
from services.gateway.constraints import constraint
from services.gateway.schema import ChatRequest, CompletionRequest, Message, Request
from services.gateway.tools import calls_json

# OpenAI's name of the role; chat templates use the older one.
_ROLES = {"developer": "system"}


def completions(body: CompletionRequest) -> list[generate_pb2.GenerateRequest]:
    """One request for each prompt.

    Raises:
        InvalidArgument: a number is out of the range of its field.
    """
    if body.session_id and len(body.prompts) > 1:
        raise InvalidArgument("a session has one text; send one prompt")
    scored = body.logprobs is not None
    output = common_pb2.OutputParams(logprobs=scored, top_logprobs=_int32("logprobs", body.logprobs or 0))
    requests = []
    for prompt in body.prompts:
        request = generate_pb2.GenerateRequest(**_shared(body, body.max_tokens), output=output)
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.prompt_token_ids.extend(_int32("prompt", token) for token in prompt)
        # A prompt that was sent as text needs no echo from the router, except for its log-probabilities.
        request.output.echo = bool(body.echo) and (scored or not isinstance(prompt, str))
        requests.append(request)
    return requests


def chat(body: ChatRequest) -> generate_pb2.ChatRequest:
    """The request for a conversation; raises as `completions`."""
    output = common_pb2.OutputParams(logprobs=bool(body.logprobs))
    if body.top_logprobs:
        output.top_logprobs = _int32("top_logprobs", body.top_logprobs)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    messages = [_message(each) for each in body.messages]
    return generate_pb2.ChatRequest(**_shared(body, limit), output=output, messages=messages)


def _message(message: Message) -> generate_pb2.ChatMessage:
    return generate_pb2.ChatMessage(
        role=_ROLES.get(message.role, message.role),
        content=message.text,
        name=message.name,
        tool_calls_json=calls_json(message.tool_calls or []),
        tool_call_id=message.tool_call_id,
        reasoning_content=message.reasoning_content,
    )


def _shared(body: Request, limit: int | None) -> dict[str, Any]:
    bias = {_int32("logit_bias", token): value for token, value in (body.logit_bias or {}).items()}
    sampling = {
        "temperature": body.temperature,
        "top_k": _int32("top_k", body.top_k),
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "seed": None if body.seed is None else body.seed % 2**64,
    }
    strings = [body.stop] if isinstance(body.stop, str) else body.stop or []
    stop = common_pb2.StopParams(
        stop=strings,
        ignore_eos=body.ignore_eos,
        stop_token_ids=[_int32("stop_token_ids", token) for token in body.stop_token_ids or []],
    )
    if limit is not None:
        stop.max_new_tokens = _int32("max_tokens", limit)
    return {
        "model": body.model,
        "sampling": common_pb2.SamplingParams(**_given(sampling), logit_bias=bias),
        "stop": stop,
        "cache": common_pb2.CacheParams(**_given(body.cache.model_dump())) if body.cache else None,
        "session_id": body.session_id,
        "choices": _int32("n", 1 if body.n is None else body.n),
        "constraint": constraint(body),
    }


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _int32(field: str, value: Any) -> Any:
    if value is not None and not -(2**31) <= value < 2**31:
        raise InvalidArgument(f"{field} is {value}, which is out of range")
    return value
