"""How a generation finishes: end of sequence, stop strings, the context's end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from qaq.v1 import common_pb2

from qaq_core.models import LoadedModel
from services.common.errors import InvalidArgument
from tests.services.worker.conftest import (
    EXACT,
    STORY,
    Ids,
    MakeScheduler,
    expected,
    outcome,
    request,
)


async def test_end_of_sequence(whole_smollm2: LoadedModel, make_scheduler: MakeScheduler) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    tokens = whole_smollm2.tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    stop = common_pb2.StopParams(max_new_tokens=60)
    async with make_scheduler(loaded=whole_smollm2) as scheduler:
        result = await outcome(scheduler.submit(request(tokens, stop=stop, cache=EXACT)))
        assert result.done is not None
        assert result.done.reason == common_pb2.FINISH_REASON_EOS
        assert result.tokens[-1] == 2
        assert "Paris" in result.text
        assert "<|im_end|>" not in result.text
        on = common_pb2.StopParams(max_new_tokens=len(result.tokens) + 2, ignore_eos=True)
        longer = await outcome(scheduler.submit(request(tokens, stop=on, cache=EXACT)))
        assert longer.tokens[: len(result.tokens)] == result.tokens
        assert len(longer.tokens) == len(result.tokens) + 2


async def test_stop_string(smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY)
    words = smollm2.tokenizer.decode(expected(smollm2, tokens, 16))
    middle = words[len(words) // 2 : len(words) // 2 + 4]
    stop = common_pb2.StopParams(max_new_tokens=16, stop=["never there", middle], ignore_eos=True)
    async with make_scheduler() as scheduler:
        result = await outcome(scheduler.submit(request(tokens, stop=stop, cache=EXACT)))
    assert result.done is not None
    assert result.done.reason == common_pb2.FINISH_REASON_STOP
    assert result.text == words[: words.index(middle)]


async def test_context_ends_a_generation(smollm2: LoadedModel, make_scheduler: MakeScheduler, ids: Ids) -> None:
    tokens = ids(STORY)
    small = replace(smollm2, context_length=len(tokens) + 3)
    async with make_scheduler(loaded=small) as scheduler:
        result = await outcome(scheduler.submit(request(tokens, 20, cache=EXACT)))
        assert result.done is not None
        assert (len(result.tokens), result.done.reason) == (3, common_pb2.FINISH_REASON_LENGTH)
        with pytest.raises(InvalidArgument, match="shorten the prompt"):
            scheduler.submit(request([*tokens, 5, 6, 7], 1))
