from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray._private import services

from services.cluster import slow_start
from services.cluster.slow_start import patient

pytestmark = pytest.mark.ray


def test_a_node_that_is_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_start, "PAUSE_S", 0.01)
    asked: list[Any] = []

    def get_node(*arguments: Any) -> str:
        asked.append(arguments)
        if len(asked) % 3:
            raise RuntimeError("not there yet")
        return "node"

    monkeypatch.setattr(services, "get_node", get_node)
    (tmp_path / "raylet").symlink_to("/bin/sleep")
    raylet = subprocess.Popen([tmp_path / "raylet", "60"])
    try:
        with patient(60):
            assert services.get_node("address", "id") == "node"
        assert asked == [("address", "id")] * 3
        with patient(0), pytest.raises(RuntimeError):
            services.get_node("address", "id")
    finally:
        raylet.kill()
        raylet.wait()
    with patient(60), pytest.raises(RuntimeError):  # it has ended
        services.get_node("address", "id")
    assert services.get_node is get_node
