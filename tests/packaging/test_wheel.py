"""What the wheel holds, and that the extras cover what the code imports."""

from __future__ import annotations

import re
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from services.common.extras import EXTRAS, advice

from .conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normalized(requirement: str) -> set[str]:
    """Distributions that a requirement names: its package, and its extras as packages of their own."""
    match = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", requirement)
    assert match is not None
    names = [match[1], *(match[2] or "").split(",")]
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names if name}


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "qaq_core/py.typed",
        "qaq_core/kernels/csrc/attention.h",
        "qaq_core/calibration/tables/5f4fa13bfc6dd4a91fd00e22974a9c4e9ed628fd7d7f307398ddf30260d6b2c3.safetensors",
        "qaq/v1/common.proto",
        "qaq/v1/common_pb2.py",
        "qaq_eval/cli/__init__.py",
        "services/schemas/doctor.json",
        "services/cli/main.py",
    ],
)
def test_the_wheel_holds(wheel: Path, path: str) -> None:
    assert path in zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_no_test(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    in_tree = {
        str(path.relative_to(ROOT))
        for package in ("qaq_core", "qaq_eval", "services")
        for path in (ROOT / package).rglob("*.py")
    }
    assert in_tree <= held
    assert {name.partition("/")[0] for name in held} == {"qaq", "qaq_core", "qaq_eval", "services"}


def test_the_library_requires_no_server() -> None:
    library = set().union(*map(normalized, PROJECT["dependencies"]))
    servers = set().union(*map(normalized, PROJECT["optional-dependencies"]["serve"]))
    assert not library & servers
    assert library == {
        "accelerate", "blake3", "filelock", "gguf", "huggingface-hub", "numpy", "psutil", "safetensors", "torch",
        "transformers",
    }  # fmt: skip


@pytest.mark.parametrize("extra", ["serve", "constraints", "eval", "triton"])
def test_a_missing_module_is_told_by_its_extra(extra: str) -> None:
    """`EXTRAS` lists the modules of what pyproject.toml lists."""
    modules: dict[str, set[str]] = {}
    for module, distributions in packages_distributions().items():
        for distribution in distributions:
            modules.setdefault(next(iter(normalized(distribution))), set()).add(module)
    required = set().union(*map(normalized, PROJECT["optional-dependencies"][extra])) - {"qaq-kv", "serve"}
    for distribution in required:
        assert modules[distribution] & set(EXTRAS[extra].modules), f"{distribution} brings {modules[distribution]}"
    brought = set().union(*(modules[distribution] for distribution in required))
    assert set(EXTRAS[extra].modules) <= brought


def test_a_module_of_no_extra_is_no_advice() -> None:
    assert advice(ModuleNotFoundError("No module named 'qaq_core.nothing'", name="qaq_core.nothing")) is None
    assert advice(ModuleNotFoundError("no name")) is None
    missing = advice(ModuleNotFoundError("No module named 'redis.asyncio'", name="redis.asyncio"))
    assert missing == "this command needs redis, which is not installed: pip install 'qaq-kv[serve]'"
