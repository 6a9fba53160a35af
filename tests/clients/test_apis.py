"""Libraries that speak OpenAI's API, against the gateway."""

from __future__ import annotations

import json

from .conftest import Run
from .stack import Stack


def test_litellm(run: Run, stack: Stack) -> None:
    got = json.loads(run("litellm_client.py", stack.url, stack.model).splitlines()[-1])
    assert "Paris" in got["answer"]
    assert got["streamed"] == got["answer"]
    assert got["usage"][1] == got["streamed_usage"] <= 20
    assert json.loads(got["structured"]) in ({"city": "Paris"}, {"city": "Rome"})
    assert "Paris" in got["completion"]


def test_langchain(run: Run, stack: Stack) -> None:
    got = json.loads(run("langchain_client.py", stack.url, stack.model).splitlines()[-1])
    assert "Paris" in got["answer"]
    assert "".join(got["streamed"]) == got["answer"]
    assert len([part for part in got["streamed"] if part]) > 3
    assert got["structured"] in ("Paris", "Rome")
