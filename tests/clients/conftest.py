"""A stack for clients that know nothing of QAQ, and the programs that `make clients` installs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qaq_core.models import LoadedModel

from .stack import Stack, running

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"

Run = Callable[..., str]


@pytest.fixture(scope="module")
def stack(smollm2: LoadedModel, model_path: Path) -> Iterator[Stack]:
    with running(smollm2, str(model_path)) as stack:
        yield stack


@pytest.fixture(scope="session")
def tokenizer_dir(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's tokenizer as a directory, for clients that count tokens themselves."""
    directory = tmp_path_factory.mktemp("tokenizer")
    smollm2.tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def clients() -> Path:
    """The `bin` of the clients' own environment."""
    given = os.environ.get("QAQ_CLIENTS")
    if not given:
        pytest.skip("needs the clients that `make clients` installs")
    return ROOT / given / "bin"


@pytest.fixture
def run(clients: Path, tmp_path: Path) -> Run:
    """Runs a program of the clients' environment, or a script of `programs` with its Python. Gives what it prints."""

    def command(name: str, *arguments: object, timeout_s: float = 300, **environment: str) -> str:
        program: list[object] = [clients / name]
        if name.endswith(".py"):
            program = [clients / "python", PROGRAMS / name]
        elif not (clients / name).exists():
            pytest.skip(f"{name} is not in {clients}; it has no release for that Python, or its install failed")
        # Nothing may be loaded from a hub, and nothing reported to anybody.
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}
        done = subprocess.run(
            [*map(str, program), *map(str, arguments)],
            env=os.environ | quiet | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    return command
