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


def read_in(*folders: str) -> set[str]:
    """The variables that the code of some folders reads."""
    named = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            if path != Path(__file__):
                named |= set(re.findall(r"environ(?:\.\w+\(|\[)\"(QAQ_\w+)|envvar=\"(QAQ_\w+)", path.read_text()))
    return {name for pair in named for name in pair if name}


def test_every_variable_that_is_read_is_known() -> None:
    own = read_in("qaq_core", "qaq_eval", "services", "deploy")
    assert own >= {"QAQ_KERNEL", "QAQ_DEVICE"}
    assert own <= environment.known()
    assert read_in("tests") <= environment.known() | environment.OF_TESTS


@pytest.mark.parametrize(
    ("names", "folders"),
    [(environment.OTHERS, ("qaq_core", "services")), (environment.OF_TESTS, ("tests",))],
    ids=["others", "of tests"],
)
def test_every_variable_that_is_known_is_read(names: frozenset[str], folders: tuple[str, ...]) -> None:
    """By the code that it is said to be for: whoever sets another one is to be warned."""
    places = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    own = {Path(__file__), Path(environment.__file__)}
    text = "\n".join(path.read_text() for path in places if path not in own)
    assert {name for name in names if f'"{name}"' not in text} == set()


def test_nobody_is_warned_of_what_make_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    made = set(re.findall(r"\bQAQ_\w+(?==)", (ROOT / "Makefile").read_text()))
    assert made >= {"QAQ_CLIENTS", "QAQ_FAULTS", "QAQ_LIBRARY"}
    for name in made:
        monkeypatch.setenv(name, "")
    assert environment.unknown() == {}


def test_a_variable_of_tests_is_not_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_FAULT", "1")
    assert environment.unknown() == {"QAQ_FAULT": None}


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
