"""`qaq doctor`: what of this machine QAQ finds, what runs because of it, and what to do for more."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal

import typer
from pydantic import BaseModel
from rich.table import Column, Table

from services.cli.options import Device, JsonPath, model_or_default
from services.cli.terminal import screen, size
from services.common.extras import EXTRAS

VERSIONS = ("qaq-kv", "torch", "transformers", "ray", "grpcio", "redis", "numpy")
REDIS_URL = "QAQ_REDIS_URL"
MARKS = {"ok": "[green]ok[/]", "better": "[yellow]could be better[/]", "wrong": "[bold red]wrong[/]"}

State = Literal["ok", "better", "wrong"]


class Finding(BaseModel):
    """One thing that was looked at.

    Attributes:
        state: "better": it works, and would be better with what is advised; "wrong": it cannot work.
        advice: what to do.
    """

    name: str
    state: State
    found: str
    advice: str | None = None


class Diagnosis(BaseModel):
    """What `--json` writes; its schema is services/schemas/doctor.json."""

    ok: bool
    findings: list[Finding]


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(envvar="QAQ_MODEL", help="Look for this one, too; default: SmolLM2-135M, if it is there."),
    ] = None,
    device: Device = "cpu",
    json_path: JsonPath = None,
) -> None:
    """Says what runs here and what is missing; exit code 1 if something that was asked for cannot work.

    Nothing is downloaded, started or changed.
    """
    findings = [finding for check in checks(model, device) for finding in check()]
    diagnosis = Diagnosis(ok=all(finding.state != "wrong" for finding in findings), findings=findings)
    screen.print(_table(findings), highlight=False)
    if json_path is not None:
        json_path.write_text(diagnosis.model_dump_json(indent=1) + "\n")
    if not diagnosis.ok:
        raise typer.Exit(1)


def checks(model: str | None, device: str) -> list[Callable[[], Iterator[Finding]]]:
    return [
        versions,
        lambda: kernel(device),
        library,
        threads,
        memory,
        redis,
        lambda: model_files(model),
        cache_directory,
        variables,
        extras,
    ]


def versions() -> Iterator[Finding]:
    told = [f"{name} {_version(name)}" for name in VERSIONS]
    yield Finding(name="versions", state="ok", found=", ".join([f"Python {platform.python_version()}", *told]))


def kernel(device: str) -> Iterator[Finding]:
    """Which attention runs on the device, and why not a faster one."""
    import torch

    from qaq_core.base.errors import ConfigError
    from qaq_core.cache import faster_kernel, make_attention
    from qaq_core.models import device_of
    from qaq_core.quantization import GaussianCodec

    try:
        place = device_of(device)
        running = make_attention(GaussianCodec(), place).name
    except ConfigError as error:
        yield Finding(name="kernel", state="wrong", found=f"none on {device}", advice=str(error))
        return
    asked = os.environ.get("QAQ_KERNEL", "auto")
    advice = faster_kernel(place, running) if asked == "auto" else None
    if running == "reference" and asked != "auto":
        advice = "a faster one may be there: unset QAQ_KERNEL"
    found = f"{running} on {device} (QAQ_KERNEL={asked}; the processor has {torch.backends.cpu.get_cpu_capability()})"
    yield Finding(name="kernel", state="better" if advice else "ok", found=found, advice=advice)


def library() -> Iterator[Finding]:
    """The C++ library, which also packs and moves rows."""
    from qaq_core.kernels import INTERFACE, load_library, missing_library

    loaded = load_library()
    if loaded is None:
        yield Finding(name="C++ library", state="better", found="none", advice=missing_library())
        return
    found = f"{loaded._name}, interface {INTERFACE}, {loaded.qaq_isa().decode()}"
    yield Finding(name="C++ library", state="ok", found=found)


def threads() -> Iterator[Finding]:
    import torch

    used = torch.get_num_threads()
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS")
    found = f"{used} of {free} processors" + (f" (OMP_NUM_THREADS={asked})" if asked else "")
    advice = (
        f"more threads than processors get in each other's way: set OMP_NUM_THREADS={free}" if used > free else None
    )
    yield Finding(name="threads", state="better" if advice else "ok", found=found, advice=advice)


def memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding(name="memory", state="ok", found=f"{size(memory.available)} of {size(memory.total)} free")


def redis() -> Iterator[Finding]:
    """The configured server, or the one that `qaq up` would start."""
    from qaq_core.base.errors import ConfigError
    from services.common.embedded_redis import EmbeddedRedis, RedisStartError, find_server, server_version
    from services.common.redis_url import check_redis_url

    url = os.environ.get(REDIS_URL) or None
    try:
        if url is not None:
            found = EmbeddedRedis(check_redis_url(url)).start().description
        else:
            name, binary = find_server()
            found = f"{name} {server_version(binary)}, which qaq up starts"
    except (RedisStartError, ConfigError) as error:
        state: State = "better" if url is None else "wrong"
        yield Finding(name="Redis", state=state, found="none", advice=str(error))
        return
    yield Finding(name="Redis", state="ok", found=found)


def model_files(model: str | None) -> Iterator[Finding]:
    """The model's files, and what has been measured of it."""
    from safetensors import SafetensorError

    from qaq_core import calibration
    from qaq_core.base.errors import ModelLoadError
    from qaq_core.models import find_checkpoint

    try:
        checkpoint = find_checkpoint(model_or_default(model))
        fingerprint = checkpoint.fingerprint()
    except ModelLoadError as error:
        yield Finding(name="model", state="better" if model is None else "wrong", found="none", advice=str(error))
        return
    yield Finding(name="model", state="ok", found=f"{checkpoint.name}: {checkpoint.path}")
    try:
        known = calibration.known(fingerprint)
    except (OSError, SafetensorError) as error:
        advice = f"delete {calibration.cached_at(fingerprint)}: it cannot be read ({error})"
        yield Finding(name="calibration", state="wrong", found="damaged", advice=advice)
        return
    if known is None:
        advice = "it is measured at first use, which takes minutes; qaq calibrate does it now"
        yield Finding(name="calibration", state="better", found="none", advice=advice)
    elif known.source != calibration.GRADIENTS:
        advice = "with more free memory qaq calibrate --gradients measures a better one"
        yield Finding(name="calibration", state="better", found=f"by {known.source}", advice=advice)
    else:
        yield Finding(name="calibration", state="ok", found=f"by {known.source}")


