from __future__ import annotations

from typing import Any

import pytest

from services.worker.json_schema import not_enforced, schemas

STRING = {"type": "string"}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": "object", "properties": {"not": STRING, "if": STRING}, "required": ["not"]},
        {"enum": [{"uniqueItems": True}], "default": {"not": 1}, "title": "x"},
        {"type": "array", "uniqueItems": False, "items": STRING},
        {"type": "integer", "multipleOf": 3},
        {"$defs": {"s": STRING}, "$ref": "#/$defs/s", "description": "a string"},
        {"anyOf": [STRING, {"type": "null"}], "default": None, "title": "maybe"},
        {"allOf": [STRING]},
        {"type": "string", "pattern": "^(?:a|b)$"},
    ],
)
def test_what_is_enforced_passes(schema: Any) -> None:
    assert not_enforced(schema) is None


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"type": "array", "uniqueItems": True}, "#: uniqueItems cannot be enforced; leave it out"),
        ({"properties": {"a": {"items": {"not": {}}}}}, "#/properties/a/items: not cannot be enforced"),
        ({"anyOf": [{}, {"if": {}}]}, "#/anyOf/1: if cannot be enforced"),
        ({"$defs": {"x": {"contains": {}}}}, "#/$defs/x: contains"),
        ({"allOf": [{}, {}]}, "allOf of several schemas"),
        ({"anyOf": [{}], "type": "object"}, "type cannot be enforced beside anyOf"),
        ({"$ref": "#/$defs/s", "maxLength": 1}, "maxLength cannot be enforced beside $ref"),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf is enforced for integers only"),
        ({"pattern": "(?=a)b"}, "look-around in a pattern"),
        ({"pattern": "a+", "maxLength": 2}, "write the length into the pattern"),
        ({"properties": {"a": {}}, "required": ["a", "z"]}, 'required names "z"'),
        ({"allOf": 5}, "allOf must be a list of schemas"),
        ({"allOf": None}, "allOf must be a list of schemas"),
        ({"anyOf": []}, "anyOf must be a list of schemas, one at least"),
        ({"properties": {}, "required": [{}]}, "required must be a list of names"),
        ({"required": [[1]]}, "required must be a list of names"),
        ({"$ref": "http://x/y"}, "$ref must name a part of this schema"),
        ({"$ref": 5}, "$ref must name a part of this schema"),
        ({"type": []}, "type must be a name"),
        ({"type": [1]}, "type must be a name"),
        ({"enum": []}, "enum must be a list of values"),
    ],
)
def test_what_is_skipped_is_named(schema: Any, sentence: str) -> None:
    found = not_enforced(schema)
    assert found is not None
    assert sentence in found


def test_schemas_of_a_structural_tag() -> None:
    inner = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": STRING}, "end": "</a>"}
    assert schemas({"type": "structural_tag", "format": {"type": "or", "elements": [inner, inner]}}) == [STRING, STRING]
    assert not_enforced(schemas({"format": {"type": "json_schema", "json_schema": {"not": {}}}})) is not None
