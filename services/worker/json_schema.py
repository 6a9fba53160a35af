"""What of a JSON schema xgrammar does not enforce: it skips these keywords without an error."""

from __future__ import annotations

from typing import Any

_IGNORED = (
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "if",
    "maxContains",
    "minContains",
    "not",
    "uniqueItems",
)
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf")  # keywords whose siblings are skipped
_ANNOTATIONS = {
    "$anchor", "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description",
    "discriminator", "examples", "nullable", "readOnly", "title", "writeOnly",
}  # fmt: skip
_MAPS = ("$defs", "definitions", "properties", "patternProperties")  # of names to schemas
_DATA = ("const", "default", "enum", "examples", "required")
_LOOKS = ("(?=", "(?!", "(?<")


def not_enforced(schema: Any, place: str = "#") -> str | None:
    """A sentence about the first part of a schema that would be skipped; None if all of it is enforced.

    `oneOf` is enforced as `anyOf`: a text may fit several of its schemas.
    """
    if isinstance(schema, list):
        faults = (not_enforced(part, f"{place}/{index}") for index, part in enumerate(schema))
        return next((fault for fault in faults if fault is not None), None)
    if not isinstance(schema, dict):
        return None
    found = _fault(schema)
    if found is not None:
        return f"{place}: {found}"
    for key, value in schema.items():
        if key in _DATA:
            continue
        named = value if key in _MAPS and isinstance(value, dict) else {"": value}
        for name, part in named.items():
            found = not_enforced(part, f"{place}/{key}/{name}".rstrip("/"))
            if found is not None:
                return found
    return None


def schemas(tag: Any) -> list[Any]:
    """The JSON schemas in a structural tag."""
    if isinstance(tag, list):
        return [schema for part in tag for schema in schemas(part)]
    if not isinstance(tag, dict):
        return []
    if tag.get("type") == "json_schema":
        return [tag.get("json_schema")]
    return [schema for part in tag.values() for schema in schemas(part)]


def _fault(schema: dict[str, Any]) -> str | None:
    malformed = _malformed(schema)
    if malformed is not None:
        return malformed
    for key in _IGNORED:
        if schema.get(key, False) is not False:
            return f"{key} cannot be enforced; leave it out"
    combined = next((key for key in _COMBINED if key in schema), None)
    if combined is not None:
        beside = sorted(schema.keys() - _ANNOTATIONS - {combined})
        if beside:
            return f"{beside[0]} cannot be enforced beside {combined}; move it into the schemas of {combined}"
        if combined == "allOf" and len(schema["allOf"]) > 1:
            return "allOf of several schemas cannot be enforced; write them as one"
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        if any(look in pattern for look in _LOOKS):
            return "look-around in a pattern cannot be enforced; write it without"
        if schema.keys() & {"minLength", "maxLength"}:
            return "minLength and maxLength cannot be enforced beside pattern; write the length into the pattern"
    if "multipleOf" in schema and schema.get("type") != "integer":
        return "multipleOf is enforced for integers only; leave it out"
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list):
        unknown = [str(name) for name in required if name not in properties]
        if unknown:
            return f'required names "{unknown[0][:64]}", which is not among the properties; declare it'
    return None


def _malformed(schema: dict[str, Any]) -> str | None:
    """What xgrammar would take for a schema that any value fits."""
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema and not (isinstance(schema[key], list) and schema[key]):
            return f"{key} must be a list of schemas, one at least"
    reference = schema.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        return "$ref must name a part of this schema, such as #/$defs/name"
    kinds = schema.get("type", "any")
    if not isinstance(kinds, str) and not (
        isinstance(kinds, list) and kinds and all(isinstance(k, str) for k in kinds)
    ):
        return "type must be a name, or a list of names"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return "required must be a list of names"
    if not isinstance(schema.get("enum", [0]), list) or not schema.get("enum", [0]):
        return "enum must be a list of values, one at least"
    return None
