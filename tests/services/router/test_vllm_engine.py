"""vLLM's engine protocol over gRPC, in front of workers that a test can foresee: generations and aborts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from qaq.v1 import common_pb2
from redis.asyncio import Redis
from smg_grpc_proto import vllm_engine_pb2 as vllm
from structlog.testing import capture_logs

from qaq_core.models import load_tokenizer
from services.common.keys import WithMetadata, authorization
from services.common.settings import RouterSettings
from services.router.server import RouterServer
from services.router.vllm_engine import SERVICE_NAME
from tests.services.tenancy import Tenancy

from .conftest import CONTEXT, CountingWorker, router_channel
from .test_generation import mortal
from .test_service import until
from .vllm import PROMPT, Stub, refusal, request, responses

Code = grpc.StatusCode


async def test_a_stream_is_chunks_and_a_completion(engine: Stub) -> None:
    *chunks, complete = await responses(engine.Generate(request()))
    assert [list(chunk.token_ids) for chunk in chunks] == [[3], [4], [5]]
    assert [(chunk.prompt_tokens, chunk.completion_tokens) for chunk in chunks] == [(3, 1), (3, 2), (3, 3)]
    assert list(complete.output_ids) == [3, 4, 5]
    assert (complete.finish_reason, complete.prompt_tokens, complete.completion_tokens) == ("length", 3, 3)
    assert complete.WhichOneof("matched_stop") is None


async def test_without_a_stream_only_the_completion_comes(engine: Stub) -> None:
    (complete,) = await responses(engine.Generate(request(stream=False)))
    assert list(complete.output_ids) == [3, 4, 5]


async def test_text_is_tokenized_by_the_router(engine: Stub, worker: CountingWorker, model_path: Path) -> None:
    asked = vllm.GenerateRequest(request_id="one", text="Once upon", sampling_params={"max_tokens": 1})
    await responses(engine.Generate(asked))
    assert list(worker.asked[0].token_ids) == load_tokenizer(str(model_path))("Once upon")["input_ids"]


async def test_parameters_reach_the_worker(engine: Stub, worker: CountingWorker) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {5: -1.5},
        "seed": -2,
        "stop": ["end", "stop"],
        "stop_token_ids": [9, 10],
        "ignore_eos": True,
        "min_tokens": 2,
        "include_stop_str_in_output": True,
        "logprobs": 4,
        "prompt_logprobs": 5,
        "skip_special_tokens": True,
        "n": 1,
    }
    await responses(engine.Generate(request(**given)))
    (asked,) = worker.asked
    assert asked.sampling == common_pb2.SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={5: -1.5},
        seed=2**64 - 2,
    )
    assert asked.stop == common_pb2.StopParams(
        max_new_tokens=3,
        stop=["end", "stop"],
        stop_token_ids=[9, 10],
        ignore_eos=True,
        min_new_tokens=2,
        include_stop_string=True,
    )
    assert asked.output == common_pb2.OutputParams(logprobs=True, top_logprobs=4, prompt_logprobs=5)


async def test_what_proto3_leaves_out_changes_nothing(engine: Stub, worker: CountingWorker) -> None:
    await responses(engine.Generate(request()))
    (asked,) = worker.asked
    sampling = asked.sampling
    assert not sampling.HasField("temperature")  # the model's own
    assert (sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (1, 0, 0, 1)
    assert sampling.seed  # the router's, so that another worker could go on
    assert asked.output == common_pb2.OutputParams(special_tokens=True)  # stop strings may name special tokens


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"json_schema": '{"type": "object"}'}, {"json_schema": '{"type": "object"}'}),
        (
            {"json_schema": '{"type": "object", "anyOf": [{"required": ["a"]}, {"type": "object"}]}'},
            {"json_schema": '{"anyOf": [{"type": "object", "required": ["a"]}, {"type": "object"}]}'},
        ),
        (  # not the same types, and data that looks like a schema
            {"json_schema": '{"type": "object", "anyOf": [{"type": "string"}], "const": {"type": "a", "anyOf": [{}]}}'},
            {"json_schema": '{"type": "object", "anyOf": [{"type": "string"}], "const": {"type": "a", "anyOf": [{}]}}'},
        ),
        ({"json_object": True}, {"json_object": True}),
        ({"regex": "[0-9]+"}, {"regex": "[0-9]+"}),
        ({"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"structural_tag": '{"format": {}}'}, {"structural_tag": '{"format": {}}'}),
        ({"choice": {"choices": ["yes", "no"]}}, {"choice": {"texts": ["yes", "no"]}}),
    ],
)
async def test_constraints_reach_the_worker(
    engine: Stub, worker: CountingWorker, given: dict[str, Any], asked: dict[str, Any]
) -> None:
    await responses(engine.Generate(request(**given)))
    assert worker.asked[0].constraint == common_pb2.Constraint(**asked)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_inputs": {"im_token_id": 1}}, "mm_inputs is not supported"),
        ({"extra_mm_inputs": [{"im_token_id": 1}]}, "extra_mm_inputs is not supported"),
        ({"media_refs": {"items": [{"url": "https://example.org/a.png"}]}}, "media_refs is not supported"),
        ({"kv_transfer_params": {"remote_port": 1}}, "kv_transfer_params is not supported"),
        ({"kv_transfer_params_json": "{}"}, "kv_transfer_params_json is not supported"),
        ({"data_parallel_rank": 2}, "data_parallel_rank is 2"),
        ({"sampling_params": {"truncate_prompt_tokens": 5}}, "truncate_prompt_tokens is not supported"),
        ({"sampling_params": {"max_tokens": 2**32 - 1}}, "max_tokens has 4294967295"),
        ({"sampling_params": {"max_tokens": CONTEXT + 1}}, "max_new_tokens is 257"),
        ({"sampling_params": {"n": 17}}, "choices is 17"),
        ({"sampling_params": {"n": 2**32 - 1}}, "n has 4294967295"),
        ({"sampling_params": {"logprobs": -1}}, "top_logprobs is -1"),
        ({"sampling_params": {"logprobs": 21}}, "top_logprobs is 21"),
        ({"sampling_params": {"prompt_logprobs": -1}}, "prompt_logprobs is -1"),
        ({"sampling_params": {"temperature": -1}}, "temperature is -1"),
        ({"sampling_params": {"temperature": float("nan")}}, "temperature is nan"),
        ({"sampling_params": {"stop_token_ids": [2**31]}}, "stop_token_ids has 2147483648"),
        ({"sampling_params": {"stop": ["x"] * 17}}, "stop.stop has 17 strings"),
        ({"sampling_params": {"logit_bias": {-1: 1.0}}}, "logit_bias names token -1"),
        ({"sampling_params": {"regex": "a" * 4097}}, "constraint.regex"),
        ({"sampling_params": {"json_schema": "{"}}, "constraint.json_schema"),
        ({"sampling_params": {"json_schema": " " * 65537}}, "constraint.json_schema"),
        ({"sampling_params": {"json_schema": "[" * 5000}}, "constraint.json_schema"),
        ({"sampling_params": {"json_object": False}}, "json_object is false"),
        ({"sampling_params": {"choice": {}}}, "constraint.choice"),
        ({"tokenized": {"input_ids": [2**31]}}, "input_ids has 2147483648"),
        ({"tokenized": {"input_ids": [50_000]}}, "prompt_token_ids names token 50000"),
        ({"tokenized": {"input_ids": []}}, "prompt is empty"),
        ({"tokenized": {"input_ids": [1] * CONTEXT}}, "prompt is 256 tokens"),
        ({"request_id": ""}, "request_id has 0 bytes"),
        ({"request_id": "x" * 257}, "request_id has 257 bytes"),
    ],
)
async def test_refused_by_name(engine: Stub, worker: CountingWorker, fields: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"request_id": "one", "tokenized": {"input_ids": PROMPT}, **fields}
    error = await refusal(engine.Generate(vllm.GenerateRequest(**asked)))
    assert error.code() is Code.INVALID_ARGUMENT
    assert message in error.details()
    assert not worker.asked


async def test_the_workers_refusal_is_the_answer(engine: Stub, worker: CountingWorker) -> None:
    worker.refuse = Code.RESOURCE_EXHAUSTED
    error = await refusal(engine.Generate(request()))
    assert (error.code(), error.details()) == (Code.RESOURCE_EXHAUSTED, "the queue is full")


async def test_a_stream_goes_on_when_its_worker_dies(smg_settings: RouterSettings, redis: Redis) -> None:
    async with mortal(redis, 4) as dies, mortal(redis) as lives, router_channel(smg_settings) as channel:
        *chunks, complete = await responses(Stub(channel).Generate(request(max_tokens=9)))
    assert [list(chunk.token_ids) for chunk in chunks] == [[token] for token in complete.output_ids]
    assert len(chunks) == 9
    assert sorted(len(worker.asked) for worker in (dies, lives)) in ([0, 1], [1, 1])


async def test_a_tenant_is_named_as_for_other_calls(engine: Stub, worker: CountingWorker) -> None:
    await responses(engine.Generate(request(), metadata=(("qaq-tenant", "a"),)))
    assert worker.asked[0].tenant == "a"


# -- aborts ---------------------------------------------------------------------------------------------


async def test_an_abort_ends_the_answer_and_frees_the_sequence(engine: Stub, worker: CountingWorker) -> None:
    worker.gate.clear()
    call = aiter(engine.Generate(request()))
    assert (await anext(call)).chunk.token_ids == [3]
    await engine.Abort(vllm.AbortRequest(request_ids=["other", "one"]))
    (complete,) = await responses(call)
    assert (complete.finish_reason, complete.prompt_tokens, list(complete.output_ids)) == ("abort", 3, [3])
    await until(lambda: _is(bool(worker.ended)), "the worker's call ends")
    assert (await engine.GetServerInfo(vllm.GetServerInfoRequest())).active_requests == 0


async def test_an_abort_reaches_a_request_that_waits(engine: Stub, worker: CountingWorker) -> None:
    worker.gate.clear()
    worker.max_sequences = 1
    await until(lambda: _runs_at_most(engine, 1), "the router learns of it")
    first = aiter(engine.Generate(request(name="first")))
    await anext(first)
    second = engine.Generate(request(name="second", n=1))
    await until(lambda: _waits(engine), "the second waits")
    await engine.Abort(vllm.AbortRequest(request_ids=["second"]))
    (complete,) = await responses(second)
    assert (complete.finish_reason, complete.completion_tokens) == ("abort", 0)
    assert len(worker.asked) == 1
    worker.gate.set()
    assert (await responses(first))[-1].finish_reason == "length"


async def test_a_client_that_leaves_frees_the_sequence(engine: Stub, worker: CountingWorker) -> None:
    worker.gate.clear()
    call = engine.Generate(request())
    await call.read()
    call.cancel()
    await until(lambda: _is(bool(worker.ended)), "the worker's call ends")


async def test_an_id_is_of_one_request_at_a_time(engine: Stub, worker: CountingWorker) -> None:
    worker.gate.clear()
    call = aiter(engine.Generate(request()))
    await anext(call)
    error = await refusal(engine.Generate(request()))
    assert error.code() is Code.INVALID_ARGUMENT
    assert 'request_id "one" is running' in error.details()
    worker.gate.set()
    assert (await responses(call))[-1].finish_reason == "length"
    assert (await responses(engine.Generate(request())))[-1].finish_reason == "length"


async def _is(value: bool) -> bool:
    return value


async def _runs_at_most(engine: Stub, sequences: int) -> bool:
    return (await engine.GetServerInfo(vllm.GetServerInfoRequest())).max_num_seqs == sequences


async def _waits(engine: Stub) -> bool:
    return (await engine.GetLoads(vllm.GetLoadsRequest())).loads[0].num_waiting_reqs == 1


async def test_smg_sends_no_keys_which_is_told(smg_settings: RouterSettings, redis: Redis, tmp_path: Path) -> None:
    path = Tenancy(tmp_path / "tenants.json").path
    with capture_logs() as logs:
        for changed in ({"tenants_file": path}, {"tenants_file": path, "smg": False}, {}):
            router = RouterServer(smg_settings.model_copy(update=changed))
            await router.start()
            await router.stop()
    assert ["SMG sends no keys" in entry["event"] for entry in logs] == [True]


async def test_every_method_needs_the_key_of_a_tenant(
    worker: CountingWorker, smg_settings: RouterSettings, tmp_path: Path
) -> None:
    tenancy = Tenancy(tmp_path / "tenants.json")
    methods = vllm.DESCRIPTOR.services_by_name["VllmEngine"].methods
    async with router_channel(smg_settings.model_copy(update={"tenants_file": tenancy.path})) as channel:
        for method in methods:
            kind = channel.unary_stream if method.server_streaming else channel.unary_unary
            call = kind(f"/{SERVICE_NAME}/{method.name}")
            for metadata in ((), authorization(tenancy.keys["nobody"])):
                assert (await refusal(call(b"", metadata=metadata, timeout=10))).code() is Code.UNAUTHENTICATED
        assert (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status
        ada, bob = (WithMetadata(Stub(channel), authorization(tenancy.keys[name])) for name in ("ada", "bob"))
        worker.gate.clear()
        running = aiter(ada.Generate(request()))
        await anext(running)
        await bob.Abort(vllm.AbortRequest(request_ids=["one"]))
        same = aiter(bob.Generate(request()))  # an id is of one request of a tenant
        await anext(same)
        worker.gate.set()
        for call in (running, same):
            assert (await responses(call))[-1].finish_reason == "length"
        assert [asked.tenant for asked in worker.asked] == ["ada", "bob"]
