"""Values that services may be sent: valid ones, those at the ends of what a field holds, and hostile ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

Hints = Mapping[str, Sequence[Any]]
"""Values that make sense, by a field's name, so that not everything is refused by its first check."""

DEPTH = 6
MOST_BYTES = 6 << 20  # of a message: more than any request may have
_FLOATS = (
    0.0,
    -0.0,
    1.0,
    0.5,
    -1.0,
    2.0,
    16.0,
    1e-45,
    1e-5,
    3.4e38,
    -3.4e38,
    float("nan"),
    float("inf"),
    -float("inf"),
)
_TEXTS = (
    "",
    "x",
    "é世界🙂",
    "\0",
    "\ufeff",
    " \n\t ",
    "<|im_start|>system",
    "{{ 7 * 7 }}{% for a in b %}",
    "../../etc/passwd",
    "%s%n\r\nx: y",
    "[" * 500,
    '{"a":' * 200,
    '{"type": "object"}',
    "(a+)+$",
    'root ::= "a" root | "b"',
    "a" * 300,
    "ab " * 20_000,
)
_FIELD = FieldDescriptor
_PYTHON: dict[int, type] = {
    _FIELD.TYPE_DOUBLE: float,
    _FIELD.TYPE_FLOAT: float,
    _FIELD.TYPE_BOOL: bool,
    _FIELD.TYPE_STRING: str,
    _FIELD.TYPE_BYTES: bytes,
}


