from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from services.cluster import state
from services.cluster.state import StackError, StackSettings, StackState


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def running(**changes: object) -> StackState:
    fields = {
        "settings": StackSettings(model="m"),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        "router": "127.0.0.1:1",
        "ray_address": "127.0.0.1:2",
        "directory": "/tmp/none",
        "redis": {"url": "redis://:secret@127.0.0.1:3/0", "description": "d", "pid": None},
        "secret": "s" * 64,
        **changes,
    }
    return StackState.model_validate(fields)


def test_a_state_comes_back_and_only_its_owner_can_read_it(place: Path) -> None:
    saved = running()
    state.save(saved)
    assert state.load() == saved
    assert (place / "stack.json").stat().st_mode & 0o777 == 0o600
    assert place.stat().st_mode & 0o777 == 0o700
    state.forget()
    assert state.load() is None
    assert list(place.iterdir()) == []
    state.forget()


def test_a_damaged_state_is_told(place: Path) -> None:
    state.save(running())
    (place / "stack.json").write_text("{")
    with pytest.raises(StackError, match="is damaged"):
        state.load()


def test_a_process_is_told_from_a_later_one_with_its_pid() -> None:
    assert running().alive
    assert not running(born=1.0).alive
    assert not running(pid=2**22 + 1).alive


def test_a_place_where_others_may_write_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path))
    with pytest.raises(StackError, match=r"others may write in .*; run chmod go-w"):
        state.save(running())


def test_a_place_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("/proc/qaq", str(tmp_path / "file" / "state")):
        monkeypatch.setenv("QAQ_STATE_DIR", place)
        with pytest.raises(StackError, match=r"cannot be written.*set QAQ_STATE_DIR"):
            state.save(running())


@pytest.mark.parametrize(
    "bad",
    [{"model": ""}, {"workers": 0}, {"port": 70000}, {"target_bits": 0}, {"device": "tpu"}, {"preset": "zip"}],
)
def test_settings_are_checked(bad: dict) -> None:
    with pytest.raises(ValidationError):
        StackSettings.model_validate({"model": "m", **bad})
