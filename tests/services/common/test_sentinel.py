"""URLs of sentinels, and what is asked of a server before it is used."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError

from qaq_core.base.errors import ConfigError
from services.common.errors import Code, to_status
from services.common.identity import is_loopback
from services.common.redis import check, connect, redacted
from services.common.redis_url import hosts_of
from services.common.secret import SecretMissingError, check_secret
from services.common.sentinel import SentinelUrl
from services.common.server_identity import identity
from services.common.settings import OriginalsSettings, RouterSettings

URL = "redis+sentinel://u:p%40@10.0.0.1:1,[::1]/my%2Fmaster/3?sentinel_username=s&sentinel_password=t"


def test_a_url_says_who_the_sentinels_are_and_what_they_are_asked_for() -> None:
    parsed = SentinelUrl.parse(URL)
    assert parsed is not None
    assert parsed.sentinels == (("10.0.0.1", 1), ("::1", 26379))
    assert (parsed.service, parsed.database, parsed.secure) == ("my/master", 3, False)
    assert parsed.login == {"username": "u", "password": "p@"}
    assert parsed.sentinels_login == {"username": "s", "password": "t"}
    assert hosts_of(URL) == ["10.0.0.1", "::1"]
    assert SentinelUrl.parse("redis://h:1/0") is None
    assert "p%40" not in redacted(URL)


def test_sentinels_of_other_machines_need_tls_and_a_secret() -> None:
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1 without rediss"):
        identity(RouterSettings(model="m", redis_url=SecretStr(URL)))
    secured = OriginalsSettings(redis_url=SecretStr("rediss+sentinel://127.0.0.1,10.0.0.1/m"))
    with pytest.raises(SecretMissingError, match=r"10\.0\.0\.1"):
        check_secret(secured)
    assert is_loopback("::1")


async def test_a_primary_of_another_machine_is_not_used_in_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect("redis+sentinel://127.0.0.1:1/m", retries=0)
    pool: Any = client.connection_pool

    async def elsewhere(service: str) -> tuple[str, int]:
        return "10.0.0.9", 6379

    monkeypatch.setattr(pool.sentinel_manager, "discover_master", elsewhere)
    with pytest.raises(RedisConnectionError, match="another machine"):
        await client.ping()
    await client.aclose()


async def test_a_cluster_is_refused() -> None:
    with pytest.raises(ValidationError, match="Redis Cluster cannot be used"):
        RouterSettings(model="m", redis_url=SecretStr("redis+cluster://h:6379"))

    class OfCluster:
        async def ping(self) -> bool:
            return True

        async def info(self, section: str) -> dict[str, int]:
            return {"cluster_enabled": 1}

    with pytest.raises(ConfigError, match="is a Redis Cluster"):
        await check(OfCluster(), "redis://h:6379/0")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        ReadOnlyError("READONLY You can't write against a read only replica."),
        ResponseError("Error running script: @user_script:2: -READONLY You can't write against a read only replica."),
        ResponseError("NOREPLICAS Not enough good replicas to write."),
    ],
)
def test_a_server_that_is_no_primary_is_for_a_while(error: Exception) -> None:
    status = to_status(error)
    assert status is not None
    assert status.code is Code.UNAVAILABLE
    assert status.retry_after_ms
