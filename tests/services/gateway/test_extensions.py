"""What the gateway has beside OpenAI's API, against a running stack."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from qaq_core.models import LoadedModel
from tests.services.gateway.conftest import Served
from tests.services.worker.test_parameters import likelihoods

PROMPT = "The capital of France is"
EURO = "The price is 5 \N{EURO SIGN}, or 6 \N{SNOW CAPPED MOUNTAIN}"


async def test_scoring_without_generating(openai: AsyncOpenAI, served: Served, smollm2: LoadedModel) -> None:
    ids = smollm2.tokenizer.encode(EURO)
    expected = likelihoods(smollm2, ids)
    for prompt in (EURO, ids):
        scored = await openai.completions.create(
            model=served.model, prompt=prompt, max_tokens=0, echo=True, logprobs=1, n=2, temperature=0
        )
        assert scored.usage is not None
        assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (len(ids), 0)
        for choice in scored.choices:
            assert (choice.text, choice.finish_reason) == (EURO, "length")
            listed = choice.logprobs
            assert listed is not None
            values = listed.token_logprobs or []
            assert values[1:] == pytest.approx(
                [float(expected[place, token]) for place, token in enumerate(ids[1:])], abs=2e-2
            )
            assert any(token.startswith("bytes:") for token in listed.tokens or [])
            offsets = listed.text_offset or []
            assert offsets == sorted(offsets)
            assert offsets[-1] < len(EURO)
            for token, top in list(zip(listed.tokens or [], listed.top_logprobs or [], strict=True))[1:]:
                assert token in top
    streamed = await openai.completions.create(
        model=served.model, prompt=EURO, max_tokens=0, echo=True, logprobs=0, stream=True
    )
    (chunk,) = [chunk async for chunk in streamed]
    assert chunk.choices[0].text == EURO
    assert len(chunk.choices[0].logprobs.tokens) == len(ids)
    plain = await openai.completions.create(model=served.model, prompt=EURO, max_tokens=0, echo=True)
    assert (plain.choices[0].text, plain.choices[0].logprobs) == (EURO, None)


async def test_a_prompt_of_one_token(openai: AsyncOpenAI, served: Served) -> None:
    answer = await openai.completions.create(
        model=served.model, prompt=[504], n=8, max_tokens=3, echo=True, logprobs=0, seed=1
    )
    assert len({choice.text for choice in answer.choices}) > 3
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.tokens or []) == 4
        assert (choice.logprobs.token_logprobs or [0])[0] is None


async def test_choices_differ_without_a_temperature(openai: AsyncOpenAI, served: Served) -> None:
    asked = {"model": served.model, "prompt": PROMPT, "max_tokens": 12, "seed": 4}
    several = (await openai.completions.create(**asked, n=3)).choices
    assert len({choice.text for choice in several}) == 3
    greedy = (await openai.completions.create(**asked, n=2, temperature=0)).choices
    tiny = (await openai.completions.create(**asked, temperature=2e-38)).choices
    top = (await openai.completions.create(**asked, top_p=0)).choices
    assert len({choice.text for choice in (*greedy, *tiny, *top)}) == 1


async def test_log_probabilities_of_prompts(openai: AsyncOpenAI, served: Served, smollm2: LoadedModel) -> None:
    ids = smollm2.tokenizer.encode(PROMPT)
    answer = await openai.completions.create(
        model=served.model, prompt=PROMPT, max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    told = answer.choices[0].prompt_logprobs
    assert told[0] is None
    for token, entry in zip(ids[1:], told[1:], strict=True):
        assert entry[str(token)]["rank"] >= 1
        assert sorted(each["rank"] for each in entry.values())[:2] == [1, 2]
    assert answer.choices[0].logprobs is None
    chat = await openai.chat.completions.create(
        model=served.model,
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=1,
        extra_body={"prompt_logprobs": 0},
    )
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens  # type: ignore[union-attr]


async def test_least_length_and_stop_strings(openai: AsyncOpenAI, served: Served, smollm2: LoadedModel) -> None:
    asked = {"model": served.model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stop": ["Paris"]}
    included = await openai.completions.create(**asked, extra_body={"include_stop_str_in_output": True})
    assert included.choices[0].text.endswith("Paris")
    later = await openai.completions.create(**asked, extra_body={"min_tokens": 8})
    assert later.usage is not None
    assert later.usage.completion_tokens >= 8


async def test_a_session_over_http(openai: AsyncOpenAI, served: Served) -> None:
    async with httpx2.AsyncClient(base_url=served.url, timeout=60) as http:

        async def turn(session: str, text: str, **fields: Any) -> dict[str, Any]:
            body = {"session_id": session, "messages": [{"role": "user", "content": text}], "max_tokens": 8}
            answer = await http.post("/v1/chat/completions", json=body | {"temperature": 0} | fields)
            assert answer.status_code == 200, answer.text
            return answer.json()

        opened = await http.post("/v1/sessions", json={"cache": {"preset": "balanced", "target_error": 0.01}})
        session = opened.json()["id"]
        first = await turn(session, "My name is Ada.")
        branch = (await http.post("/v1/sessions", json={"branch_of": session})).json()["id"]
        second = await turn(session, "What is my name?")
        assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == (
            first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1
        )
        same = await turn(branch, "What is my name?")
        assert same["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]
        listed = (await http.get("/v1/sessions")).json()["data"]
        assert {each["id"] for each in listed} == {session, branch}
        assert all(each["tokens"] > 0 and not each["running"] for each in listed)
        for identifier in (session, branch):
            assert (await http.delete(f"/v1/sessions/{identifier}")).json()["deleted"] is True
        gone = await http.delete(f"/v1/sessions/{session}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
        assert (await http.get("/v1/sessions")).json()["data"] == []
        for refused in ({"cache": {"target_error": 99}}, {"branch_of": "x", "cache": {}}, {"other": 1}):
            assert (await http.post("/v1/sessions", json=refused)).status_code == 400


async def test_tokens_and_texts(served: Served, smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    messages = [{"role": "user", "content": "Hi"}]
    async with httpx2.AsyncClient(base_url=served.url, timeout=60) as http:

        async def post(path: str, **body: Any) -> dict[str, Any]:
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        ids = tokenizer.encode(EURO)
        told = await post("/tokenize", prompt=EURO, return_token_strs=True)
        assert told == {
            "count": len(ids),
            "max_model_len": 8192,
            "tokens": ids,
            "token_strs": tokenizer.convert_ids_to_tokens(ids),
        }
        assert (await post("/tokenize", prompt=""))["tokens"] == []
        for opening in (True, False):
            told = await post("/tokenize", messages=messages, add_generation_prompt=opening)
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
            assert told["tokens"] == tokenizer.encode(text, add_special_tokens=False)
            assert told["token_strs"] is None
            assert await post("/detokenize", tokens=told["tokens"]) == {"prompt": text}
        for path, body in (
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "x", "messages": messages}),
            ("/detokenize", {"tokens": [10**6]}),
            ("/detokenize", {"tokens": [-1]}),
        ):
            assert (await http.post(path, json=body)).status_code == 400


async def test_what_lm_eval_reads(served: Served, smollm2: LoadedModel) -> None:
    """Its likelihoods of an answer after a question, by its own request and its own reading."""
    api = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    question, right, wrong = (smollm2.tokenizer.encode(text) for text in (PROMPT, " Paris", " London"))
    asked = {"prompt": [question + right, question + wrong], "temperature": 0, "max_tokens": 1, "logprobs": 1}
    async with httpx2.AsyncClient(base_url=served.url, timeout=60) as http:
        answer = (await http.post("/v1/completions", json=asked | {"seed": 1234, "echo": True})).json()
    read = api.parse_logprobs(answer, tokens=asked["prompt"], ctxlens=[len(question)] * 2)
    for (logprob, greedy), answered in zip(read, (right, wrong), strict=True):
        (token,) = answered
        scores = likelihoods(smollm2, question)[-1]
        assert logprob == pytest.approx(float(scores[token]), abs=2e-2)
        assert greedy == (int(scores.argmax()) == token)
    assert read[0][0] > read[1][0]
