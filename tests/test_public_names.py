"""Exported names: all import, nothing public is left out, and what is built on the library uses nothing else of it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import qaq_core

ROOT = Path(qaq_core.__file__).parents[1]
# The base package is light on purpose: its `__init__` imports nothing, and its modules are public as they are.
PACKAGES = ["qaq_core"] + [
    f"qaq_core.{folder.name}"
    for folder in sorted((ROOT / "qaq_core").iterdir())
    if (folder / "__init__.py").exists() and folder.name != "base"
]
PACKAGES.append("qaq_core.kernels.cuda")  # beside `kernels`, which does not import it
USERS = sorted(path for package in ("services", "qaq_eval") for path in (ROOT / package).rglob("*.py"))


def exported(package: str) -> ModuleType:
    return importlib.import_module(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_exported_name_imports(package: str) -> None:
    module = exported(package)
    for name in module.__all__:
        assert getattr(module, name) is not None, f"{package}.{name}"
    assert len(module.__all__) == len(set(module.__all__)), package


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_that_a_package_imports_is_exported(package: str) -> None:
    """The imports of an `__init__`, those for type checkers included, are its list of names."""
    module = exported(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("qaq_core.")
        for alias in node.names
    }
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    }
    assert imported | defined == set(module.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = qaq_core.Nothing


def library_imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every import from qaq_core; the name is empty in `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names if alias.name.split(".")[0] == "qaq_core")
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "qaq_core":
            yield from ((node.lineno, str(node.module), alias.name) for alias in node.names)


def is_public(module: str, name: str) -> bool:
    if module.startswith("qaq_core.base"):
        return True
    if module not in PACKAGES:
        return False
    return not name or name in exported(module).__all__ or f"{module}.{name}" in PACKAGES


@pytest.mark.parametrize("package", ["services", "qaq_eval"])
def test_services_and_evaluation_use_public_names(package: str) -> None:
    deep = [
        f"{path.relative_to(ROOT)}:{line}: {name or 'import'} of {module}"
        for path in USERS
        if path.relative_to(ROOT).parts[0] == package
        for line, module, name in library_imports(path)
        if not is_public(module, name)
    ]
    assert not deep, "import these from qaq_core or one of its packages:\n" + "\n".join(deep)


@pytest.mark.parametrize(
    ("module", "name", "public"),
    [
        ("qaq_core", "Method", True),
        ("qaq_core", "calibration", True),
        ("qaq_core.cache", "Method", True),
        ("qaq_core.base.errors", "ConfigError", True),
        ("qaq_core.cache.method", "Method", False),
        ("qaq_core.cache", "backends", False),
        ("qaq_core.allocation.policies", "FixedPolicy", False),
    ],
)
def test_what_counts_as_public(module: str, name: str, public: bool) -> None:
    assert is_public(module, name) is public
