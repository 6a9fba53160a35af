"""The checked-in protocol code is what the .proto files say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / "gen_proto.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_generated_code_is_current() -> None:
    result = check(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_drift_is_noticed(tmp_path: Path) -> None:
    for room in ("proto", "tools"):
        shutil.copytree(ROOT / room, tmp_path / room)
    contract = tmp_path / "proto" / "qaq" / "v1" / "originals.proto"
    contract.write_text(contract.read_text().replace("int64 pages = 1;", "int64 pages = 99;"))
    (tmp_path / "proto" / "qaq" / "v1" / "gone_pb2.py").write_text("")
    result = check(tmp_path)
    assert result.returncode == 1
    assert "differs: qaq/v1/originals_pb2.py" in result.stdout
    assert "no longer generated: qaq/v1/gone_pb2.py" in result.stdout
