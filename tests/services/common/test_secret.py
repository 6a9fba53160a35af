"""The deployment's secret: where it comes from, and where it may be left out."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from services.common import log
from services.common.secret import SecretMissingError, check_secret, derive_key
from services.common.settings import OriginalsSettings, PageSettings, RouterSettings, WorkerSettings

SECRET = "a secret of a deployment"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QAQ_SECRET", "QAQ_SECRET_FILE", "QAQ_HOST", "QAQ_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(log, "_seen", OrderedDict())


def test_it_is_read_from_the_environment_or_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    for name, given in (("QAQ_SECRET", SECRET), ("QAQ_SECRET_FILE", str(path))):
        with monkeypatch.context() as patch:
            patch.setenv(name, given)
            for settings in (WorkerSettings(model="m"), OriginalsSettings()):
                assert settings.secret.get_secret_value() == SECRET
                assert SECRET not in repr(settings)
    assert not hasattr(RouterSettings(model="m"), "secret"), "roles that need none have none"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"secret": "too short"}, "fewer than 16 characters"),
        ({"secret_file": "short"}, "fewer than 16 characters"),
        ({"secret_file": "empty"}, "fewer than 16 characters"),
        ({"secret_file": "good", "secret": SECRET}, "set one of them"),
        ({"secret_file": "none"}, "not point to a file"),
    ],
)
def test_what_is_no_secret_is_refused_and_not_told(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    for name, text in (("short", "too short"), ("empty", "\n"), ("good", SECRET)):
        (tmp_path / name).write_text(text)
    if "secret_file" in given:
        given = given | {"secret_file": tmp_path / given["secret_file"]}
    with pytest.raises(ValidationError, match=said) as caught:
        PageSettings.model_validate(given)
    assert "too short" not in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "::1"])
@pytest.mark.parametrize("redis", ["redis://127.0.0.1:6379/0", "rediss://:word@[::1]:1/0", "redis://localhost"])
def test_on_loopback_it_may_be_left_out_which_is_said_once(host: str, redis: str) -> None:
    settings = PageSettings.model_validate({"host": host, "redis_url": redis})
    with capture_logs() as logs:
        check_secret(settings)
        check_secret(settings)
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert "QAQ_SECRET is not set" in logs[0]["event"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"host": "0.0.0.0"}, "0.0.0.0"),
        ({"host": "::"}, "::"),
        ({"host": "10.0.0.7"}, "10.0.0.7"),
        ({"advertise_host": "worker-1"}, "worker-1"),
        ({"redis_url": "redis://:word@redis:6379/0"}, "redis"),
        ({"redis_url": "redis://10.1.1.1/0"}, "10.1.1.1"),
    ],
)
def test_elsewhere_it_is_required(given: dict[str, str], named: str) -> None:
    with pytest.raises(SecretMissingError, match=f"^{named} is not a loopback address: .*QAQ_SECRET") as caught:
        check_secret(PageSettings.model_validate(given))
    assert "word" not in str(caught.value)
    with capture_logs() as logs:
        check_secret(PageSettings.model_validate(given | {"secret": SECRET}))
    assert logs == []


def test_keys_differ_by_secret_and_purpose() -> None:
    keys = {derive_key(secret, purpose) for secret in ("", SECRET) for purpose in ("page ids", "page seals")}
    assert len(keys) == 4
    assert all(len(key) == 32 for key in keys)
