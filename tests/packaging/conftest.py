"""The installed package: a wheel of this tree, in an environment in which chosen packages are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qaq_core.kernels import load_library

ROOT = Path(__file__).parents[2]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "proto", "qaq_core", "qaq_eval", "services"]

# Imported by the environment's .pth file: the packages that HIDDEN names are not there.
HIDE = "import os, sys; sys.modules.update(dict.fromkeys(filter(None, os.environ.get('HIDDEN', '').split(','))))"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel as `pip wheel` makes it, without a C++ compiler."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignored)
        else:
            shutil.copy(source, tree)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=tree,
        env=os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler", "PYTHONPATH": ""},
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment's Python: it has the wheel, and this environment's packages but those that HIDDEN names."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(packages)
    (packages / "hide_packages.py").write_text(HIDE)
    (packages / "all.pth").write_text(f"import hide_packages\n{sysconfig.get_path('purelib')}\n")
    return home / "bin" / "python"


@pytest.fixture
def run(python: Path, tmp_path: Path) -> Run:
    """Runs the environment's Python outside of the tree: `run(*arguments, hidden=names, VARIABLE=value)`.

    It uses the tree's C++ library if that is built: the wheel has none, and torch operations are slow.
    """
    library = load_library()

    def started(*arguments: str, hidden: tuple[str, ...], **variables: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | variables | {"HIDDEN": ",".join(hidden), "COLUMNS": "200"}
        environment.pop("PYTHONPATH", None)
        if library is not None:
            environment["QAQ_LIBRARY"] = library._name
        return subprocess.run(
            [python, *arguments],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
        )

    return started
