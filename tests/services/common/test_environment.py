from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qaq_core.base.errors import ConfigError
from qaq_core.kernels.choice import KERNELS
from services.common import environment

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _none_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("QAQ_"):
            monkeypatch.delenv(name)


def test_every_variable_that_is_read_is_known() -> None:
    named = set()
    for folder in ("qaq_core", "qaq_eval", "services", "tests", "deploy"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != Path(__file__):
                named |= set(re.findall(r"environ(?:\.\w+\(|\[)\"(QAQ_\w+)|envvar=\"(QAQ_\w+)", path.read_text()))
    names = {name for pair in named for name in pair if name}
    assert "QAQ_KERNEL" in names
    assert "QAQ_DEVICE" in names
    assert names <= environment.known()


def test_kernels_are_those_that_there_are() -> None:
    assert environment.CHOICES["QAQ_KERNEL"] == KERNELS


def test_unknown_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QAQ_TARGET_BIT", "QAQ_EVERYTHING_ELSE", "QAQ_PRESET", "qaq_dtype"):
        monkeypatch.setenv(name, "1")
    assert environment.unknown() == {"QAQ_TARGET_BIT": "QAQ_TARGET_BITS", "QAQ_EVERYTHING_ELSE": None}
    assert environment.told("QAQ_TARGET_BIT", "QAQ_TARGET_BITS").endswith("did you mean QAQ_TARGET_BITS?")


def test_wrong_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.wrong() == {}
    monkeypatch.setenv("QAQ_PAGE_TOKENS", "many")
    monkeypatch.setenv("QAQ_PAGE_TTL_S", "1")
    assert environment.wrong().keys() == {"QAQ_PAGE_TOKENS", "QAQ_PAGE_TTL_S"}
    environment.check()
    monkeypatch.setenv("QAQ_KERNEL", "quick")
    with pytest.raises(ConfigError, match="QAQ_KERNEL must be one of auto"):
        environment.check()
