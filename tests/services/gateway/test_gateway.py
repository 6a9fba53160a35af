"""OpenAI's own client against a running stack."""

from __future__ import annotations

import asyncio
import re

import httpx2
import openai as api
import pytest
from openai import AsyncOpenAI
from qaq.v1 import worker_pb2, worker_pb2_grpc
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.registry import Registry
from services.common.server import PortTakenError
from services.common.settings import GatewaySettings
from services.gateway.server import GatewayServer
from tests.services.gateway.conftest import Served

PROMPT = "The capital of France is"


async def test_models(openai: AsyncOpenAI, served: Served) -> None:
    (listed,) = (await openai.models.list()).data
    assert listed.id == served.model
    assert listed.max_model_len == 8192
    assert listed.default_sampling_params["temperature"] == 1
    assert (await openai.models.retrieve(served.model)).id == served.model
    with pytest.raises(api.NotFoundError, match="is not served here") as caught:
        await openai.models.retrieve("gpt-9")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_a_completion_whole_and_in_parts(openai: AsyncOpenAI, served: Served) -> None:
    asked = {"model": served.model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = await openai.completions.create(**asked)
    assert whole.object == "text_completion"
    assert "Paris" in whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 12, 17)
    assert whole.usage.cache["kv_bytes"] > 0
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    assert whole.system_fingerprint.startswith("fp_")
    stream = await openai.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) >= 12
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 17
    told = await openai.completions.create(
        **asked, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    counts = [(chunk.usage.prompt_tokens, chunk.usage.completion_tokens) async for chunk in told]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == ((5, 1), (5, 12))
    untold = await openai.completions.create(**asked, stream=True, stream_options={"continuous_usage_stats": True})
    assert [chunk.usage async for chunk in untold if chunk.usage is not None] == []


async def test_a_chat_whole_and_in_parts(openai: AsyncOpenAI, served: Served) -> None:
    messages = [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
    ]
    asked = {"model": served.model, "messages": messages, "max_completion_tokens": 24, "temperature": 0}
    whole = await openai.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert (message.role, whole.object) == ("assistant", "chat.completion")
    assert "Paris" in (message.content or "")
    async with openai.chat.completions.stream(**asked) as stream:
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
        final = await stream.get_final_completion()
    assert "".join(deltas) == message.content == final.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason


async def test_stop_choices_and_several_prompts(openai: AsyncOpenAI, served: Served) -> None:
    free = (await openai.completions.create(model=served.model, prompt=PROMPT, max_tokens=12, temperature=0)).choices
    stopped = await openai.completions.create(
        model=served.model, prompt=PROMPT, max_tokens=12, temperature=0, stop=["Paris"]
    )
    assert stopped.choices[0].text == free[0].text.partition("Paris")[0]
    assert stopped.choices[0].finish_reason == "stop"
    several = await openai.completions.create(
        model=served.model,
        prompt=[PROMPT, [504, 3575, 282]],
        n=2,
        max_tokens=6,
        temperature=1.5,
        seed=3,
        echo=True,
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in several.choices]
    assert texts[0].startswith(PROMPT)
    assert texts[1].startswith(PROMPT)
    assert len(set(texts)) == 4
    assert several.usage is not None
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (8, 24)


async def test_likelihoods(openai: AsyncOpenAI, served: Served, smollm2: LoadedModel) -> None:
    scored = await openai.completions.create(
        model=served.model, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2, echo=True
    )
    listed = scored.choices[0].logprobs
    assert listed is not None
    assert "".join(listed.tokens or []) == scored.choices[0].text
    assert listed.token_logprobs is not None
    assert listed.token_logprobs[0] is None
    assert all(value < 0 for value in listed.token_logprobs[1:])
    assert [2 <= len(top) <= 3 for top in (listed.top_logprobs or [])[1:]] == [True] * 8
    assert all(token in top for token, top in list(zip(listed.tokens, listed.top_logprobs, strict=True))[1:])
    assert listed.text_offset == [len("".join(listed.tokens[:at])) for at in range(9)]
    chat = await openai.chat.completions.create(
        model=served.model,
        messages=[{"role": "user", "content": "Say yes."}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert "".join(part.token for part in content) == chat.choices[0].message.content
    for part in content:
        assert part.top_logprobs[0].token == part.token
        assert bytes(part.bytes or []).decode() == part.token


async def test_what_is_not_of_openais_api(openai: AsyncOpenAI, served: Served, smollm2: LoadedModel) -> None:
    (token,) = smollm2.tokenizer.encode(" Paris")
    asked = {"model": served.model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    other = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [token], "ignore_eos": True}
    answer = await openai.completions.create(**asked, extra_body=other | {"cache": {"preset": "paper"}})
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" not in answer.choices[0].text
    biased = await openai.completions.create(**asked, logit_bias={str(token): -100})
    assert "Paris" not in biased.choices[0].text


@pytest.mark.parametrize(
    ("changes", "status", "sentence"),
    [
        ({"model": "gpt-9"}, 404, "is not served here"),
        ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({"max_tokens": 0}, 400, "max_tokens is 0"),
        ({"max_tokens": 2**40}, 400, "max_tokens: Input should be less than"),
        ({"max_tokens": 9000}, 400, "max_tokens is 9000"),
        ({"n": 99}, 400, "n is 99; send 1 to 8"),
        ({"stop": [""]}, 400, r"stop\[0\] is empty"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias names token 99999"),
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": "word " * 9000}, 400, "has room for"),
        ({"extra_body": {"suffix": "x"}}, 400, "suffix"),
        ({"extra_body": {"grammar": "x"}}, 400, "grammar is not supported here"),
        ({"extra_body": {"session_id": "nobody"}}, 404, "does not exist"),
        ({"max_tokens": 9000, "stream": True}, 400, "max_tokens is 9000"),
    ],
)
async def test_errors(openai: AsyncOpenAI, served: Served, changes: dict, status: int, sentence: str) -> None:
    asked = {"model": served.model, "prompt": PROMPT, "max_tokens": 4} | changes
    with pytest.raises(api.APIStatusError, match=sentence) as caught:
        await openai.completions.create(**asked)
    assert caught.value.status_code == status
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    if status == 400 and "suffix" not in sentence:
        assert caught.value.param == re.match(r"[a-z_]+", str(caught.value.body["message"]))[0]  # type: ignore[index]


async def test_a_context_that_is_too_short(openai: AsyncOpenAI, served: Served) -> None:
    """Clients recognize it by the code or by OpenAI's own words."""
    with pytest.raises(api.BadRequestError, match="this model's maximum context length is 8192 tokens") as caught:
        await openai.completions.create(model=served.model, prompt="word " * 9000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(api.BadRequestError) as caught:
        await openai.chat.completions.create(model=served.model, messages=[{"role": "user", "content": "word " * 9000}])
    assert (caught.value.code, caught.value.type) == ("context_length_exceeded", "invalid_request_error")
    assert caught.value.param == "messages"
    hello = [{"role": "user", "content": "Hello"}]
    with pytest.raises(api.BadRequestError, match="max_completion_tokens is 8192") as caught:
        await openai.chat.completions.create(model=served.model, messages=hello, max_completion_tokens=8192)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_completion_tokens")


async def test_errors_without_a_client(served: Served) -> None:
    async with httpx2.AsyncClient(base_url=served.url) as http:
        for answer, status in (
            (await http.post("/v1/chat/completions", content="{"), 415),
            (await http.post("/v1/chat/completions", content="{", headers={"content-type": "application/json"}), 400),
            (await http.post("/v1/chat/completions", json={"messages": "hi"}), 400),
            (await http.get("/v1/nothing"), 404),
            (await http.get("/v1/completions"), 405),
        ):
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert (await http.get("/health")).json() == {"status": "ok"}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_sequence(served: Served, stream: bool) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    async with open_channel(served.worker) as channel:
        worker = worker_pb2_grpc.WorkerStub(channel)

        async def until_running(count: int) -> None:
            while (await worker.Describe(worker_pb2.DescribeRequest())).running != count:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

        async with httpx2.AsyncClient(base_url=served.url, timeout=60) as http:
            request = asyncio.create_task(http.post("/v1/completions", json=asked))
            await until_running(1)
            request.cancel()
            await until_running(0)


async def test_without_a_router(redis: Redis, redis_server: EmbeddedRedis) -> None:
    gateway = GatewayServer(GatewaySettings(redis_url=redis_server.url, port=0))
    address = await gateway.start()
    assert [member.address for member in await Registry(redis).members("gateway")] == [address]
    with pytest.raises(PortTakenError, match="is taken"):
        await GatewayServer(GatewaySettings(redis_url=redis_server.url, port=int(address.rpartition(":")[2]))).start()
    async with httpx2.AsyncClient(base_url=f"http://{address}") as http:
        answer = await http.get("/v1/models")
    assert answer.status_code == 503
    assert "no router is registered" in answer.json()["error"]["message"]
    await gateway.stop()
    assert await Registry(redis).members("gateway") == []
