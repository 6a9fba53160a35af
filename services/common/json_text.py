"""JSON in the fields of requests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from services.common.errors import InvalidArgument
from services.common.limits import MAX_DEPTH


class RepeatedKeyError(ValueError):
    """An object has a key twice. Which value counts would depend on who reads it."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the keys and values that were read; for `object_pairs_hook` of `json.loads`.

    Raises:
        RepeatedKeyError: a key is there twice.
    """
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise RepeatedKeyError(f'an object has the key "{key[:100]}" twice; send it once')
        made[key] = value
    return made


def parsed(field: str, text: str) -> Any:
    """A JSON value that is at most `MAX_DEPTH` levels deep.

    Raises:
        InvalidArgument: it is deeper, is no JSON, or an object has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise InvalidArgument(f"{field} is too many levels deep; send at most {MAX_DEPTH}") from error
    except RepeatedKeyError as error:
        raise InvalidArgument(f"{field}: {error}") from error
    except ValueError as error:
        raise InvalidArgument(f"{field} is not JSON: {error}") from error
    level, depth = [value], 0
    while containers := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidArgument(f"{field} is more than {MAX_DEPTH} levels deep; send at most {MAX_DEPTH}")
        level = [part for whole in containers for part in parts(whole)]
    return value


def parts(value: Any) -> Iterable[Any]:
    """The values in an object or a list."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def check_size(field: str, text: str, limit: int) -> None:
    """Raises:
    InvalidArgument: a text is empty, or longer than `limit` bytes.
    """
    size = len(text.encode())
    if size == 0:
        raise InvalidArgument(f"{field} is empty; leave it unset")
    if size > limit:
        raise InvalidArgument(f"{field} is {size} bytes of UTF-8; send at most {limit}")
