"""Converts requests of vLLM's engine protocol to those of the public API.

Two fields have no effect: spaces_between_special_tokens, as no text is returned, and grammar_from_first_token, as a
constraint holds from the first token on anyway.
"""

from __future__ import annotations

import json
from typing import Any

from qaq.v1 import common_pb2, generate_pb2
from smg_grpc_proto import vllm_engine_pb2

from services.common.errors import InvalidArgument
from services.common.limits import MAX_SCHEMA_BYTES

MAX_INT32 = 2**31 - 1

# Of other engines: images, caches that one engine sends to another, a prompt that the engine cuts.
_UNSUPPORTED = ("mm_inputs", "extra_mm_inputs", "media_refs", "kv_transfer_params", "kv_transfer_params_json")
_UNSUPPORTED_PARAMS = ("truncate_prompt_tokens",)
_DATA = ("const", "default", "enum", "examples")  # keywords of a JSON schema whose values are no schemas


def generation(request: vllm_engine_pb2.GenerateRequest) -> generate_pb2.GenerateRequest:
    """The same request to `Inference`, which checks everything that it has a field for.

    Raises:
        InvalidArgument: a field that this engine does not have, or a number that its field cannot hold.
    """
    params = request.sampling_params
    _refuse_unsupported(request)
    generation = generate_pb2.GenerateRequest(
        sampling=_sampling(params),
        stop=_stop(params),
        choices=_int32("n", params.n),
        output=_output(params),
        constraint=_constraint(params),
    )
    if request.WhichOneof("input") == "text":
        generation.prompt = request.text
    else:
        generation.prompt_token_ids.extend(_int32("input_ids", token) for token in request.tokenized.input_ids)
    return generation


def _refuse_unsupported(request: vllm_engine_pb2.GenerateRequest) -> None:
    sent = {field.name for message in (request, request.sampling_params) for field, _ in message.ListFields()}
    for name in (*_UNSUPPORTED, *_UNSUPPORTED_PARAMS):
        if name in sent:
            raise InvalidArgument(f"{name} is not supported; leave it unset")
    if request.data_parallel_rank:
        raise InvalidArgument(
            f"data_parallel_rank is {request.data_parallel_rank}, and this engine has one rank; send 0"
        )


def _sampling(params: vllm_engine_pb2.SamplingParams) -> common_pb2.SamplingParams:
    """A zero is what proto3 makes of an unset number. As in vLLM it then changes nothing: top_p and
    repetition_penalty are 1. An unset temperature is the model's own default."""
    sampling = common_pb2.SamplingParams(
        top_k=_int32("top_k", params.top_k),
        top_p=params.top_p or 1.0,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty or 1.0,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=params.logit_bias,
    )
    if params.HasField("temperature"):
        sampling.temperature = params.temperature
    if params.HasField("seed"):
        sampling.seed = params.seed % 2**64
    return sampling


def _stop(params: vllm_engine_pb2.SamplingParams) -> common_pb2.StopParams:
    stop = common_pb2.StopParams(
        stop=params.stop,
        stop_token_ids=[_int32("stop_token_ids", token) for token in params.stop_token_ids],
        ignore_eos=params.ignore_eos,
        min_new_tokens=_int32("min_tokens", params.min_tokens),
        include_stop_string=params.include_stop_str_in_output,
    )
    if params.HasField("max_tokens"):
        stop.max_new_tokens = _int32("max_tokens", params.max_tokens)
    return stop


def _output(params: vllm_engine_pb2.SamplingParams) -> common_pb2.OutputParams:
    """Special tokens matter although no text is returned: stop strings are looked for in it."""
    output = common_pb2.OutputParams(special_tokens=not params.skip_special_tokens)
    if params.HasField("logprobs"):
        output.logprobs, output.top_logprobs = True, params.logprobs
    if params.HasField("prompt_logprobs"):
        output.prompt_logprobs = params.prompt_logprobs
    return output


def _constraint(params: vllm_engine_pb2.SamplingParams) -> common_pb2.Constraint | None:
    """The kinds have the same names and meanings."""
    kind = params.WhichOneof("constraint")
    if kind is None:
        return None
    if kind == "choice":
        return common_pb2.Constraint(choice=common_pb2.Constraint.Choice(texts=params.choice.choices))
    if kind == "json_schema":
        return common_pb2.Constraint(json_schema=_schema(params.json_schema))
    return common_pb2.Constraint(**{kind: getattr(params, kind)})


def _schema(text: str) -> str:
    """The same JSON schema as workers take it.

    SMG demands tool calls with a type beside anyOf, whose siblings a worker refuses, as it would not enforce them. In
    each of the schemas of anyOf the type means the same.
    """
    if len(text) > MAX_SCHEMA_BYTES:
        return text  # refused with all other constraints that break a limit
    try:
        return json.dumps(_with_types_inside(json.loads(text)), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _with_types_inside(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_types_inside(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: part if key in _DATA else _with_types_inside(part) for key, part in schema.items()}
    kind, parts = schema.get("type"), schema.get("anyOf")
    if (
        isinstance(kind, str)
        and isinstance(parts, list)
        and all(isinstance(part, dict) and part.get("type", kind) == kind for part in parts)
    ):
        del schema["type"]
        schema["anyOf"] = [{"type": kind, **part} for part in parts]
    return schema


def _int32(field: str, value: int) -> int:
    """vLLM's numbers are unsigned, those of the public API signed."""
    if value > MAX_INT32:
        raise InvalidArgument(f"{field} has {value}; send at most {MAX_INT32}")
    return value
