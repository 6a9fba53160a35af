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
    "serve/instrumentator/test_basic.py",
)
# Patterns of tests, and what vLLM does there that this gateway leaves.
DIFFERENCES = {
    "test_chat::test_more_than_one_prompt_logprobs_chat[[]*": "its model's most likely token is that of the prompt",
    "test_chat::test_single_chat_session[[]*": "its tokenizer's number of tokens, and no details of usage",
    "test_chat::test_chat_streaming[[]*": "a stream's last chunk has text and the finish reason",
    "test_chat::test_chat_completion_stream_options[[]*": "a stream's last chunk has text and the finish reason",
    "test_chat::test_response_format_json_object": "its model ends the object within the limit",
    "test_chat::test_complex_message_content": "its model's text",
    "test_chat_completion::test_per_request_metrics_*": "usage has times if its process is started so",
    "test_enable_force_include_usage::*": "all streams have their usage if its process is started so",
    "test_extra_content_fields::*": "a model that translates, and images",
    "test_completion::test_completion_streaming[[]*": "its model's text is longer",
    "test_completion::test_parallel_*": "its model's text is longer: here two of three answers end at once",
    "test_token_in_token_out::*": "token ids in place of texts",
    "test_return_token_ids::test_basic_completion_with_emoji[[]None]": "choices have the token ids of their prompt",
    "test_return_tokens_as_ids::*": "tokens of log-probabilities are ids if its process is started so",
    "test_models::test_check_models": "its model is the one of the hub",
    "test_basic::test_show_version": "its version",
}


@pytest.mark.timeout(3600)
def test_server(stack: Stack, tokenizer_dir: Path, tmp_path: Path) -> None:
    source = checkout("QAQ_VLLM", "vLLM")
    results = run(
        "qaq_vllm",
        [f"tests/entrypoints/{name}" for name in FILES],
        source,
        tmp_path / "report.xml",
        f"--confcutdir={source / 'tests/entrypoints'}",
        STACK_URL=stack.url,
        QAQ_MODEL=stack.model,
        STACK_TOKENIZER=str(tokenizer_dir),
    )
    print(results)
    assert not results.broken
    assert not results.unexplained(DIFFERENCES)
    assert len(results.passed) > 40
