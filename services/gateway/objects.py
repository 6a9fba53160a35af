"""JSON objects of requests, and the types of their fields. Everything has a bound."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.common.errors import InvalidArgument
from services.common.limits import MAX_SESSION_ID_BYTES, MAX_STOP_BYTES, MAX_TOP_LOGPROBS

MAX_FIELDS = 128
MAX_NAME = 256

Int32 = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Top = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=1 << 20)]
Stop = Annotated[str, Field(max_length=MAX_STOP_BYTES)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100, strict=True)]
SessionId = Annotated[str, Field(max_length=MAX_SESSION_ID_BYTES)]
Name = Annotated[str, Field(max_length=MAX_NAME)]


class Object(BaseModel):
    """A JSON object of a request. A null is as if the field had been left out. True and false are no numbers."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_FIELDS:
            raise ValueError(f"an object has {len(given)} fields; send at most {MAX_FIELDS}")
        for name, value in given.items():
            if isinstance(value, bool) and name in _numbers(cls):
                raise InvalidArgument(f"{name} is {str(value).lower()}; send a number")
        return {name: value for name, value in given.items() if value is not None}


@lru_cache
def _numbers(kind: type[BaseModel]) -> frozenset[str]:
    """The fields of an object that are numbers."""
    fields = ((field.alias or name, [*_parts(field.annotation)]) for name, field in kind.model_fields.items())
    return frozenset(name for name, parts in fields if (int in parts or float in parts) and bool not in parts)


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that a type consists of."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