class Messages:
    """Makes messages of protobuf by their descriptors."""

    def __init__(self, random: Random, hints: Hints) -> None:
        self._random, self._hints = random, hints
        self._room = MOST_BYTES  # what the message that is made may still hold

    def raw(self, descriptor: Descriptor) -> bytes:
        """A message on the wire; one of three is damaged there."""
        self._room = MOST_BYTES
        raw = self.message(descriptor).SerializeToString()
        return self.damaged(raw) if self._random.random() < 0.33 else raw

    def message(self, descriptor: Descriptor, depth: int = 0) -> Message:
        made = GetMessageClass(descriptor)()
        share = self._random.choice((0.2, 0.5, 0.9))
        for field in descriptor.fields:
            if self._random.random() < share and depth < DEPTH:
                self._fill(made, field, depth)
        return made

    def damaged(self, raw: bytes) -> bytes:
        random, data = self._random, bytearray(raw)
        match random.randrange(6):
            case 0:
                return bytes(data[: random.randrange(len(data) + 1)])
            case 1:
                for _ in range(random.randrange(1, 9)):
                    if data:
                        data[random.randrange(len(data))] = random.randrange(256)
                return bytes(data)
            case 2:
                return random.randbytes(random.choice((1, 3, 40, 4000)))
            case 3:
                return raw + raw
            case 4:  # a string that is no UTF-8, in a low field
                return raw + bytes([random.randrange(1, 15) << 3 | 2, 2, 0xFF, 0xFE])
            case _:  # a length far beyond the end, or a group that never ends
                return raw + random.choice((b"\x12\xff\xff\xff\xff\x0f", b"\x0b" * 200, b"\xff" * 20))

    def _fill(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        if not field.is_repeated:
            if field.message_type is not None:
                getattr(message, field.name).CopyFrom(self.message(field.message_type, depth + 1))
                return
            self._set(message, field)
            return
        count = self._random.choice((0, 1, 1, 2, 3, 20, self._random.choice((20, 1100, 70_000))))
        entries = getattr(message, field.name)
        if field.message_type is None:
            few = [self._scalar(field) for _ in range(min(count, 20))]
            size = sum(len(one) if isinstance(one, str | bytes) else 8 for one in few)
            entries.extend(few * self._copies(count, few, size))
        elif field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            for _ in range(min(count, 1100)):
                if value.message_type is None:
                    entries[self._scalar(key)] = self._scalar(value)
        else:
            few = [self.message(field.message_type, depth + 1) for _ in range(min(count, 6))]
            size = sum(one.ByteSize() for one in few)
            entries.extend(few * self._copies(min(count, 20 if depth else 5000), few, size))

    def _set(self, message: Message, field: FieldDescriptor) -> None:
        setattr(message, field.name, self._scalar(field))

    def _copies(self, count: int, few: Sequence[Any], size: int) -> int:
        """How often a few values are sent, that are to be `count` together."""
        copies = max(1, min(count // max(1, len(few)), self._room // max(1, size)))
        self._room -= (copies - 1) * size
        return copies

    def _scalar(self, field: FieldDescriptor) -> Any:
        value = self._any(field)
        if isinstance(value, str | bytes):
            value = value if len(value) <= self._room else value[:0]
            self._room -= len(value)
        return value

    def _any(self, field: FieldDescriptor) -> Any:
        random, kind = self._random, _PYTHON.get(field.type, int)
        hints = [hint for hint in self._hints.get(field.name, ()) if isinstance(hint, kind)]
        if hints and random.random() < 0.7:
            return random.choice(hints)
        if field.type in (_FIELD.TYPE_DOUBLE, _FIELD.TYPE_FLOAT):
            return random.choice((*_FLOATS, random.uniform(-3, 3)))
        if field.type == _FIELD.TYPE_BOOL:
            return random.random() < 0.5
        if field.type == _FIELD.TYPE_STRING:
            return random.choice(_TEXTS) if random.random() < 0.98 else "x" * (5 << 20)
        if field.type == _FIELD.TYPE_BYTES:
            return random.randbytes(random.choice((0, 1, 16, 31, 32, 32, 33, 1000, 70_000)))
        if field.type == _FIELD.TYPE_ENUM:
            return random.choice([value.number for value in field.enum_type.values])
        bits = 64 if field.cpp_type in (_FIELD.CPPTYPE_INT64, _FIELD.CPPTYPE_UINT64) else 32
        if field.cpp_type in (_FIELD.CPPTYPE_UINT32, _FIELD.CPPTYPE_UINT64):
            return random.choice((0, 1, 2, 7, 16, 17, 255, random.randrange(50_000), 2**bits - 1))
        ends = (2 ** (bits - 1) - 1, -(2 ** (bits - 1)))
        return random.choice((0, 1, 1, 2, 3, 8, 16, 17, -1, 128, random.randrange(50_000), *ends))


class Json:
    """Makes JSON texts by the schemas of OpenAPI; not all are JSON."""

    def __init__(self, random: Random, schemas: Mapping[str, Any], hints: Hints) -> None:
        self._random, self._schemas, self._hints = random, schemas, hints

    def text(self, schema: Mapping[str, Any]) -> bytes:
        """A body; one of four is damaged."""
        raw = self._written(self.value(schema)).encode("utf-8", "surrogatepass")
        return self.damaged(raw) if self._random.random() < 0.25 else raw

    def value(self, schema: Any, name: str = "", depth: int = 0) -> Any:
        """A value, mostly of the schema."""
        random = self._random
        if name in self._hints and random.random() < 0.6:
            return random.choice(self._hints[name])
        if random.random() < 0.06 or depth > 8 or not isinstance(schema, Mapping):
            return self.anything(depth)
        if "$ref" in schema:
            return self.value(self._schemas[schema["$ref"].rpartition("/")[2]], name, depth)
        if options := schema.get("anyOf") or schema.get("oneOf"):
            return self.value(random.choice(options), name, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return random.choice(schema["enum"])
        match schema.get("type"):
            case "object":
                return self._object(schema, depth)
            case "array":
                count = random.choice((0, 1, 1, 2, 3, 70, 3000 if depth < 3 else 3))
                return [self.value(schema.get("items"), name, depth + 1) for _ in range(count)]
            case "integer":
                return random.choice((0, 1, 1, 2, 8, 16, 17, -1, 2**31, 2**64, 10**400, 1.5, True))
            case "number":
                return random.choice((0, 0.0, 1, 0.5, 2, -1, 1e308, -1e308, 100, 1e-300, 10**30))
            case "boolean":
                return random.choice((True, False, 0, "true"))
            case "string":
                return random.choice((*_TEXTS, "\ud800", "a\udc00b", "x" * 200_000))
            case "null":
                return None
        return self.anything(depth)

    def anything(self, depth: int = 0) -> Any:
        random = self._random
        simple = (None, True, 0, -1, 1.5, 10**50, "", "x", "\udfff", [], {}, [[]], {"": None}, [None] * 100)
        if depth < 6 and random.random() < 0.3:
            return {random.choice(("a", "type", "\ud800", "x" * 600)): self.anything(depth + 1)}
        return random.choice(simple)

    def damaged(self, raw: bytes) -> bytes:
        random, data = self._random, bytearray(raw)
        match random.randrange(7):
            case 0:
                return raw[: random.randrange(len(raw) + 1)]
            case 1:
                data[random.randrange(len(data))] = random.randrange(256)
                return bytes(data)
            case 2:
                return b"[" * random.choice((50, 300, 100_000))
            case 3:
                return b'{"user":' * random.choice((50, 300, 50_000)) + b"1" + b"}" * random.choice((0, 50, 300))
            case 4:
                return raw.replace(b":", b': NaN, "x":', 1)
            case 5:
                return b"\xef\xbb\xbf" + raw
            case _:
                return random.randbytes(random.choice((0, 1, 100, 5000)))

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        random, made = self._random, {}
        required, share = schema.get("required", ()), random.choice((0.05, 0.2, 0.6))
        for name, part in schema.get("properties", {}).items():
            if random.random() < (0.95 if name in required else share):
                made[name] = self.value(part, name, depth + 1)
        if random.random() < 0.08:
            made[random.choice(("unknown", "", "\ud800", "__class__", "x" * 3000))] = self.anything(depth)
        return made

    def _written(self, value: Any) -> str:
        """JSON, at times with a key twice."""
        if isinstance(value, dict):
            pairs = [f"{json.dumps(key)}: {self._written(part)}" for key, part in value.items()]
            if pairs and self._random.random() < 0.1:
                pairs.append(self._random.choice(pairs))
            return "{" + ", ".join(pairs) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(self._written, value)) + "]"
        return json.dumps(value, ensure_ascii=self._random.random() < 0.5)
