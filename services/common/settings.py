"""Settings of every role: from the environment (`QAQ_…`) or from keyword arguments.

Port 0 means any free port; the port that was bound is the one that is registered.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FilePath, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from qaq_core.base.errors import ConfigError
from services.common import addresses, redis_url

MIB = 1 << 20
MIN_SECRET = 16
"""Characters."""

WeightForm = Literal["auto", "plain", "float32", "bfloat16", "int8", "int4"]


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"unknown device {name!r}; take cpu, cuda or cuda:N")
    return name


def _preset(name: str) -> str:
    if name not in ("balanced", "paper", "fp16"):
        raise ValueError(f"unknown preset {name!r}; take balanced, paper or fp16")
    return name


def _checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """A check of `addresses` as a validator."""

    def validate(text: str) -> str:
        try:
            check(text)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return text

    return validate


def _redis_url(url: SecretStr) -> SecretStr:
    _checked(redis_url.check_redis_url)(url.get_secret_value())
    return url


Host = Annotated[str, AfterValidator(_checked(addresses.check_host))]
Addresses = Annotated[str, AfterValidator(_checked(addresses.check_addresses))]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
Device = Annotated[str, AfterValidator(_device)]
PresetName = Annotated[str, AfterValidator(_preset)]


class CommonSettings(BaseSettings):
    """Settings of every role.

    Attributes:
        redis_url: redis:// or rediss://, secret because it contains the password.
        host: address to bind. advertise_host: host name for other servers, if it differs.
        metrics_port: Prometheus port; None serves no metrics, 0 takes any free port.
        metrics_https: with a certificate, metrics have TLS, for those who show one. Without, they are on loopback.
        tls_cert, tls_key, tls_ca: PEM files: this server's certificate, its key, and the CA of all certificates. All
            three or none. They are read again when they change.
        insecure: be open to a network without TLS.
    """

    model_config = SettingsConfigDict(
        env_prefix="QAQ_", extra="ignore", validate_default=True, hide_input_in_errors=True, env_ignore_empty=True
    )

    redis_url: RedisUrl = SecretStr("redis://127.0.0.1:6379/0")
    host: Host = "127.0.0.1"
    advertise_host: Host | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    metrics_https: bool = True
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    insecure: bool = False


class PageSettings(CommonSettings):
    """Settings of the roles that make and keep pages.

    Attributes:
        secret: the same for all workers and cache services of a deployment, at least 16 characters. Page ids, seals
            and checksums are keyed with it. Empty is for one machine alone.
        secret_file: a file that holds the secret, instead.
    """

    secret_file: FilePath | None = None
    secret: SecretStr = SecretStr("")

    @field_validator("secret")
    @classmethod
    def _read_secret(cls, secret: SecretStr, info: ValidationInfo) -> SecretStr:
        path = info.data.get("secret_file")
        if path is not None:
            if secret.get_secret_value():
                raise ValueError("a secret file is set too; set one of them")
            secret = SecretStr(path.read_text().strip())
        if (path is not None or secret.get_secret_value()) and len(secret.get_secret_value()) < MIN_SECRET:
            raise ValueError(
                f"the secret has fewer than {MIN_SECRET} characters; `openssl rand -hex 32` makes a good one"
            )
        return secret


class RouterSettings(CommonSettings):
    """Settings of a router.

    Attributes:
        model: where the tokenizer of the default model is loaded from, which requests mean that name no model. None:
            the first model that a worker serves. The tokenizers of other models are loaded from where their workers
            found them.
        max_queue: generations that may wait for each model.
        placement: names of the placement policies, in order, see services/router/placement.
        resume_timeout_s: how long a stream whose worker went away waits for another worker.
        session_ttl_s: seconds after which an unused session expires.
        tenants_file: who may call, with which keys and how much, see services/common/tenants.py; it is read again when
            it changes. None authenticates nobody: callers name their tenant themselves.
        smg: also serve vLLM's engine protocol, for SMG in front; needs the extra smg.
        client_certificates: with TLS, clients must show a certificate.
    """

    port: int = Field(default=7700, ge=0, le=65535)
    model: str | None = Field(default=None, min_length=1)
    max_prompt_bytes: int = Field(default=4 * MIB, ge=1)
    max_queue: int = Field(default=256, ge=1)
    request_timeout_s: float = Field(default=600.0, gt=0)
    placement: str = "affinity,prefix,load"
    resume_timeout_s: float = Field(default=60.0, ge=0)
    session_ttl_s: int = Field(default=3600, ge=1)
    tenants_file: Path | None = None
    smg: bool = False
    client_certificates: bool = False


class GatewaySettings(CommonSettings):
    """Settings of a gateway.

    Attributes:
        router: host:port of the routers, separated by commas, in order of preference. None takes the registered ones.
        max_body_bytes: of a request; a longer one would hold the event loop for over 50 ms.
        max_bodies_bytes: of all requests that have not been answered.
        cors_origins: origins whose pages may call the gateway, separated by commas; "*" is any. None if empty.
        https: with a certificate, serve HTTP with TLS too. Without, it is for loopback.
        client_certificates: with TLS, clients must show a certificate.
    """

    port: int = Field(default=8000, ge=0, le=65535)
    router: Addresses | None = None
    request_timeout_s: float = Field(default=600.0, gt=0)
    max_body_bytes: int = Field(default=8 * MIB, ge=1)
    max_bodies_bytes: int = Field(default=256 * MIB, ge=1)
    cors_origins: str = ""
    https: bool = True
    client_certificates: bool = False


class WorkerSettings(PageSettings):
    """Settings of a worker.

    Attributes:
        model: local directory, GGUF file or hub id.
        weights: form of the linear layers; auto is float32 on a CPU and plain elsewhere. Other forms cost quality.
        compiled: decode steps run under torch.compile, which takes up to a minute at the start.
        target_bits: mean code bits per element after prefill; None takes the preset's.
        page_tokens: tokens in a page of originals.
        prefill_chunk: prompt tokens computed in one step.
        decode_threads: threads of a decode step on a CPU; None leaves one of torch's threads to other processes.
        speculative_tokens: tokens that prompt lookup drafts for a sequence that decodes alone, to be verified in one
            pass; 0 decodes one by one. What the cache packs or reviews ends a pass, so `balanced` verifies 3 at most.
        max_sequences: sequences that decode in one step.
        max_waiting: generations in the queue.
        max_idle_sessions: idle sessions whose caches are kept for their next turn.
        kv_budget_bytes: bytes that all caches may hold, except those of prompts in prefill; None is unbounded.
        kv_min_bits: mean code bits per element that elastic caches keep when memory is short. Admission assumes it.
        recovery_bytes_per_s: bandwidth for packed rows fetched to restore bits when memory is free again.
        staging_budget_bytes: originals in host memory that the store has not acknowledged; above it, no generation is
            admitted.
        requantize_wait: decode waits for re-quantized rows, as in the paper.
        exceptions: when a row that attention returns to gets more bits: off, never; async, a few steps later; in-time,
            also in the very step that looks at it (`balanced` alone; `paper` answers as with async).
        host_cache_bytes: originals that stay in host memory after the store has taken them, with exceptions in time.
        prefix_reuse: prompts begin with their stored pages.
        prefix_sharing: who finds a stored prefix: the tenant that sent it first, or all tenants.
        prefix_recompute_tokens: last tokens of a prompt that are computed even if they are stored. The attention of
            their queries decides the bits of the other tokens.
        prefix_timeout_s: seconds that loading a prefix may take; what is missing then is computed.
        orphan_s: seconds that a generation whose router is lost keeps its place and its cache and waits for its client
            to rejoin; 0 ends it at once.
        shadow_tokens: the longest session that is compared with full precision while somebody looks; 0 compares none.
    """

    port: int = Field(default=0, ge=0, le=65535)
    model: str = Field(min_length=1)
    device: Device = "cpu"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    weights: WeightForm = "auto"
    compiled: bool = False
    preset: PresetName = "balanced"
    target_bits: float | None = Field(default=None, gt=0, le=16)
    page_tokens: int = Field(default=32, ge=1, le=1024)
    prefill_chunk: int = Field(default=512, ge=1)
    decode_threads: int | None = Field(default=None, ge=1)
    speculative_tokens: int = Field(default=0, ge=0)
    max_sequences: int = Field(default=8, ge=1)
    max_waiting: int = Field(default=64, ge=0)
    max_idle_sessions: int = Field(default=32, ge=0)
    kv_budget_bytes: int | None = Field(default=None, ge=1)
    kv_min_bits: float = Field(default=1.5, gt=0, le=16)
    recovery_bytes_per_s: float = Field(default=8 * MIB, gt=0)
    staging_budget_bytes: int = Field(default=2048 * MIB, ge=1)
    requantize_wait: bool = False
    exceptions: Literal["off", "async", "in-time"] = "async"
    host_cache_bytes: int = Field(default=256 * MIB, ge=0)
    prefix_reuse: bool = True
    prefix_sharing: Literal["tenant", "all"] = "tenant"
    prefix_recompute_tokens: int = Field(default=128, ge=1)
    prefix_timeout_s: float = Field(default=10.0, gt=0)
    orphan_s: float = Field(default=10.0, ge=0)
    shadow_tokens: int = Field(default=4096, ge=0)


class OriginalsSettings(PageSettings):
    """Settings of a cache service.

    Attributes:
        page_ttl_s: seconds until an unused page expires in Redis. Workers touch the pages of running sessions every
            60 s.
        page_budget_bytes: bytes that pages and codecs may take in Redis. None takes Redis' maxmemory without a reserve
            for sessions and heartbeats: an eighth, at least 16 MiB. Unbounded if Redis has no maxmemory either.
        page_form: how pages are stored. plain is the fastest, lossless compresses them, float16 and int8 round their
            values.
        upload_budget_bytes: of pages and tables that have not come completely; one host has three quarters of it.
    """

    port: int = Field(default=0, ge=0, le=65535)
    page_ttl_s: int = Field(default=3600, ge=180)
    page_budget_bytes: int | None = Field(default=None, ge=1)
    page_form: Literal["plain", "lossless", "float16", "int8"] = "plain"
    upload_budget_bytes: int = Field(default=512 * MIB, ge=1)
