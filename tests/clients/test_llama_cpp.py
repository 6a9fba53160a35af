"""llama.cpp's own tests of its server, against the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from .peers import checkout, run
from .stack import Stack

# Others are about what OpenAI's API has not: slots, LoRA, infill, embeddings, reranking, files, a router of models.
FILES = ("basic", "chat_completion", "completion", "tokenize", "ignore_eos", "security", "tool_call")
# Patterns of tests, and what llama.cpp does there that this gateway leaves.
DIFFERENCES = {
    "test_basic::test_server_models": "its model has the name that its process was started with",
    "test_basic::test_server_model_aliases_and_tags": "its models have aliases and tags",
    "test_chat_completion::test_chat_completion_cached_tokens": "its tokenizer's number of tokens, and what it caches",
    "test_chat_completion::test_chat_completion_stream[[]*": "the first chunk has a null for its content",
    "test_chat_completion::test_logprobs_stream": "the first chunk has a null for its content",
    "test_chat_completion::test_chat_template*": "answers have the prompt in __verbose",
    "test_chat_completion::test_invalid_chat_completion_req[[]messages7]": "two messages of an assistant in a row",
    "test_chat_completion::test_context_size_exceeded*": "its process is started with a context of 512 tokens",
    "test_completion::test_completion_stream[[]*": "answers of its own API have more fields",
    "test_completion::test_completion_parallel_slots*": "/slots; its model has more to say",
    "test_completion::test_nocache_long_input_prompt": "its process is started with a context of 512 tokens",
    "test_completion::test_n_probs*": "log-probabilities of its own API have another form",
    "test_completion::test_completion_prompt_cache": "answers of its own API have more fields",
    "test_ignore_eos::*": "answers of its own API have the settings of the generation",
    "test_tool_call::test_completion_without_tool_call_fast[[]*STREAMED]": "the first chunk has a null for its content",
    "test_tokenize::test_tokenize_with_bos": "its model's prompts begin with a token of their own",
    "test_tokenize::test_tokenize_with_pieces": "tokens and their texts are one list",
    "test_security::test_incorrect_api_key*": "its process is started with a key; the stack of this test has none",
}


@pytest.mark.timeout(3600)
def test_server(stack: Stack, tmp_path: Path) -> None:
    tests = checkout("QAQ_LLAMA_CPP", "llama.cpp") / "tools/server/tests"
    files = [f"unit/test_{name}.py" for name in FILES]
    results = run("qaq_llama_cpp", files, tests, tmp_path / "report.xml", STACK_URL=stack.url)
    print(results)
    assert not results.broken
    assert not results.unexplained(DIFFERENCES)
    assert len(results.passed) > 40
