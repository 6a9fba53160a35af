"""What a stack is started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cluster import roles
from services.cluster.access import Access
from services.cluster.stack import chosen_secret
from services.cluster.state import StackError, StackSettings


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QAQ_SECRET", "QAQ_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_each_stack_has_a_secret_of_its_own() -> None:
    first, second = chosen_secret(), chosen_secret()
    assert first != second
    assert len(first) == 64


def test_the_secret_of_the_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    path.write_text("a secret of a deployment\n")
    monkeypatch.setenv("QAQ_SECRET_FILE", str(path))
    assert chosen_secret() == "a secret of a deployment"
    redis = {"url": "redis://127.0.0.1:1/0", "description": "d", "pid": None}
    access, settings = Access(redis=redis, secret=chosen_secret()), StackSettings(model="m")
    worker, originals = roles.worker(settings, access.settings("worker")), roles.originals(access.settings("originals"))
    assert {each.secret.get_secret_value() for each in (worker, originals)} == {"a secret of a deployment"}
    assert "secret" not in access.settings("router")


def test_one_that_is_too_short_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_SECRET", "short")
    with pytest.raises(StackError, match=r"^QAQ_SECRET or QAQ_SECRET_FILE: .*fewer than 16") as caught:
        chosen_secret()
    assert "short" not in str(caught.value)