def cache_directory() -> Iterator[Finding]:
    """Where calibrations and converted models are kept; its nearest folder that exists must be writable."""
    from qaq_core.base.paths import cache_dir

    path = cache_dir()
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        yield Finding(name="cache", state="ok", found=str(path))
        return
    advice = f"{nearest} cannot be written: set QAQ_CACHE_DIR, or all is measured and converted at each start"
    yield Finding(name="cache", state="better", found=str(path), advice=advice)


def variables() -> Iterator[Finding]:
    """The environment variables of QAQ that are set; one finding for each that cannot be or means nothing.

    Not for the address of Redis, about which `redis` has its own.
    """
    from services.common import environment

    wrong, unknown = environment.wrong(), environment.unknown()
    for name, what in wrong.items():
        if name == REDIS_URL:
            continue
        yield Finding(name=name, state="wrong", found="cannot be used", advice=what)
    for name, meant in unknown.items():
        yield Finding(name=name, state="better", found="unknown", advice=environment.told(name, meant))
    if not wrong and not unknown:
        names = sorted(name for name in os.environ if name.upper().startswith(environment.PREFIX))
        yield Finding(name="variables", state="ok", found=", ".join(names) or "none is set")


def extras() -> Iterator[Finding]:
    """Optional parts of QAQ; one that is not there is no fault."""
    for name, extra in EXTRAS.items():
        how = f"{', '.join(extra.missing)} not installed; pip install 'qaq-kv[{name}]' for {extra.purpose}"
        yield Finding(name=f"extra {name}", state="ok", found=how if extra.missing else "installed")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _table(findings: list[Finding]) -> Table:
    from rich.markup import escape

    table = Table("", "", Column("", overflow="fold"), show_header=False)
    for finding in findings:
        told = escape(finding.found) + (f"\n→ {escape(finding.advice)}" if finding.advice else "")
        table.add_row(finding.name, MARKS[finding.state], told)
    return table
