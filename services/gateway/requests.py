"""Converts OpenAI's requests to those of the gRPC API."""

from __future__ import annotations

import json
import re
from typing import Any

from qaq.v1 import common_pb2, generate_pb2

from services.common.errors import InvalidArgument, StatusError, to_status
from services.gateway.constraints import constraint
from services.gateway.messages import Message, ToolCall
from services.gateway.schema import CacheOptions, ChatRequest, CompletionRequest, Request

DEFAULT_TEMPERATURE = 1.0
"""OpenAI's default, for models whose own default is greedy."""

# OpenAI's name of the role; chat templates use the older one.
_ROLES = {"developer": "system"}


def completions(body: CompletionRequest, model: common_pb2.ModelInfo) -> list[generate_pb2.GenerateRequest]:
    """One request for each prompt.

    Raises:
        InvalidArgument: several prompts for one session, or several constraints.
    """
    if body.session_id and len(body.prompts) > 1:
        raise InvalidArgument("session_id is for one text; send one prompt")
    scored = body.logprobs is not None
    output = common_pb2.OutputParams(
        logprobs=scored, top_logprobs=body.logprobs or 0, prompt_logprobs=body.prompt_logprobs
    )
    requests = []
    for prompt in body.prompts:
        request = generate_pb2.GenerateRequest(**_shared(body, body.max_tokens, model), output=output)
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.prompt_token_ids.extend(prompt)
        # A prompt that was sent as text needs no echo from the router, except for its log-probabilities.
        request.output.echo = body.echo and (scored or body.max_tokens == 0 or not isinstance(prompt, str))
        requests.append(request)
    return requests


def chat(body: ChatRequest, model: common_pb2.ModelInfo) -> generate_pb2.ChatRequest:
    """The request for a conversation. `tools.prepare` completes it.

    Raises:
        InvalidArgument: several constraints.
    """
    output = common_pb2.OutputParams(
        logprobs=body.logprobs, top_logprobs=body.top_logprobs or 0, prompt_logprobs=body.prompt_logprobs
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return generate_pb2.ChatRequest(**_shared(body, limit, model), output=output, messages=messages(body.messages))


def messages(given: list[Message]) -> list[generate_pb2.ChatMessage]:
    """Messages as the router takes them."""
    return [
        generate_pb2.ChatMessage(
            role=_ROLES.get(each.role, each.role),
            content=each.text,
            name=each.name,
            tool_calls_json=_json(each.tool_calls),
            tool_call_id=each.tool_call_id,
            reasoning_content=each.reasoning_content,
        )
        for each in given
    ]


def retold(error: Exception, body: Request) -> Exception:
    """An error of the router about a chat, by the fields that it was sent with. Others stay."""
    status = to_status(error)
    if status is None or not isinstance(body, ChatRequest):
        return error
    message = re.sub("^prompt is ", "messages are ", status.message)
    if body.max_completion_tokens is not None:
        message = message.replace("stop.max_new_tokens", "max_completion_tokens")
    return StatusError(
        message,
        code=status.code,
        retry_after_ms=status.retry_after_ms,
        reason=status.reason,
        limits=status.limits,
    )


def cache(options: CacheOptions | None) -> common_pb2.CacheParams | None:
    return common_pb2.CacheParams(**_given(options.model_dump())) if options else None


def default_sampling(model: common_pb2.ModelInfo) -> common_pb2.SamplingParams:
    """What sampling parameters are that a client leaves out: the model's own, at OpenAI's temperature if the model's
    default is greedy. Otherwise the choices of one prompt would all be the same."""
    params = common_pb2.SamplingParams()
    params.CopyFrom(model.sampling)
    params.temperature = model.sampling.temperature or DEFAULT_TEMPERATURE
    return params


def _shared(body: Request, limit: int | None, model: common_pb2.ModelInfo) -> dict[str, Any]:
    temperature = default_sampling(model).temperature if body.temperature is None else body.temperature
    sampling = {
        "temperature": temperature,
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "seed": None if body.seed is None else body.seed % 2**64,
    }
    stop = common_pb2.StopParams(
        max_new_tokens=limit,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop,
        ignore_eos=body.ignore_eos,
        stop_token_ids=body.stop_token_ids,
        min_new_tokens=body.min_tokens,
        include_stop_string=body.include_stop_str_in_output,
    )
    return {
        "model": body.model,
        "sampling": common_pb2.SamplingParams(**_given(sampling), logit_bias=body.logit_bias),
        "stop": stop,
        "cache": cache(body.cache),
        "session_id": body.session_id,
        "choices": body.n,
        "constraint": constraint(body),
    }


def _json(calls: list[ToolCall]) -> str:
    return json.dumps([call.model_dump() for call in calls], ensure_ascii=False) if calls else ""


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
