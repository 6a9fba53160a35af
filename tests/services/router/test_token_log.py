"""Tokens reach the session's log in order, a few writes for many."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from redis.exceptions import RedisError

from services.router import token_log
from services.router.sessions import SessionDirectory
from services.router.token_log import LogWriter

from .conftest import opened


async def test_the_log_writer_keeps_order_and_drops_nothing(directory: SessionDirectory) -> None:
    async with opened(directory) as hold:
        await hold.write(0, [9])
        writer = LogWriter(hold, 1, [0, 1, 2], lambda: None)
        assert await directory.tokens(hold.session) == [9]
        for token in range(3, 200):
            writer.add(token)
            if token % 7 == 0:
                await asyncio.sleep(0)
        await writer.flush()
    assert await directory.tokens(hold.session) == [9, *range(200)]


async def test_the_log_writer_collects_tokens(directory: SessionDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(directory) as hold:
        write, written = hold.write, []

        async def counted(offset: int, tokens: Sequence[int]) -> bool:
            written.append((offset, len(tokens)))
            return await write(offset, tokens)

        monkeypatch.setattr(hold, "write", counted)
        monkeypatch.setattr(token_log, "LAG_S", 60.0)
        writer = LogWriter(hold, 0, [1], lambda: None)
        for token in range(2, 50):
            writer.add(token)
            await asyncio.sleep(0.001)
        assert written == [(0, 2)]  # the prompt and the first token do not wait
        await writer.flush()
    assert written == [(0, 2), (2, 47)]
    assert await directory.tokens(hold.session) == [*range(1, 50)]


async def test_the_log_writer_ends_with_its_session(directory: SessionDirectory) -> None:
    lost = asyncio.Event()
    async with opened(directory) as hold:
        writer = LogWriter(hold, 0, [1], lost.set)
        await directory.close(hold.session)
        writer.add(2)
        await asyncio.wait_for(lost.wait(), 10)
        await writer.flush()
    assert await directory.tokens(hold.session) == []


async def test_the_log_writer_repeats_what_a_lost_write_held(
    directory: SessionDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(directory) as hold:
        writer = LogWriter(hold, 0, [1], lambda: None)
        write, failures = hold.write, [RedisError("gone"), RedisError("gone")]

        async def flaky(offset: int, tokens: Sequence[int]) -> bool:
            if failures:
                raise failures.pop()
            return await write(offset, tokens)

        monkeypatch.setattr(hold, "write", flaky)
        for token in (2, 3):
            writer.add(token)
            await asyncio.sleep(0.01)
        await writer.flush()
    assert await directory.tokens(hold.session) == [1, 2, 3]
    assert failures == []
