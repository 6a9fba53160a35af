"""What tenants use of their quotas, counted in Redis for all routers.

Requests and tokens a minute are token buckets: a full one has a minute's worth and fills evenly. A call is admitted
while there is a request left and the tokens are not used up. Its own tokens are counted afterwards, in batches, and may
take the bucket below zero; later calls wait until it has filled again, so the mean holds. Each stream has a lease that
is refreshed while it runs: those of a router that died expire.

`qaq:quota:<tenant>` is a hash with both buckets, `…:streams` a sorted set of leases by the time they expire. Redis' own
clock is used. A tenant without quotas costs nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common import metrics
from services.common.errors import EXCEEDED, LIMITS, ResourceExhausted
from services.common.log import once
from services.common.tenants import Quotas
from services.router.callers import Caller

LEASE_S = 15
REFRESH_S = 2.0
"""How often a running stream's tokens are counted and its lease is refreshed."""
SETTLE_S = 1.0
"""How long the end of a stream waits for Redis. Then its lease expires by itself."""

Headers = tuple[tuple[str, str], ...]

log = structlog.get_logger()

_BUCKETS = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local function level(name, limit)
  local known = redis.call('HMGET', KEYS[1], name, name .. '_at')
  local left, at = tonumber(known[1] or ''), tonumber(known[2] or '')
  if not left or not at then return limit end
  return math.min(limit, left + math.max(0, now - at) * limit / 60)
end
local function save(name, limit, left)
  redis.call('HSET', KEYS[1], name, left, name .. '_at', string.format('%.6f', now))
  local full = math.ceil((limit - left) * 60 / limit) + 60
  if redis.call('TTL', KEYS[1]) < full then redis.call('EXPIRE', KEYS[1], full) end
end
"""
# Answers the quota that is exceeded, or '', the milliseconds until it will not be, and what is left of both buckets.
# Takes a request, if the last argument is 1.
# 'overdraw' lets each quota be exceeded by as much again.
_ADMIT = (
    _BUCKETS
    + """
local requests, tokens, streams = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local overdraw, lease = tonumber(ARGV[4]), ARGV[5]
local requests_left, tokens_left, refused, wait = 0, 0, '', 0
if streams > 0 and lease ~= '' then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
  if redis.call('ZCARD', KEYS[2]) >= streams * (1 + overdraw) then refused, wait = 'streams', 1 end
end
if tokens > 0 then
  tokens_left = level('tokens', tokens)
  local missing = 1 - overdraw * tokens - tokens_left
  if missing > 0 then refused, wait = 'tokens', missing * 60 / tokens end
end
if requests > 0 then
  requests_left = level('requests', requests)
  local missing = 1 - overdraw * requests - requests_left
  if missing > 0.000001 then
    refused, wait = 'requests', missing * 60 / requests
  elseif refused == '' and ARGV[7] == '1' then
    requests_left = requests_left - 1
    save('requests', requests, requests_left)
  end
end
if refused == '' and streams > 0 and lease ~= '' then
  redis.call('ZADD', KEYS[2], now + ARGV[6], lease)
  redis.call('EXPIRE', KEYS[2], ARGV[6])
end
return {refused, math.ceil(wait * 1000), math.floor(requests_left), math.floor(tokens_left)}
"""
)
# Counts tokens, and refreshes a lease or ends it.
_COUNT = (
    _BUCKETS
    + """
local limit, used = tonumber(ARGV[1]), tonumber(ARGV[2])
if limit > 0 and used > 0 then save('tokens', limit, level('tokens', limit) - used) end
if ARGV[3] == '' then return end
if tonumber(ARGV[4]) > 0 then
  redis.call('ZADD', KEYS[2], now + ARGV[4], ARGV[3])
  redis.call('EXPIRE', KEYS[2], ARGV[4])
else
  redis.call('ZREM', KEYS[2], ARGV[3])
