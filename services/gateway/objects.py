"""JSON objects of requests, and the types of their fields. Everything has a bound."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.common.limits import MAX_SESSION_ID_BYTES, MAX_STOP_BYTES, MAX_TOP_LOGPROBS

MAX_FIELDS = 128
MAX_NAME = 256

Int32 = Annotated[int, Field(ge=0, lt=2**31)]
Top = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)]
TokenIds = Annotated[list[Int32], Field(fail_fast=True, min_length=1, max_length=1 << 20)]
Stop = Annotated[str, Field(max_length=MAX_STOP_BYTES)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
SessionId = Annotated[str, Field(max_length=MAX_SESSION_ID_BYTES)]
Name = Annotated[str, Field(max_length=MAX_NAME)]


class Object(BaseModel):
    """A JSON object of a request. A null is as if the field had been left out."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_FIELDS:
            raise ValueError(f"an object has {len(given)} fields; send at most {MAX_FIELDS}")
        return {name: value for name, value in given.items() if value is not None}
