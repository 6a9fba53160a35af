"""llama.cpp's own tests of its server, against the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from .peers import checkout, run
from .stack import Stack

# Others are about what OpenAI's API has not: slots, LoRA, infill, embeddings, reranking, files, a router of models.
FILES = ("basic", "chat_completion", "completion", "tokenize", "ignore_eos", "security", "tool_call")
DIFFERENCES: dict[str, str] = {}


@pytest.mark.timeout(3600)
def test_server(stack: Stack, tmp_path: Path) -> None:
    tests = checkout("QAQ_LLAMA_CPP", "llama.cpp") / "tools/server/tests"
    files = [f"unit/test_{name}.py" for name in FILES]
    results = run("qaq_llama_cpp", files, tests, tmp_path / "report.xml", QAQ_GATEWAY=stack.url)
    print(results)
    assert not results.broken
    assert not results.unexplained(DIFFERENCES)
    assert len(results.passed) > 40