end
"""
)


@dataclass
class Meter:
    """The tokens of one stream.

    Attributes:
        headers: what was left of the quotas when the stream was admitted.
        tokens: of prompt and answer, that Redis has not counted yet.
        ended: set when the stream has.
    """

    headers: Headers = ()
    tokens: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class TenantQuotas:
    """Admits calls and counts what they use. Methods that admit may raise a RedisError: nothing new begins then.

    What runs is never ended. Tokens that Redis does not take are counted later.
    """

    def __init__(self, redis: Redis) -> None:
        self._admit = redis.register_script(_ADMIT)
        self._count = redis.register_script(_COUNT)
        self._counting: set[asyncio.Task[None]] = set()

    async def request(self, caller: Caller) -> None:
        """Admits a call that generates nothing.

        Raises:
            ResourceExhausted: a quota is exceeded.
        """
        quotas = caller.quotas
        if quotas.requests_per_minute:
            await self._admitted(caller.tenant, Quotas(requests_per_minute=quotas.requests_per_minute), "", 0)

    async def look(self, caller: Caller) -> None:
        """Raises as `request` would, and takes nothing."""
        quotas = caller.quotas
        if quotas.requests_per_minute:
            with contextlib.suppress(RedisError):  # nothing begins here
                await self._admitted(
                    caller.tenant, Quotas(requests_per_minute=quotas.requests_per_minute), "", 0, take=0
                )

    @contextlib.asynccontextmanager
    async def stream(self, caller: Caller, *, rejoined: bool = False) -> AsyncIterator[Meter]:
        """Admits a generation, and counts what it uses while the context lasts.

        Args:
            rejoined: it was admitted before, so it may exceed each quota by as much again: the stream that it continues
                is not ended by its quotas.
        Raises:
            ResourceExhausted: a quota is exceeded.
        """
        tenant, quotas = caller.tenant, caller.quotas
        if not (quotas.requests_per_minute or quotas.tokens_per_minute or quotas.concurrent_streams):
            yield Meter()
            return
        lease = secrets.token_hex(8)
        meter = Meter(await self._admitted(tenant, quotas, lease, int(rejoined)))
        counting = asyncio.create_task(self._follow(caller, lease, meter), name=f"quota {tenant}")
        self._counting.add(counting)  # it ends by itself, also when this call is cancelled
        counting.add_done_callback(self._counting.discard)
        try:
            yield meter
        finally:
            meter.ended.set()
            # The client's next call may begin once this one has ended.
            await asyncio.wait([counting], timeout=SETTLE_S)

    async def _admitted(self, tenant: str, quotas: Quotas, lease: str, overdraw: int, take: int = 1) -> Headers:
        """What is left of the quotas."""
        requests, tokens, streams = quotas.requests_per_minute, quotas.tokens_per_minute, quotas.concurrent_streams
        args: list[str | int] = [requests or 0, tokens or 0, streams or 0, overdraw, lease, LEASE_S, take]
        try:
            raw, wait_ms, requests_left, tokens_left = await self._admit(keys=_keys(tenant), args=args)
        except RedisError as error:
            _failed(error)
            raise
        headers: Headers = ()
        for name, limit, left in (("requests", requests, requests_left), ("tokens", tokens, tokens_left)):
            if limit:
                headers += _headers(name, limit, left)
        exceeded = raw.decode()
        if not exceeded:
            return headers
        metrics.quota_refusals.labels(exceeded).inc()
        told = {
            "requests": f"the tenant has used its {requests} requests a minute",
            "tokens": f"the tenant has used its {tokens} tokens a minute",
            "streams": f"the tenant has {streams} streams running, the most it may have",
        }
        message = f"{told[exceeded]}; try again in {wait_ms / 1000:.1f} s"
        raise ResourceExhausted(message, retry_after_ms=wait_ms, reason=EXCEEDED, limits=headers)

    async def _follow(self, caller: Caller, lease: str, meter: Meter) -> None:
        """Counts a stream until it has ended, then once more."""
        over = False
        while not over:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(meter.ended.wait(), REFRESH_S)
            over = meter.ended.is_set()
            await self._use(caller, lease, 0 if over else LEASE_S, meter)

    async def _use(self, caller: Caller, lease: str, lease_s: int, meter: Meter) -> None:
        """Counts the meter's tokens, and keeps the lease for `lease_s` or ends it."""
        tokens, used = caller.quotas.tokens_per_minute or 0, meter.tokens
        lease = lease if caller.quotas.concurrent_streams else ""
        if not lease and not (tokens and used):
            return
        try:
            await self._count(keys=_keys(caller.tenant), args=[tokens, used, lease, lease_s])
            meter.tokens -= used
        except RedisError as error:
            _failed(error)


def _keys(tenant: str) -> list[str]:
    return [f"qaq:quota:{tenant}", f"qaq:quota:{tenant}:streams"]


def _headers(name: str, limit: int, left: int) -> Headers:
    """As OpenAI's API has them; the time is until the bucket is full."""
    seconds = (limit - left) * 60 / limit
    return (
        (f"{LIMITS}limit-{name}", str(limit)),
        (f"{LIMITS}remaining-{name}", str(max(0, left))),
        (f"{LIMITS}reset-{name}", f"{seconds:.3f}s"),
    )


def _failed(error: RedisError) -> None:
    metrics.quota_failures.inc()
    if once("quotas"):
        log.warning("Redis does not count what tenants use; no call of a tenant with quotas begins", error=str(error))
