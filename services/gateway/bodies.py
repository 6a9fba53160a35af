"""Bodies of requests: how many bytes of them may be in memory at a time, how long one may take to come, and how many
values its JSON may have."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from services.common.json_text import unique

PAUSE_S, WHOLE_S = 15.0, 300.0
"""Longest time until the next part of a body, and until all of it has come."""

MAX_VALUES = 1 << 19
"""Values in a body, such as token ids; a list or an object counts for CONTAINER of them. The interpreter makes one at a
time and does nothing else meanwhile: so many take 50 ms, as long as 8 MiB of text."""

CONTAINER = 8

CLOSE = {"connection": "close"}
LATER = CLOSE | {"retry-after-ms": "2000", "retry-after": "2"}


class Bodies:
    """The bodies of all requests that have not been answered.

    A caller may hold as many bytes as are left for others, or one body: those who send slowly leave room.

    Args:
        budget: bytes of all of them. limit: bytes of one.

    Attributes:
        held: bytes that they hold.
    """

    def __init__(self, budget: int, limit: int) -> None:
        self.held, self._budget, self.limit = 0, budget, limit
        self._of: Counter[str] = Counter()

    def add(self, caller: str, size: int) -> None:
        """Raises:
        HTTPException: there is no room for that many more bytes.
        """
        left, mine = self._budget - self.held - size, self._of[caller] + size
        if size and left < 0:
            raise HTTPException(
                429, f"the bodies of all requests hold {self.held:,} of {self._budget:,} bytes; try again later", LATER
            )
        if size and mine > max(left, self.limit):
            raise HTTPException(
                429,
                f"the bodies of your requests hold {mine - size:,} bytes, and {left + size:,} are left for all; send "
                "fewer at a time, or try again later",
                LATER,
            )
        self.held += size
        self._of[caller] += size

    def drop(self, caller: str, size: int) -> None:
        self.held -= size
        self._of[caller] -= size
        if not self._of[caller]:
            del self._of[caller]


class Body:
    """The body of one request while it comes.

    Args:
        expected: whether there is one. caller: whose it is.

    Attributes:
        size: bytes that have come. complete: whether all have.
    """

    def __init__(self, bodies: Bodies, receive: Receive, expected: bool, caller: str) -> None:
        self._bodies, self._receive, self._caller = bodies, receive, caller
        self.size, self.complete = 0, not expected
        self._until: float | None = None

    async def receive(self) -> Message:
        """The next part.

        Raises:
            HTTPException: the body is too long, takes too long, or there is no room for it.
        """
        if self.complete:
            return await self._receive()
        message = await self._in_time()
        size = len(message.get("body", b""))
        if self.size + size > self._bodies.limit:
            raise HTTPException(413, f"the body is too long; send at most {self._bodies.limit:,} bytes", CLOSE)
        self._bodies.add(self._caller, size)
        self.size += size
        self.complete = not message.get("more_body", False)
        return message

    def close(self) -> None:
        """The request has been answered."""
        self._bodies.drop(self._caller, self.size)
        self.size = 0

    async def _in_time(self) -> Message:
        loop = asyncio.get_running_loop()
        if self._until is None:
            self._until = loop.time() + WHOLE_S
        try:
            async with asyncio.timeout_at(min(self._until, loop.time() + PAUSE_S)):
                return await self._receive()
        except TimeoutError as error:
            raise HTTPException(
                408,
                f"the body did not come in time: send it within {WHOLE_S:g} s, without a pause of {PAUSE_S:g} s",
                CLOSE,
            ) from error


def check_values(body: bytes) -> None:
    """Raises:
    HTTPException: the JSON has too many values. They are counted by the commas and brackets outside of strings.
    """
    if _values(body) <= MAX_VALUES:
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    values = plain.count(b'"') // 2  # strings
    if values <= MAX_VALUES:
        values = sum(map(_values, plain.split(b'"')[::2]))
    if values > MAX_VALUES:
        raise HTTPException(
            400,
            f"the body has {values:,} values, lists and objects counted {CONTAINER} times; send at most {MAX_VALUES:,}",
        )


def check_keys(body: bytes, value: Any) -> None:
    """Checks that no object of a body has a key twice.

    Args:
        value: what was made of it.
    Raises:
        RepeatedKeyError: one has.
    """
    if body.count(b":") > _keys(value):  # a colon in a text, or a key that was read over
        json.loads(body.decode(), object_pairs_hook=unique)


def _keys(value: Any) -> int:
    """Keys of all objects in a value."""
    count, left = 0, [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            count += len(part)
            left += [each for each in part.values() if isinstance(each, dict | list)]
        elif part and isinstance(part, list) and isinstance(part[0], dict | list):
            left += part
    return count


def _values(part: bytes) -> int:
    return part.count(b",") + CONTAINER * (part.count(b"[") + part.count(b"{"))
