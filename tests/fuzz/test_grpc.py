"""Every RPC of every service, by its descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from random import Random
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from qaq.v1 import common_pb2, generate_pb2, inspect_pb2, originals_pb2, worker_pb2

from tests.fuzz.conftest import GROWTH, LONG, SEED, Fuzzed, resident
from tests.fuzz.generators import Messages

MESSAGES = LONG or 100
TOGETHER = 12
ANSWER_S = 90.0
"""Longest time for an answer that is not a stream of tokens."""

TOKENS_S = 3.0
"""After this long a stream of tokens is cancelled."""

Code = grpc.StatusCode
NOT_ALLOWED = (Code.INTERNAL, Code.UNKNOWN, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
OWN_WORD = "Internal error from Core"
"""What grpc.aio's client says, not the server, of a call that ended while it was writing. What servers say is noted
where they say it, see `Fuzzed.errors`."""

SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
HINTS: dict[str, Any] = {
    "model": ["", "tiny", "other"],
    "prompt": ["Hello, how are you?", "x " * 100],
    "text": ["Hello", "x " * 100],
    "role": ["user", "system", "assistant", "tool"],
    "content": ["Hello"],
    "name": ["", "f"],
    "session_id": ["", "", "no such session"],
    "branch_of": [""],
    "preset": ["fp16", "fp16", "paper", "balanced"],
    "target_bits": [2.0, 16.0],
    "target_compression": [4.0],
    "target_error": [0.01],
    "temperature": [0.0, 1.0],
    "top_k": [0, 5, 2**31 - 1],
    "top_p": [0.0, 0.5, 1.0],
    "min_p": [0.0, 0.1],
    "repetition_penalty": [1.0, 0.01, 100.0],
    "frequency_penalty": [0.0, 2.0],
    "presence_penalty": [0.0, -2.0],
    "max_new_tokens": [1, 2, 5, 0],
    "max_tokens": [1, 2, 5, 0],
    "min_new_tokens": [0, 1],
    "choices": [0, 1, 2, 8, 9],
    "n": [0, 1, 2, 8, 9],
    "token_ids": [1, 2, 300],
    "prompt_token_ids": [1, 2, 300],
    "input_ids": [1, 2, 300],
    "stop_token_ids": [5],
    "history_tokens": [0],
    "generated_tokens": [0],
    "top_logprobs": [0, 2],
    "prompt_logprobs": [0, 2],
    "json_schema": [SCHEMA],
    "regex": ["[a-z]{1,5}", "(a|b)*c"],
    "grammar": ['root ::= "a" | "b" root'],
    "structural_tag": ['{"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}'],
    "tools": ['{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}'],
    "tool_calls_json": ["", '[{"function": {"name": "f", "arguments": "{}"}}]'],
    "chat_template_kwargs": ["", "{}"],
    "codec_id": [bytes(16)],
    "page_id": [bytes(32)],
    "page_ids": [bytes(32), b"x" * 32],
    "dtype": ["float32", "float16", "bfloat16"],
    "layers": [2],
    "kv_heads": [2],
    "tokens": [32],
    "head_dim": [16],
    "data": [bytes(2 * 2 * 2 * 32 * 16 * 4), bytes(100)],
    "last": [True, False],
}
# It ends the worker, as it should, whatever its message is.
EXCLUDED = ("Drain",)


def services() -> Iterator[tuple[str, ServiceDescriptor]]:
    yield "router", generate_pb2.DESCRIPTOR.services_by_name["Inference"]
    yield "router", inspect_pb2.DESCRIPTOR.services_by_name["Inspector"]
    yield "worker", worker_pb2.DESCRIPTOR.services_by_name["Worker"]
    yield "originals", originals_pb2.DESCRIPTOR.services_by_name["Originals"]
    with contextlib.suppress(ModuleNotFoundError):
        from smg_grpc_proto import vllm_engine_pb2

        yield "router", vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"]


def methods() -> list[tuple[str, MethodDescriptor]]:
    return [(role, method) for role, service in services() for method in service.methods if method.name not in EXCLUDED]


class Caller:
    """Calls methods with what it makes up, and notes every answer that must not be."""

    def __init__(self, channels: dict[str, grpc.aio.Channel], seed: int) -> None:
        self._channels, self._random = channels, Random(seed)
        self._messages = Messages(self._random, HINTS)
        self.codes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.sent = 0

    async def call(self, role: str, method: MethodDescriptor) -> None:
        random = self._random
        kinds = ("unary", "stream")
        kind = f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
        metadata = random.choice(((), (), (("qaq-tenant", random.choice(("a", "x" * 129, "~ "))),)))
        start = getattr(self._channels[role], kind)(f"/{method.containing_service.full_name}/{method.name}")
        given = self._stream(method) if method.client_streaming else self._one(method)
        call = start(given, timeout=ANSWER_S, metadata=metadata)
        patience = random.choice((0.0, 0.01, 0.3, *[TOKENS_S] * 6)) if random.random() < 0.3 else ANSWER_S
        try:
            async with asyncio.timeout(min(patience, TOKENS_S) if method.server_streaming else patience):
                if method.server_streaming:
                    async for _ in call:
                        pass
                else:
                    await call
            self.codes["OK"] += 1
        except TimeoutError:
            call.cancel()
            self.codes["cancelled"] += 1
        except grpc.aio.AioRpcError as error:
            code, untold = error.code(), error.details() == OWN_WORD
            self.codes["untold" if untold else code.name] += 1
            if code in NOT_ALLOWED and not untold:
                sent = given.hex()[:400] if isinstance(given, bytes) else "a stream"
                self.wrong.append(f"{method.full_name} {code.name}: {error.details()} <- {sent}")

    def _one(self, method: MethodDescriptor) -> bytes:
        self.sent += 1
        return self._messages.raw(method.input_type)

    async def _stream(self, method: MethodDescriptor) -> AsyncIterator[bytes]:
        """Some messages; then the stream ends, or does not."""
        for _ in range(self._random.choice((0, 1, 1, 2, 5, 40))):
            yield self._one(method)
        if self._random.random() < 0.15:
            await asyncio.sleep(TOKENS_S)


async def run(stack: Fuzzed, messages: int, seed: int) -> Caller:
    every, random = methods(), Random(seed)
    async with contextlib.AsyncExitStack() as opened:
        channels = {
            role: await opened.enter_async_context(grpc.aio.insecure_channel(stack.addresses[role]))
            for role in ("router", "worker", "originals")
        }
        caller = Caller(channels, seed)

        async def some() -> None:
            while caller.sent < messages:
                await caller.call(*random.choice(every))

        await asyncio.gather(*(some() for _ in range(TOGETHER)))
    return caller


@pytest.mark.timeout(120 + LONG)
async def test_whatever_is_sent_is_answered(fuzzed: Fuzzed) -> None:
    await run(fuzzed, MESSAGES // 4, seed=0)
    await fuzzed.check()
    before = await resident()
    caller = await run(fuzzed, MESSAGES, seed=SEED)
    print(dict(caller.codes))
    assert not caller.wrong, "\n".join(caller.wrong[:20])
    assert min(caller.codes["OK"], caller.codes["INVALID_ARGUMENT"]) > 0, "some messages are valid, others are not"
    await fuzzed.check()
    growth = await resident() - before
    print(f"{growth >> 20} MB more than {before >> 20}")
    assert growth < GROWTH


def test_every_service_is_known() -> None:
    """A service that is added to proto/ must be fuzzed too."""
    names = {service.full_name for _, service in services()}
    declared = {
        service.full_name
        for file in (common_pb2, generate_pb2, inspect_pb2, worker_pb2, originals_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    }
    assert declared <= names
