"""The tenants file, and keys that are added to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qaq_core.base.errors import ConfigError
from services.common import tenants
from services.common.tenants import Quotas, Tenant, add_key, hashed, load


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "private" / "tenants.json"


def test_a_key_is_made_and_only_its_hash_is_kept(path: Path) -> None:
    first, second = add_key(path, "acme"), add_key(path, "acme", quotas=Quotas(requests_per_minute=5))
    operator = add_key(path, "root", role="operator")
    assert len({first, second, operator}) == 3
    assert all(key.startswith("qaq_") and len(key) > 40 for key in (first, second, operator))
    acme, root = load(path).tenants
    assert (acme.name, acme.role, acme.keys) == ("acme", "client", (hashed(first), hashed(second)))
    assert acme.quotas == Quotas(requests_per_minute=5)
    assert (root.role, root.keys) == ("operator", (hashed(operator),))
    written = path.read_text()
    assert not any(key in written for key in (first, second, operator))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {each.name for each in path.parent.iterdir()} <= {"tenants.json", "tenants.json.lock"}


def test_a_key_may_replace_the_others_and_a_quota_another(path: Path) -> None:
    add_key(path, "acme", quotas=Quotas(requests_per_minute=5, open_sessions=2))
    path.chmod(0o640)
    last = add_key(path, "acme", quotas=Quotas(requests_per_minute=6), replace=True)
    (acme,) = load(path).tenants
    assert acme.keys == (hashed(last),)
    assert acme.quotas == Quotas(requests_per_minute=6, open_sessions=2)
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_added(path: Path) -> None:
    add_key(path, "acme")
    before = path.read_text()
    with pytest.raises(ConfigError, match="has the role client"):
        add_key(path, "acme", role="operator")
    for name in ("", "a b", "a:b", "x" * 129, "a\n"):
        with pytest.raises(ConfigError, match=r"^name: "):
            add_key(path, name)
    assert path.read_text() == before
    for _ in range(tenants.MAX_KEYS - 1):
        add_key(path, "acme")
    with pytest.raises(ConfigError, match=r"^keys: "):
        add_key(path, "acme")


KEY = "qaq_the-key-itself-in-place-of-its-hash"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "the file: Invalid JSON"),
        ({"tenants": [{"name": "a", "keys": [KEY]}]}, "tenants.0.keys.0: "),
        ({"tenants": [{"name": "a", "key": KEY}]}, "tenants.0.key: Extra inputs"),
        ({"tenants": [{"name": "a"}, {"name": "a"}]}, "two tenants have the same name"),
        ({"tenants": [{"name": n, "keys": ["0" * 64]} for n in "ab"]}, "a key occurs twice"),
        ({"tenants": [{"name": "a", "quotas": {"requests_per_minute": 0}}]}, "tenants.0.quotas.requests_per_minute"),
        ({"tenants": [{"name": "a", "role": "root"}]}, "tenants.0.role"),
        ("x" * (tenants.MAX_FILE_BYTES + 1), "is larger than"),
    ],
)
def test_a_file_that_is_not_valid_is_told_without_what_is_in_it(tmp_path: Path, content: Any, told: str) -> None:
    path = tmp_path / "tenants.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
    assert KEY not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_a_file_that_everybody_may_write_is_refused(path: Path) -> None:
    add_key(path, "acme")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match=r"everybody may write .*; run chmod o-w"):
        load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .*`qaq key`"):
        load(tmp_path / "none.json")


def test_a_tenant_is_not_shown_with_its_keys_in_an_error() -> None:
    with pytest.raises(ValueError, match="keys") as caught:
        Tenant.model_validate({"name": "a", "keys": [KEY]})
    assert KEY not in str(caught.value)
