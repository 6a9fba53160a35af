"""Checks of a generation's parameters, by the router, and by the worker too: it may be called without a router."""

from __future__ import annotations

from qaq.v1 import common_pb2, generate_pb2, worker_pb2

from services.common.bounds import number, token_ids
from services.common.errors import InvalidArgument
from services.common.limits import (
    MAX_BIASED_TOKENS,
    MAX_REPETITION_PENALTY,
    MAX_STOP_BYTES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
    MIN_REPETITION_PENALTY,
    PRESETS,
)

Request = generate_pb2.GenerateRequest | generate_pb2.ChatRequest | worker_pb2.RunRequest


def check(request: Request, context: int, vocabulary: int) -> None:
    """Checks all but the constraint itself.

    Args:
        context: of the model, in tokens. vocabulary: number of token ids.
    Raises:
        InvalidArgument: names the field and its range.
    """
    _sampling(request.sampling, vocabulary)
    _stop(request.stop, context, vocabulary)
    _output(request.output)
    if scored_only(request.stop) and not (request.output.echo or request.output.HasField("prompt_logprobs")):
        raise InvalidArgument("stop.max_new_tokens is 0; send at least 1, or leave it unset")
    if request.stop.ignore_eos and request.constraint.WhichOneof("kind"):
        raise InvalidArgument("a text with a constraint ends where the constraint says; leave ignore_eos unset")
    cache(request.cache)


def cache(params: common_pb2.CacheParams) -> None:
    """Raises:
    InvalidArgument: an unknown preset or a target out of range.
    """
    if params.HasField("preset") and params.preset not in PRESETS:
        raise InvalidArgument(f'cache.preset "{params.preset[:50]}" is unknown; use one of {", ".join(PRESETS)}')
    number(params, "cache", "target_bits", 0, 16, open_low=True)
    number(params, "cache", "target_compression", 1, 32)
    number(params, "cache", "target_error", 0, 10, open_low=True)


def scored_only(stop: common_pb2.StopParams) -> bool:
    """Whether no token is to be generated."""
    return stop.HasField("max_new_tokens") and stop.max_new_tokens == 0


def _sampling(params: common_pb2.SamplingParams, vocabulary: int) -> None:
    number(params, "sampling", "temperature", 0, MAX_TEMPERATURE)
    number(params, "sampling", "top_p", 0, 1)
    number(params, "sampling", "min_p", 0, 1)
    number(params, "sampling", "repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
    if params.HasField("top_k") and params.top_k < 0:
        raise InvalidArgument(f"sampling.top_k is {params.top_k}; send 0 to keep all tokens, or more")
    number(params, "sampling", "frequency_penalty", -2, 2)
    number(params, "sampling", "presence_penalty", -2, 2)
    bias = params.logit_bias
    if len(bias) > MAX_BIASED_TOKENS:
        raise InvalidArgument(f"sampling.logit_bias has {len(bias)} tokens; send at most {MAX_BIASED_TOKENS}")
    token_ids("sampling.logit_bias", bias, vocabulary)
    for token, value in bias.items():
        if not -100 <= value <= 100:
            raise InvalidArgument(f"sampling.logit_bias[{token}] is {value:g}; send a number from -100 to 100")


def _output(params: common_pb2.OutputParams) -> None:
    for field in ("top_logprobs", "prompt_logprobs"):
        if not 0 <= getattr(params, field) <= MAX_TOP_LOGPROBS:
            raise InvalidArgument(f"output.{field} is {getattr(params, field)}; send 0 to {MAX_TOP_LOGPROBS}")
    if params.top_logprobs and not params.logprobs:
        raise InvalidArgument("output.top_logprobs needs output.logprobs; set it, or send 0")


def _stop(stop: common_pb2.StopParams, context: int, vocabulary: int) -> None:
    new, strings = stop.max_new_tokens, stop.stop
    if new < 0:
        raise InvalidArgument(f"stop.max_new_tokens is {new}; send at least 1, or leave it unset")
    if new > context:
        raise InvalidArgument(f"stop.max_new_tokens is {new}; the model's context is {context} tokens, send less")
    most = new if stop.HasField("max_new_tokens") else context
    if not 0 <= stop.min_new_tokens <= most:
        raise InvalidArgument(f"stop.min_new_tokens is {stop.min_new_tokens}; send 0 to {most}")
    if len(stop.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidArgument(
            f"stop.stop_token_ids has {len(stop.stop_token_ids)} tokens; send at most {MAX_STOP_TOKENS}"
        )
    token_ids("stop.stop_token_ids", stop.stop_token_ids, vocabulary)
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidArgument(f"stop.stop has {len(strings)} strings; send at most {MAX_STOP_STRINGS}")
    for place, text in enumerate(strings):
        size = len(text.encode())
        if size == 0:
            raise InvalidArgument(f"stop.stop[{place}] is empty; leave it out")
        if size > MAX_STOP_BYTES:
            raise InvalidArgument(f"stop.stop[{place}] is {size} bytes; send at most {MAX_STOP_BYTES}")
