from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray._private import services
from ray._raylet import wait_for_persisted_port

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


def test_agents_that_are_late_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    def start_raylet(node_id: str, session_dir: str, *, runtime_env_agent_port: int = 0, **more: Any) -> None:
        started.append({"runtime_env_agent_port": runtime_env_agent_port} | more)

    monkeypatch.setattr(services, "start_raylet", start_raylet)
    with patient(60):
        services.start_raylet("node", str(tmp_path), runtime_env_agent_port=1234)
    assert services.start_raylet is start_raylet
    (ports,) = started
    assert ports["runtime_env_agent_port"] == 1234
    for name in ("metrics_agent", "metrics_export", "dashboard_agent_listen", "runtime_env_agent"):
        assert 0 < wait_for_persisted_port(str(tmp_path), "node", f"{name}_port", 1) == ports[f"{name}_port"]
