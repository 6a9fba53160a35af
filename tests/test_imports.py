"""`make lint` refuses an import against the ladder, a circle, and a library that needs a server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qaq_core", "qaq_eval", "services")


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([command, "--no-logo", "--no-cache"], cwd=tree, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with their contracts."""
    tree = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            copy = tree / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def test_the_imports_are_as_they_should_be(tree: Path) -> None:
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout


BROKEN = [
    ("qaq_core/base/rows.py", "from qaq_core.storage.pool import Pool", "imports downwards"),
    ("qaq_core/kernels/library.py", "def late():\n    import qaq_core.attention.cpu", "imports downwards"),
    ("services/router/server.py", "from qaq_eval.serving.load import Load", "Evaluation above services"),
    ("services/router/server.py", "import services.worker.server", "do not know each other"),
    ("qaq_core/storage/originals.py", "import redis", "needs nothing of a server"),
]


@pytest.fixture(scope="module")
def told(tree: Path) -> str:
    """What is said of all these imports at once."""
    return told_of(tree, [(module, added) for module, added, _ in BROKEN])


def told_of(tree: Path, imports: list[tuple[str, str]]) -> str:
    before = {module: (tree / module).read_text() for module, _ in imports}
    for module, added in imports:
        with (tree / module).open("a") as file:
            file.write(f"\n{added}\n")
    try:
        result = lint_imports(tree)
    finally:
        for module, text in before.items():
            (tree / module).write_text(text)
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def breaks(told: str, contract: str) -> bool:
    return any(contract in line for line in told.splitlines() if line.endswith("BROKEN"))


@pytest.mark.parametrize(("module", "added", "contract"), BROKEN)
def test_an_import_that_breaks_a_contract_fails(told: str, module: str, added: str, contract: str) -> None:
    assert breaks(told, contract), told
    imported = added.split("import ")[-1] if "from " not in added else added.split()[1]
    assert f"{module.removesuffix('.py').replace('/', '.')} -> {imported} " in told, told


def test_a_circle_fails_also_if_it_is_for_type_checkers(tree: Path) -> None:
    added = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from qaq_core.base.rows import RowRequest"
    assert breaks(told_of(tree, [("qaq_core/base/pages.py", added)]), "No circle")
