"""Calls straight to a worker, without a router's checks: they are refused for the same, before anything costly."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from qaq.v1.common_pb2 import CacheParams, Constraint, OutputParams, SamplingParams, StopParams

from qaq_core.models import LoadedModel
from services.common.errors import InvalidArgument, ResourceExhausted
from services.common.settings import WorkerSettings
from services.worker.constraints import Grammars
from services.worker.request import RequestValidator
from tests.services.worker.conftest import request

AMBIGUOUS = 'root ::= "a" | root root'


@pytest.mark.parametrize(
    ("constraint", "sentence"),
    [
        (Constraint(grammar=AMBIGUOUS), 'the rule "root" stand beside itself'),
        (Constraint(structural_tag=json.dumps({"grammar": AMBIGUOUS})), "stand beside itself"),
        (Constraint(regex="(.{0,1000}){0,1000}x"), "range of repeats inside"),
        (Constraint(regex=".{1,100000}"), "repeats something 100000 times"),
        (Constraint(regex="x" * 5000), "regex is 5000 bytes"),
        (Constraint(json_schema='{"pattern": "a{1,100000}"}'), "repeats something 100000 times"),
        (Constraint(json_schema="[" * 60_000), "too many levels deep"),
        (Constraint(choice=Constraint.Choice(texts=["a", "a"])), "the same text twice"),
        (Constraint(json_object=False), "json_object is false"),
    ],
)
async def test_constraints_have_a_routers_limits(smollm2: LoadedModel, constraint: Constraint, sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        await Grammars(smollm2, 49152).get(constraint)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sampling": SamplingParams(temperature=1e30)}, "sampling.temperature is 1e"),
        ({"sampling": SamplingParams(top_p=float("nan"))}, "sampling.top_p is nan"),
        ({"sampling": SamplingParams(repetition_penalty=1e-38)}, "sampling.repetition_penalty"),
        ({"sampling": SamplingParams(logit_bias={5: 1e30})}, r"logit_bias\[5\] is 1e\+30"),
        ({"sampling": SamplingParams(logit_bias=dict.fromkeys(range(1025), 1))}, "logit_bias has 1025 tokens"),
        ({"stop": StopParams(max_new_tokens=10**6)}, "the model's context is 8192 tokens"),
        ({"stop": StopParams(stop=["x"] * 17)}, "stop.stop has 17 strings"),
        ({"stop": StopParams(stop=["x" * 257])}, r"stop.stop\[0\] is 257 bytes"),
        ({"stop": StopParams(stop_token_ids=[1] * 65)}, "stop_token_ids has 65 tokens"),
        ({"output": OutputParams(logprobs=True, top_logprobs=21)}, "top_logprobs is 21; send 0 to 20"),
        ({"cache": CacheParams(target_bits=float("nan"))}, "cache.target_bits is nan"),
        ({"cache": CacheParams(target_compression=1e9)}, "cache.target_compression"),
    ],
)
def test_parameters_have_a_routers_limits(smollm2: LoadedModel, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        RequestValidator(smollm2, WorkerSettings(model="smollm2")).check(request([1, 2, 3], **fields))


async def test_a_grammar_that_hangs_is_given_up_for_good(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, go = Grammars(smollm2, 49152), threading.Event()
    compiled: list[str] = []

    def compile_(constraint: Constraint) -> str:
        compiled.append(constraint.regex)
        if constraint.regex.startswith("hangs"):
            assert go.wait(60)
        return constraint.regex

    monkeypatch.setattr(grammars, "_compile", compile_)
    monkeypatch.setattr(grammars._turns, "_limit_s", 0.1)
    for _ in range(3):
        with pytest.raises(ResourceExhausted, match="was not compiled within 30 s; simplify it"):
            await grammars.get(Constraint(regex="hangs"))
    assert compiled == ["hangs"]  # it takes one thread, however often it is sent
    assert await grammars.get(Constraint(regex="other"), "b") == "other"
    with pytest.raises(ResourceExhausted):
        await grammars.get(Constraint(regex="hangs too"))
    with pytest.raises(ResourceExhausted, match="2 grammars have taken longer"):
        await grammars.get(Constraint(regex="other"), "b")
    go.set()
    while grammars._turns.late:  # noqa: ASYNC110 (their threads end)
        await asyncio.sleep(0.01)
    assert await grammars.get(Constraint(regex="other"), "b") == "other"
