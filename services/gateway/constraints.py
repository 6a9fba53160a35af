"""What clients may ask of the form of an answer: OpenAI's `response_format`, and vLLM's extensions."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field
from qaq.v1 import common_pb2

from services.common.errors import InvalidArgument, StatusError, to_status
from services.common.limits import (
    MAX_CHOICE_TEXTS,
    MAX_GRAMMAR_BYTES,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_BYTES,
    MAX_STRUCTURAL_TAG_BYTES,
)
from services.gateway.objects import Name, Object

Constraint = common_pb2.Constraint

# How messages of the router name a constraint: "constraint", and a kind.
_NAME = re.compile(r"constraint(\.\w+)?(?=[ :])")

Schema = dict[str, Any] | bool
SchemaText = Annotated[str, Field(max_length=MAX_SCHEMA_BYTES)]
Regex = Annotated[str, Field(max_length=MAX_REGEX_BYTES)]
Grammar = Annotated[str, Field(max_length=MAX_GRAMMAR_BYTES)]
TagText = Annotated[str, Field(max_length=MAX_STRUCTURAL_TAG_BYTES)]
Texts = Annotated[list[str], Field(fail_fast=True, max_length=MAX_CHOICE_TEXTS)]


class TextFormat(Object):
    type: Literal["text"]


class JsonObjectFormat(Object):
    type: Literal["json_object"]


class NamedSchema(Object):
    """A schema. It holds whether or not `strict` is set."""

    name: Name
    description: str | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Object):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Object):
    """vLLM's form of a constraint."""

    json_schema: Schema | SchemaText | None = Field(default=None, alias="json")
    json_object: Literal[True] | None = None
    regex: Regex | None = None
    choice: Texts | None = None
    grammar: Grammar | None = None
    structural_tag: dict[str, Any] | TagText | None = None


class Constrained(Object):
    """Fields of a request that constrain the answer's text. At most one of them may be set.

    Attributes:
        guided_json … structured_outputs: extensions of OpenAI's API, as vLLM has them; sent with `extra_body`.
    """

    response_format: ResponseFormat | None = None
    guided_json: Schema | SchemaText | None = None
    guided_regex: Regex | None = None
    guided_choice: Texts | None = None
    guided_grammar: Grammar | None = None
    structured_outputs: StructuredOutputs | None = None


def constraint(body: Constrained) -> Constraint | None:
    """The constraint of a request; None if it has none.

    Raises:
        InvalidArgument: there are several.
    """
    found = _found(body)
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise InvalidArgument(f"an answer has one constraint, and {names} are set; send one of them")
    return found[0][1] if found else None


def dumped(field: str, value: Any) -> str:
    """JSON of a value; a string is taken for JSON.

    Raises:
        InvalidArgument: the value is nested too deeply.
    """
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise InvalidArgument(f"{field} is nested too deeply; send a flatter one") from error


def retold(error: Exception, body: Constrained) -> Exception:
    """An error of the router about a request's constraint, by the field that the client has sent. Others stay."""
    status = to_status(error)
    named = _NAME.match(status.message) if status else None
    if status is None or named is None:
        return error
    field = next((name for name, _ in _found(body)), "tools")
    return StatusError(
        field + status.message[named.end() :],
        code=status.code,
        retry_after_ms=status.retry_after_ms,
        reason=status.reason,
        limits=status.limits,
    )


Named = tuple[str, Constraint]


def _found(body: Constrained) -> list[Named]:
    return [*_of_format(body.response_format), *_guided(body), *_structured(body.structured_outputs)]


def _of_format(asked: ResponseFormat | None) -> list[Named]:
    match asked:
        case JsonObjectFormat():
            return [("response_format", Constraint(json_object=True))]
        case JsonSchemaFormat():
            schema = dumped("response_format.json_schema.schema", asked.json_schema.json_schema)
            return [("response_format", Constraint(json_schema=schema))]
    return []


def _guided(body: Constrained) -> list[Named]:
    found: list[Named] = []
    if body.guided_json is not None:
        found.append(("guided_json", Constraint(json_schema=dumped("guided_json", body.guided_json))))
    if body.guided_regex is not None:
        found.append(("guided_regex", Constraint(regex=body.guided_regex)))
    if body.guided_choice is not None:
        found.append(("guided_choice", Constraint(choice=Constraint.Choice(texts=body.guided_choice))))
    if body.guided_grammar is not None:
        found.append(("guided_grammar", Constraint(grammar=body.guided_grammar)))
    return found


def _structured(asked: StructuredOutputs | None) -> list[Named]:
    if asked is None:
        return []
    found: dict[str, Constraint] = {}
    if asked.json_schema is not None:
        found["json"] = Constraint(json_schema=dumped("structured_outputs.json", asked.json_schema))
    if asked.json_object is not None:
        found["json_object"] = Constraint(json_object=True)
    if asked.regex is not None:
        found["regex"] = Constraint(regex=asked.regex)
    if asked.choice is not None:
        found["choice"] = Constraint(choice=Constraint.Choice(texts=asked.choice))
    if asked.grammar is not None:
        found["grammar"] = Constraint(grammar=asked.grammar)
    if asked.structural_tag is not None:
        tag = dumped("structured_outputs.structural_tag", asked.structural_tag)
        found["structural_tag"] = Constraint(structural_tag=tag)
    return [(f"structured_outputs.{name}", made) for name, made in found.items()]
