"""vLLM's own tests of its server of OpenAI's API, against the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from .peers import checkout, run
from .stack import Stack

FILES = (
    *(f"openai/chat_completion/test_{name}.py" for name in ("chat", "chat_completion", "chat_echo")),
    *(f"openai/chat_completion/test_{name}.py" for name in ("chat_logit_bias_validation", "root_path")),
    *(f"openai/chat_completion/test_{name}.py" for name in ("enable_force_include_usage", "extra_content_fields")),
    "openai/chat_completion/test_completion_with_function_calling.py",
    *(f"openai/completion/test_{name}.py" for name in ("completion", "prompt_validation", "token_in_token_out")),
    *(f"openai/test_{name}.py" for name in ("chunked_prompt", "return_token_ids", "return_tokens_as_ids")),
    "openai/models/test_models.py",
    "serve/tokenize/test_tokenization.py",
    *(f"serve/instrumentator/test_{name}.py" for name in ("basic", "metrics")),
)
DIFFERENCES: dict[str, str] = {}


@pytest.mark.timeout(3600)
def test_server(stack: Stack, tokenizer_dir: Path, tmp_path: Path) -> None:
    source = checkout("QAQ_VLLM", "vLLM")
    results = run(
        "qaq_vllm",
        [f"tests/entrypoints/{name}" for name in FILES],
        source,
        tmp_path / "report.xml",
        f"--confcutdir={source / 'tests/entrypoints'}",
        QAQ_GATEWAY=stack.url,
        QAQ_MODEL=stack.model,
        QAQ_TOKENIZER=str(tokenizer_dir),
    )
    print(results)
    assert not results.broken
    assert not results.unexplained(DIFFERENCES)
    assert len(results.passed) > 40
