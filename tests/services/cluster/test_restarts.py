from __future__ import annotations

from pathlib import Path

import pytest

from services.cluster import restarts
from services.cluster.restarts import Life, restarted


@pytest.fixture
def vmstat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "vmstat"
    path.write_text("nr_free_pages 1\noom_kill 4\n")
    monkeypatch.setattr(restarts, "_VMSTAT", path)
    return path


def test_a_restart_says_why(tmp_path: Path, vmstat: Path) -> None:
    assert Life(tmp_path, "worker-0").begin(restarted=False) == ""
    assert restarted(tmp_path) == {}
    assert "was killed or crashed" in Life(tmp_path, "worker-0").begin(restarted=True)
    vmstat.write_text("oom_kill 6\n")
    why = Life(tmp_path, "worker-0").begin(restarted=True)
    assert "memory was short: the kernel killed 2 processes" in why
    record = restarted(tmp_path)["worker-0"]
    assert (record.restarts, record.why) == (2, why)
    assert record.ended is not None
    assert record.ended <= record.seen


def test_a_damaged_record_is_no_reason(tmp_path: Path, vmstat: Path) -> None:
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "router.json").write_text("{")
    assert Life(tmp_path, "router").begin(restarted=True) == ""
    assert restarted(tmp_path) == {}


def test_where_the_kernel_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "_VMSTAT", tmp_path / "none")
    assert restarts.memory_kills() == 0
