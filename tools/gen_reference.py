"""Generates docs/reference: the gRPC contract from the .proto files, the HTTP API from its OpenAPI schema.

`python tools/gen_reference.py` writes it; `--check` compares with what is checked in and exits 1 on drift.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import textwrap
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
REFERENCE = ROOT / "docs" / "reference"
WRITTEN = "<!-- written by tools/gen_reference.py -->\n"
# Of the numbers of fields in descriptor.proto, by which comments are found.
MESSAGE, ENUM, SERVICE = 4, 5, 6
FIELD, NESTED, NESTED_ENUM = 2, 3, 4

Place = tuple[int, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on drift")
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text]
    if parser.parse_args().check:
        for path in stale:
            print(f"stale: {path.relative_to(ROOT)}; run python tools/gen_reference.py")
        return 1 if stale else 0
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return 0


def pages() -> dict[Path, str]:
    """Every page of the reference, by its path."""
    return {REFERENCE / "grpc.md": grpc_page(), REFERENCE / "http.md": http_page()}


# -- gRPC ----------------------------------------------------------------------------------------------


def grpc_page() -> str:
    """Services first, then the messages and enumerations of each file."""
    files = _files()
    parts = [
        "# gRPC reference\n",
        WRITTEN,
        "From the comments of [proto/qaq/v1](../../proto/qaq/v1). How calls behave, what statuses mean and which\n"
        "limits hold: [protocol](../protocol.md). The router serves `Inference`; servers call the others.\n",
    ]
    for file in files:
        parts += [text for service in _services(file) for text in service]
    for file in files:
        if file.message_type or file.enum_type:
            parts.append(f"## Messages of {Path(file.name).name}\n")
        parts += [text for i, each in enumerate(file.message_type) for text in _message(file, each, (MESSAGE, i))]
        parts += [_enum(file, each, (ENUM, i), "") for i, each in enumerate(file.enum_type)]
    return "\n".join(parts)


def _files() -> list[FileDescriptorProto]:
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        options = [f"--proto_path={PROTO}", f"--proto_path={well_known}", "--include_source_info"]
        if status := protoc.main(["protoc", *options, f"--descriptor_set_out={out}", *sources]):
            raise SystemExit(status)
        return sorted(FileDescriptorSet.FromString(out.read_bytes()).file, key=lambda file: not file.service)


def _services(file: FileDescriptorProto) -> Iterator[list[str]]:
    for i, service in enumerate(file.service):
        rows = []
        for j, method in enumerate(service.method):
            stream = {True: "stream ", False: ""}
            asks = f"{stream[method.client_streaming]}{_link(method.input_type)}"
            answers = f"{stream[method.server_streaming]}{_link(method.output_type)}"
            rows.append(f"| `{method.name}` | {asks} | {answers} | {_comment(file, (SERVICE, i, 2, j))} |")
        head = ["| RPC | request | reply | |", "|---|---|---|---|"]
        about = _comment(file, (SERVICE, i))
        yield [f"## {service.name}\n", *([f"{_wrapped(about)}\n"] if about else []), "\n".join([*head, *rows]) + "\n"]


def _message(file: FileDescriptorProto, message: DescriptorProto, place: Place, outer: str = "") -> Iterator[str]:
    if message.options.map_entry:
        return
    name = f"{outer}{message.name}"
    yield f"### {name}\n"
    if about := _comment(file, place):
        yield f"{_wrapped(about)}\n"
    rows = [
        f"| `{field.name}` | {_type(message, field)} | {field.number} | {_comment(file, (*place, FIELD, i))} |"
        for i, field in enumerate(message.field)
    ]
    if rows:
        yield "\n".join(["| field | type | number | |", "|---|---|---|---|", *rows]) + "\n"
    for i, nested in enumerate(message.nested_type):
        yield from _message(file, nested, (*place, NESTED, i), f"{name}.")
    for i, enum in enumerate(message.enum_type):
        yield _enum(file, enum, (*place, NESTED_ENUM, i), f"{name}.")


def _enum(file: FileDescriptorProto, enum: EnumDescriptorProto, place: Place, outer: str) -> str:
    rows = [
        f"| `{value.name}` | {value.number} | {_comment(file, (*place, FIELD, i))} |"
        for i, value in enumerate(enum.value)
    ]
    about = _comment(file, place)
    table = "\n".join(["| value | number | |", "|---|---|---|", *rows])
    return "\n".join([f"### {outer}{enum.name}\n", *([f"{_wrapped(about)}\n"] if about else []), table]) + "\n"


def _type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    if (entry := entries.get(field.type_name.rpartition(".")[2])) is not None:
        key, value = (_type(entry, part) for part in entry.field)
        return f"map of {key} to {value}"
    named = field.type in (FieldDescriptorProto.TYPE_MESSAGE, FieldDescriptorProto.TYPE_ENUM)
    name = _link(field.type_name) if named else FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of {message.oneof_decl[field.oneof_index].name}"
    return name


def _link(name: str) -> str:
    bare = name.removeprefix(".qaq.v1.")
    return f"[{bare}](#{_anchor(bare)})"


def _anchor(name: str) -> str:
    """As GitHub and the site make it of a heading."""
    return re.sub(r"[^\w-]", "", name.lower())


def _comment(file: FileDescriptorProto, place: Place) -> str:
    for location in file.source_code_info.location:
        if tuple(location.path) == place:
            text = location.leading_comments or location.trailing_comments
            return _cell(text)
    return ""


def _cell(text: str) -> str:
    """Text in a table: one line, nothing that is markup."""
    return re.sub(r"([|<>*\[\]])", r"\\\1", " ".join(text.split()))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


# -- HTTP ----------------------------------------------------------------------------------------------


def http_page() -> str:
    """Every route with its body's fields."""
    schema = openapi()
    parts = [
        "# HTTP reference\n",
        WRITTEN,
        "From the OpenAPI schema that the gateway serves at `/openapi.json`. What each field does, what is refused\n"
        "and how errors look: [gateway](../gateway.md).\n",
        "## Routes\n",
    ]
    rows = ["| route | body | |", "|---|---|---|"]
    for path, operations in schema["paths"].items():
        for verb, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            about = _cell((operation.get("description") or operation.get("summary") or "").partition("\n")[0])
            rows.append(f"| `{verb.upper()} {path}` | {_json_type(body) if body else ''} | {about} |")
    parts.append("\n".join(rows) + "\n")
    for name, found in sorted(schema.get("components", {}).get("schemas", {}).items()):
        if not found.get("properties"):
            continue
        parts.append(f"## {name}\n")
        if about := _cell((found.get("description") or "").partition("\n\n")[0]):
            parts.append(f"{_wrapped(about)}\n")
        required = set(found.get("required", ()))
        fields = [
            f"| `{field}` | {_json_type(of)}{', required' if field in required else ''} | "
            f"{_cell(of.get('description', ''))} |"
            for field, of in found["properties"].items()
        ]
        parts.append("\n".join(["| field | type | |", "|---|---|---|", *fields]) + "\n")
    return "\n".join(parts)


def openapi() -> dict[str, Any]:
    """The schema of the gateway's application, which needs no router for that."""
    from services.common.routers import Routers, named
    from services.common.settings import GatewaySettings
    from services.gateway.app import make_app

    settings = GatewaySettings.model_validate({"redis_url": "redis://127.0.0.1"})
    app = make_app(Routers(named("127.0.0.1:1"), lambda address: None), settings)  # type: ignore[arg-type]
    return app.openapi()


def _json_type(schema: dict[str, Any]) -> str:
    """A schema in words, such as "integer from 1 to 16 or null"."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{_anchor(name)})"
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_json_type(choice) for choice in choices))
    if values := schema.get("enum"):
        return " or ".join(f"`{value}`" for value in values)
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "any JSON")
    if kind == "array":
        return f"array of {_json_type(schema.get('items', {}))}"
    limits = [
        f"{word} {schema[key]:g}"
        for key, word in (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"))
        if key in schema
    ]
    return " ".join([kind, *limits])


if __name__ == "__main__":
    raise SystemExit(main())
