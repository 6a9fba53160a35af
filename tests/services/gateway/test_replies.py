"""Chunks of an answer, of messages as the router sends them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from qaq.v1 import common_pb2, generate_pb2

from services.gateway.replies import Answer
from services.gateway.shapes import Chat

MODEL = common_pb2.ModelInfo(name="small", fingerprint="abc")
MESSAGES = [
    {"prefill": {"tokens_total": 7}},
    {"token": {"text": "A"}},
    {"token": {"text": "b"}},
    {"finished": {"reason": common_pb2.FINISH_REASON_EOS, "usage": {"prompt_tokens": 7}}},
]


async def chunks(messages: list[dict[str, Any]], continuous: bool = True) -> list[dict[str, Any]]:
    async def replies() -> AsyncIterator[tuple[int, generate_pb2.GenerateReply]]:
        for message in messages:
            yield 0, generate_pb2.GenerateReply(**message)

    answer = Answer(Chat(), MODEL, 1)
    return [chunk async for chunk in answer.chunks(replies(), 1, usage=True, continuous=continuous)]


async def test_usage_of_a_chunk_counts_the_tokens_up_to_it() -> None:
    """The first chunk of a chat has the role alone."""
    for messages in (MESSAGES, MESSAGES[1:]):
        told = await chunks(messages)
        deltas = [chunk["choices"][0]["delta"] for chunk in told[:-1]]
        assert deltas == [{"role": "assistant", "content": ""}, {"content": "A"}, {"content": "b"}, {}]
        assert [chunk["usage"]["completion_tokens"] for chunk in told] == [0, 1, 2, 2, 2]
        assert told[-1]["usage"]["prompt_tokens"] == 7


async def test_usage_that_is_not_continuous_is_told_at_the_end() -> None:
    assert [chunk["usage"] for chunk in (await chunks(MESSAGES, continuous=False))[:-1]] == [None] * 4
