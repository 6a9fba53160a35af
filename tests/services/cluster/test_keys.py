"""The keys that a stack makes for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cluster import roles
from services.cluster.access import Access
from services.cluster.keys import StackKeys
from services.cluster.stack import LocalStack, _who_may_call
from services.cluster.state import Owner, StackError, StackSettings
from services.common.keys import authorization
from services.common.settings import RouterSettings
from services.common.tenants import add_key
from services.router.callers import Callers


def test_a_client_and_an_operator_get_keys_that_stay(tmp_path: Path) -> None:
    keys = StackKeys(tmp_path / "state")
    keys.make()
    client, operator = keys.key("client"), keys.key("operator")
    added = add_key(keys.tenants, "acme")
    for path in (keys.tenants, keys.path("client"), keys.path("operator")):
        assert path.stat().st_mode & 0o777 == 0o600
    assert keys.directory.stat().st_mode & 0o777 == 0o700
    keys.make()
    assert (keys.key("client"), keys.key("operator")) == (client, operator)
    known = Callers(keys.tenants)
    assert (known.known(authorization(client)).tenant, known.known(authorization(client)).operator) == ("local", False)
    assert (known.known(authorization(operator)).tenant, known.known(authorization(operator)).operator) == (
        "operator",
        True,
    )
    assert known.known(authorization(added)).tenant == "acme"


def test_a_key_that_the_file_does_not_have_is_replaced(tmp_path: Path) -> None:
    keys = StackKeys(tmp_path)
    keys.make()
    client, operator = keys.key("client"), keys.key("operator")
    add_key(keys.tenants, "local", replace=True)
    keys.path("operator").unlink()
    keys.make()
    assert keys.key("client") != client
    assert keys.key("operator") != operator
    known = Callers(keys.tenants)
    assert known.known(authorization(keys.key("client"))).tenant == "local"
    assert known.known(authorization(keys.key("operator"))).operator


@pytest.mark.parametrize("kept", [True, False])
def test_a_stack_keeps_its_keys_or_takes_them_away(tmp_path: Path, kept: bool) -> None:
    owner = Owner(pid=1, born=0.0, directory=tmp_path / "stack")  # whose directory goes with it
    keys = LocalStack(
        StackSettings(model="m"), owner, lambda *report: None, tmp_path / "keys" if kept else None
    )._keys()
    assert keys is not None
    assert keys.path("client").exists()
    assert (owner.directory in keys.directory.parents) is not kept


def test_a_tenants_file_of_ones_own_needs_a_key_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_TENANTS_FILE", str(tmp_path / "own.json"))
    owner = Owner(pid=1, born=0.0, directory=tmp_path)
    local = LocalStack(StackSettings(model="m"), owner, lambda *report: None, tmp_path)
    with pytest.raises(StackError, match="set QAQ_API_KEY to a key of it"):
        local._keys()
    monkeypatch.setenv("QAQ_API_KEY", "k")
    assert local._keys() is None
    assert list(tmp_path.iterdir()) == []


def test_the_router_is_told_who_may_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stack's keys, without any, and with a file that the environment names."""
    started: list[RouterSettings] = []

    own = tmp_path / "own.json"
    monkeypatch.setenv("QAQ_TENANTS_FILE", str(own))
    asking, open_ = StackSettings(model="m"), StackSettings(model="m", keys=False)
    for settings, keys in ((asking, StackKeys(tmp_path)), (asking, None), (open_, None)):
        access = Access(redis={"url": "redis://127.0.0.1", "description": "d", "pid": None})
        started.append(roles.plan(settings, access, _who_may_call(settings, keys)).router)
    assert [each.tenants_file for each in started] == [tmp_path / "tenants.json", own, None]
