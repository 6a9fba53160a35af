from __future__ import annotations

import math

import pytest
from qaq.v1 import generate_pb2
from qaq.v1.common_pb2 import StopParams

from services.common.errors import InvalidArgument
from services.router import validation

LIMITS = validation.Limits(prompt_bytes=100, context=50, vocabulary=1000)


def request(**changes: object) -> generate_pb2.GenerateRequest:
    fields: dict = {"prompt": "hello", "stop": {"max_new_tokens": 5}, **changes}
    return generate_pb2.GenerateRequest(**fields)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stop": {"max_new_tokens": 50, "stop": ["x" * 256] * 16}},
        {"sampling": {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 0.01}},
        {"cache": {"preset": "paper", "target_bits": 16, "target_compression": 1}},
        {"prompt": "é" * 50},
        {"prompt": "", "prompt_token_ids": [0, 999]},
        {"stop": {}},
        {"stop": {"stop_token_ids": [0, 999]}},
        {"sampling": {"frequency_penalty": -2, "presence_penalty": 2, "logit_bias": {0: -100, 999: 100}}},
        {"output": {"logprobs": True, "top_logprobs": 20, "echo": True}, "choices": 16},
        {"output": {"echo": True}, "stop": {"max_new_tokens": 0}},
        {"output": {"prompt_logprobs": 0}, "stop": {"max_new_tokens": 0}},
        {"sampling": {"top_p": 0}, "stop": {"max_new_tokens": 5, "min_new_tokens": 5}},
    ],
)
def test_accepts_the_edges(changes: dict) -> None:
    validation.generate(request(**changes), LIMITS)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": ""}, "prompt is empty; send at least one character"),
        ({"prompt": "é" * 51}, "prompt is 102 bytes of UTF-8; the limit is 100"),
        ({"stop": {"max_new_tokens": 0}}, "max_new_tokens is 0; send at least 1"),
        ({"stop": {"max_new_tokens": -1}}, "max_new_tokens is -1; send at least 1"),
        ({"stop": {"max_new_tokens": 51}}, "the model's context is 50 tokens, send less"),
        ({"stop": {"max_new_tokens": 1, "stop": ["x"] * 1000}}, "has 1000 strings; send at most 16"),
        ({"stop": {"max_new_tokens": 1, "stop": ["x", ""]}}, "stop.stop[1] is empty"),
        ({"stop": {"max_new_tokens": 1, "stop": ["é" * 129]}}, "is 258 bytes; send at most 256"),
        ({"sampling": {"temperature": -0.1}}, "temperature is -0.1; send a number at least 0 and at most 100"),
        ({"sampling": {"temperature": 101}}, "temperature is 101"),
        ({"sampling": {"temperature": math.nan}}, "temperature is nan"),
        ({"sampling": {"top_p": -0.1}}, "top_p is -0.1; send a number at least 0 and at most 1"),
        ({"sampling": {"top_p": 1.5}}, "top_p is 1.5"),
        ({"sampling": {"min_p": -1}}, "min_p is -1"),
        ({"sampling": {"top_k": -1}}, "top_k is -1; send 0"),
        ({"sampling": {"repetition_penalty": 1e-38}}, "repetition_penalty is 1e-38; send a number at least 0.01"),
        ({"sampling": {"repetition_penalty": math.inf}}, "repetition_penalty is inf"),
        ({"cache": {"preset": "best"}}, 'preset "best" is unknown; use one of balanced, paper, fp16'),
        ({"cache": {"target_bits": 0}}, "target_bits is 0"),
        ({"cache": {"target_compression": 0.5}}, "target_compression is 0.5"),
        ({"cache": {"target_error": 0}}, "target_error is 0"),
        (
            {"sampling": {"frequency_penalty": 2.1}},
            "frequency_penalty is 2.1; send a number at least -2 and at most 2",
        ),
        ({"sampling": {"presence_penalty": math.nan}}, "presence_penalty is nan"),
        ({"sampling": {"logit_bias": {1000: 1}}}, "logit_bias names token 1000; the model's tokens are 0 to 999"),
        ({"sampling": {"logit_bias": {5: 101}}}, "logit_bias[5] is 101; send a number from -100 to 100"),
        ({"sampling": {"logit_bias": {5: math.nan}}}, "logit_bias[5] is nan"),
        ({"sampling": {"logit_bias": dict.fromkeys(range(1025), 0)}}, "has 1025 tokens; send at most 1024"),
        ({"stop": {"stop_token_ids": [-1]}}, "stop.stop_token_ids names token -1"),
        ({"stop": {"stop_token_ids": [1] * 65}}, "has 65 tokens; send at most 64"),
        ({"output": {"prompt_logprobs": 21}}, "output.prompt_logprobs is 21; send 0 to 20"),
        ({"stop": {"max_new_tokens": 4, "min_new_tokens": 5}}, "stop.min_new_tokens is 5; send 0 to 4"),
        ({"output": {"top_logprobs": 2}}, "output.top_logprobs needs output.logprobs"),
        ({"output": {"logprobs": True, "top_logprobs": 21}}, "output.top_logprobs is 21; send 0 to 20"),
        ({"choices": 17}, "choices is 17; send 1 to 16"),
        ({"choices": -1}, "choices is -1; send 1 to 16"),
        ({"prompt_token_ids": [1]}, "both prompt and prompt_token_ids are set"),
        ({"prompt": "", "prompt_token_ids": [1000]}, "prompt_token_ids names token 1000"),
    ],
)
def test_refuses_with_what_to_change(changes: dict, sentence: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validation.generate(request(**changes), LIMITS)
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"choices": 2, "session_id": "x"}, "a session has one text"),
        ({"session_id": "x" * 129}, "session_id is over 128 bytes"),
        ({"session_id": "x", "cache": {"preset": "paper"}}, "cache is fixed when a session opens"),
    ],
)
def test_refuses_what_no_session_takes(changes: dict, sentence: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validation.continues(request(**changes))
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages is empty"),
        ([{"role": "", "content": "x"}], "messages[0].role is empty"),
        (
            [{"role": "wizard", "content": "x"}],
            'messages[0].role is "wizard"; use one of system, user, assistant, tool',
        ),
        ([{"role": "user", "content": ""}], "every message is empty"),
        ([{"role": "user", "content": "x" * 60}] * 2, "messages is 128 bytes"),
    ],
)
def test_refuses_a_chat_with_what_to_change(messages: list, sentence: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validation.chat(generate_pb2.ChatRequest(messages=messages, stop={"max_new_tokens": 1}), LIMITS)
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("held", "prompt", "new", "sentence"),
    [
        (0, 0, 1, "prompt has no tokens"),
        (0, 50, 1, "prompt is 50 tokens, but this model's maximum context length is 50 tokens and has room for 49;"),
        (0, 51, 0, "has room for 50"),
        (30, 20, 1, "after the 30 tokens of the session"),
        (50, 1, 1, "has room for 0"),
        (10, 20, 21, "maximum context length is 50 tokens and allows 20; lower it"),
    ],
)
def test_prompt_and_answer_share_the_context(held: int, prompt: int, new: int, sentence: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validation.fits(held, prompt, StopParams(max_new_tokens=new), context=50)
    assert sentence in caught.value.message
    assert caught.value.reason == ("context_length_exceeded" if prompt else "")


def test_a_prompt_may_fill_the_context_but_for_its_answer() -> None:
    validation.fits(10, 20, StopParams(max_new_tokens=20), context=50)
    validation.fits(0, 49, StopParams(max_new_tokens=1), context=50)
    validation.fits(0, 49, StopParams(), context=50)
    validation.fits(0, 50, StopParams(max_new_tokens=0), context=50)
