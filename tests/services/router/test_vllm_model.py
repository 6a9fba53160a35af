"""vLLM's engine protocol in front of the demo model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator

import grpc
import pytest
import torch
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import OriginalsSettings, RouterSettings, WorkerSettings
from services.originals.server import OriginalsServer
from services.worker.server import WorkerServer

from .conftest import router_channel
from .test_service import until
from .vllm import Stub, request, responses

Code = grpc.StatusCode


@contextlib.asynccontextmanager
async def _served(loaded: LoadedModel, settings: RouterSettings) -> AsyncIterator[Stub]:
    """A router with a worker of its own and an originals store."""
    common = {"redis_url": settings.redis_url, "port": 0}
    originals = OriginalsServer(OriginalsSettings(**common))
    worker = WorkerServer(WorkerSettings(model="smollm2", preset="fp16", **common), loaded)
    async with contextlib.AsyncExitStack() as stack:
        for server in (originals, worker):
            await server.start()
            stack.push_async_callback(server.stop)
        yield Stub(await stack.enter_async_context(router_channel(settings)))


@pytest.fixture
async def real(
    redis: Redis, redis_server: EmbeddedRedis, smollm2: LoadedModel, smg_settings: RouterSettings
) -> AsyncIterator[Stub]:
    async with _served(smollm2, smg_settings) as engine:
        yield engine


@pytest.fixture
def prompt(smollm2: LoadedModel) -> list[int]:
    return smollm2.tokenizer("The capital of France is")["input_ids"]


async def test_the_models_answer(real: Stub, smollm2: LoadedModel, prompt: list[int]) -> None:
    *chunks, complete = await responses(real.Generate(request(prompt, max_tokens=8, temperature=0)))
    expected = smollm2.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    assert list(complete.output_ids) == expected.tolist()
    assert [token for chunk in chunks for token in chunk.token_ids] == expected.tolist()


async def test_log_probabilities(real: Stub, smollm2: LoadedModel, prompt: list[int]) -> None:
    asked = request(prompt, max_tokens=2, temperature=0, logprobs=2, prompt_logprobs=1)
    first, second, complete = await responses(real.Generate(asked))
    tokens = [*prompt, *complete.output_ids]
    with torch.no_grad():
        scores = smollm2.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    expected = scores[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    assert complete.input_logprobs.token_ids == prompt
    assert not complete.input_logprobs.token_logprobs[0].HasField("value")
    known = [each.value for each in complete.input_logprobs.token_logprobs[1:]]
    assert known == pytest.approx(expected[: len(prompt) - 1].tolist(), abs=1e-3)
    assert [list(top.token_ids) for top in complete.input_logprobs.top_logprobs[1:]] == [
        [best] for best in scores[: len(prompt) - 1].argmax(-1).tolist()
    ]
    assert first.input_logprobs == complete.input_logprobs
    assert not second.HasField("input_logprobs")

    output = complete.output_logprobs
    assert output.token_ids == complete.output_ids
    assert list(output.token_logprobs) == pytest.approx(expected[-2:].tolist(), abs=1e-3)
    assert [list(top.token_ids) for top in output.top_logprobs] == scores[-3:-1].topk(2).indices.tolist()
    assert [value for chunk in (first, second) for value in chunk.output_logprobs.token_logprobs] == list(
        output.token_logprobs
    )


async def test_choices_of_their_own(real: Stub, prompt: list[int]) -> None:
    asked = request(prompt, stream=False, max_tokens=6, temperature=1.5, seed=1, n=3, ignore_eos=True)
    completes = await responses(real.Generate(asked))
    assert sorted(complete.index for complete in completes) == [0, 1, 2]
    assert all(complete.completion_tokens == 6 for complete in completes)
    assert len({tuple(complete.output_ids) for complete in completes}) == 3


async def test_what_ends_an_answer(real: Stub, smollm2: LoadedModel, prompt: list[int]) -> None:
    (free,) = await responses(real.Generate(request(prompt, stream=False, max_tokens=8, temperature=0)))
    token = free.output_ids[3]
    text = smollm2.tokenizer.decode(free.output_ids[:4])[-3:]
    (by_token,) = await responses(
        real.Generate(request(prompt, stream=False, max_tokens=8, temperature=0, stop_token_ids=[token]))
    )
    assert (by_token.finish_reason, by_token.matched_token_id) == ("stop", token)
    assert by_token.output_ids == free.output_ids[: list(free.output_ids).index(token) + 1]
    (by_text,) = await responses(real.Generate(request(prompt, stream=False, max_tokens=8, temperature=0, stop=[text])))
    assert (by_text.finish_reason, by_text.matched_stop_str) == ("stop", text)
    (later,) = await responses(
        real.Generate(request(prompt, stream=False, max_tokens=8, temperature=0, stop_token_ids=[token], min_tokens=7))
    )
    assert later.completion_tokens >= 7


async def test_a_constraint_holds(real: Stub, smollm2: LoadedModel, prompt: list[int]) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    asked = request(prompt, stream=False, max_tokens=40, temperature=0, json_schema=json.dumps(schema))
    (complete,) = await responses(real.Generate(asked))
    answer = smollm2.tokenizer.decode(complete.output_ids, skip_special_tokens=True)
    assert json.loads(answer)["city"] in ("Paris", "Rome")
    assert complete.finish_reason == "stop"
    assert complete.WhichOneof("matched_stop") is None


async def test_a_stored_prefix_counts_as_cached(real: Stub, smollm2: LoadedModel) -> None:
    long = smollm2.tokenizer("A lighthouse stands on the rock, and the sea is grey. " * 40)["input_ids"]
    (first,) = await responses(real.Generate(request(long, stream=False, max_tokens=1)))
    assert first.cached_tokens == 0

    async def cached() -> bool:
        (again,) = await responses(real.Generate(request(long, stream=False, max_tokens=1)))
        return 0 < again.cached_tokens < len(long) == again.prompt_tokens

    await until(cached, "the prompt's pages are stored")
