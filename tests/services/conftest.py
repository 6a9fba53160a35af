"""What the servers of these tests read of a model: once, and not at every start; and logs as each test expects them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from qaq_core.models import LoadedModel, load_tokenizer
from services.router import prompts
from services.worker import constraints

KEPT = 4


@pytest.fixture(scope="session", autouse=True)
def _vocabularies() -> Iterator[None]:
    """Starting a router or a worker is mostly reading its vocabulary, and hundreds of tests start one."""
    read = constraints._tokenizer_info

    @lru_cache(KEPT)
    def kept(xgrammar: Any, tokenizer: Any, eos: tuple[int, ...], vocabulary: int, special_tokens: bool) -> Any:
        loaded: Any = SimpleNamespace(tokenizer=tokenizer, eos_token_ids=eos)
        return read(xgrammar, loaded, vocabulary, special_tokens)

    def info(xgrammar: Any, loaded: LoadedModel, vocabulary: int, special_tokens: bool) -> Any:
        return kept(xgrammar, loaded.tokenizer, loaded.eos_token_ids, vocabulary, special_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "load_tokenizer", lru_cache(KEPT)(load_tokenizer))
        patch.setattr(constraints, "_tokenizer_info", info)
        yield


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """A command that runs in this process configures logs, on a stderr that is closed after it."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
