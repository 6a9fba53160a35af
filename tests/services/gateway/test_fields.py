"""The table of fields in docs/gateway.md says what the gateway does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chats
from pydantic import BaseModel

from services.gateway import schema

ROOT = Path(__file__).parents[3]
SUPPORTED, NO_EFFECT, REFUSED = "supported", "no effect", "refused"
BODIES = {"completions": schema.CompletionRequest, "chat": schema.ChatRequest}


def documented(endpoint: str) -> dict[str, str]:
    """What the table says of each field."""
    page = (ROOT / "docs" / "gateway.md").read_text()
    section = page[page.index("## Fields") : page.index("### Messages")]
    column = 1 + list(BODIES).index(endpoint)
    found: dict[str, str] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            for name in re.findall(r"`(\w+)`", cells[0]):
                assert name not in found
                found[name] = cells[column]
    return found


def read() -> set[str]:
    """The fields that the gateway's code looks at; other paths have bodies of their own."""
    files = (ROOT / "services" / "gateway").glob("*.py")
    sources = [path.read_text() for path in files if path.stem not in ("texts", "sessions", "inspection")]
    return {name for source in sources for name in re.findall(r"\b(?:body|self)\.(\w+)", source)}


@pytest.mark.parametrize(("endpoint", "body"), BODIES.items())
def test_the_table_is_the_schema(endpoint: str, body: type[BaseModel]) -> None:
    table = documented(endpoint)
    assert set(table.values()) == {SUPPORTED, NO_EFFECT, REFUSED}
    accepted = {name for name, state in table.items() if state != REFUSED}
    assert accepted == set(body.model_fields)
    supported = {name for name, state in table.items() if state == SUPPORTED}
    assert supported - read() == set()
    elsewhere = {name for other in BODIES for name, state in documented(other).items() if state == SUPPORTED}
    assert (accepted - elsewhere) & read() == set()


@pytest.mark.parametrize(
    ("endpoint", "params"),
    [
        ("completions", of_completions.CompletionCreateParamsStreaming),
        ("chat", of_chats.CompletionCreateParamsStreaming),
    ],
)
def test_the_table_has_all_of_openais_fields(endpoint: str, params: type) -> None:
    ours = set(documented(endpoint))
    assert len(params.__annotations__) > 15
    assert set(params.__annotations__) - ours == set()
