"""`qaq up`, `status`, `scale`, `down` over real Ray, and what happens when something is missing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qaq_core.models.default_model import default_model_path
from services.cluster import restarts, state
from services.cluster.state import StackState
from services.common.embedded_redis import free_port

from .command import here, qaq, until_nothing_is_left, watched

pytestmark = pytest.mark.ray


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where everything that a test starts keeps its files."""
    with watched() as directory:
        monkeypatch.setenv("TMPDIR", str(directory))
        yield directory


def test_a_stack_comes_up_scales_and_goes(state_directory: Path, place: Path, tmp_path: Path) -> None:
    try:
        up = qaq("up", "--workers", "1", "--max-workers", "2", "--port", "0", "--http-port", "0")
        assert up.returncode == 0, up.stderr
        assert "The router is at 127.0.0.1:" in up.stdout
        url = up.stdout.split("OpenAI's API is at ")[1].split("/v1")[0]
        assert here("health", url).returncode == 0
        asks_for_its_key(up.stdout, url, state_directory)
        again = qaq("up", "--port", "0")
        assert (again.returncode, "a stack is running already" in again.stderr) == (1, True)
        running = state.load()
        assert running is not None
        private_and_on_loopback(running)
        said = qaq("generate", "The capital of France is", "--max-new-tokens", "8", "--temperature", "0")
        assert said.returncode == 0, said.stderr
        assert "Paris" in said.stdout
        bounded = qaq("status")
        assert "1 to 2 workers, 1 now; not changed yet" in bounded.stdout, bounded.stderr
        for count in (2, 1):
            scaled = qaq("scale", "--workers", str(count))
            assert scaled.returncode == 0, scaled.stderr
            shown = qaq("status", "--json", tmp_path / "status.json")
            assert shown.returncode == 0, shown.stderr
            found = json.loads((tmp_path / "status.json").read_text())
            assert len(found["workers"]) == count
            assert all(found["workers"].values())
            if count == 2:
                a_drained_worker_is_replaced(sorted(found["workers"]), tmp_path)
        assert found["originals"]
        assert len(found["routers"]) == 1
        assert found["restarts"] == {}
        a_worker_goes_first_and_says_so(running, tmp_path)
        assert found["keys"] == str(state_directory)
        nothing_shows_its_keys(state_directory, place)
    finally:
        stopped = qaq("down")
    assert stopped.returncode == 0, stopped.stderr
    until_nothing_is_left(place)
    assert not (state_directory / "stack.json").exists()
    gone = qaq("status")
    assert (gone.returncode, "no stack is running; start one" in gone.stderr) == (1, True)


def a_drained_worker_is_replaced(workers: list[str], place: Path) -> None:
    """Two serve before and after; the drained one is gone."""
    drained = qaq("drain", workers[0])
    assert (drained.returncode, "The worker is stopped." in drained.stdout) == (0, True), drained.stderr
    shown = qaq("status", "--json", place / "status.json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads((place / "status.json").read_text())
    assert (len(found["workers"]), found["draining"]) == (2, [])
    assert workers[1] in found["workers"]
    assert workers[0] not in found["workers"]


def private_and_on_loopback(running: StackState) -> None:
    """Nothing of the stack can be reached from elsewhere or read by others."""
    assert running.directory.stat().st_mode & 0o777 == 0o700
    assert (state.directory() / "stack.json").stat().st_mode & 0o777 == 0o600
    processes = psutil.Process(running.pid).children(recursive=True)
    assert len(processes) >= 7  # the host, Redis, Ray's two and four servers, and others
    heard = {
        address(each) for process in processes for each in process.net_connections("inet") if each.status == "LISTEN"
    }
    assert {running.router, running.gateway, running.ray_address} <= heard
    assert {each.rpartition(":")[0] for each in heard} == {"127.0.0.1"}, heard
    assert not [each for each in heard if each.endswith(":44217")], "Ray's autoscaler shows its metrics to everybody"
    for process in processes:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            assert not line.startswith("Umask") or line.split()[1] == "0077", process.cmdline()
        token = (running.directory / "token").read_text()
        assert token not in " ".join(process.cmdline())


def address(connection: Any) -> str:
    """An IPv4 address is that, whatever the socket's family."""
    return f"{connection.laddr.ip.removeprefix('::ffff:')}:{connection.laddr.port}"


def a_worker_goes_first_and_says_so(running: StackState, place: Path) -> None:
    """The kernel would kill a worker before any other process of the stack; who was killed is told."""
    scores = {}
    for process in psutil.Process(running.pid).children(recursive=True):
        name = next(iter(process.cmdline()), "")
        role = name.removeprefix("ray::").partition(".")[0]
        score = int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())
        scores.setdefault("worker" if role == "WorkerActor" else "other", []).append((score, process.pid, name))
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert {score for score, *_ in scores["worker"]} == {500}
    assert {score for score, *_ in scores["other"]} <= {0, own}, scores
    os.kill(scores["worker"][0][1], signal.SIGKILL)
    for _ in range(1800):
        again = restarts.restarted(running.directory)
        if again:
            break
        time.sleep(0.1)
    ((worker, record),) = again.items()  # which number is left depends on which one was drained
    assert worker.startswith("worker-")
    assert "was killed or crashed" in record.why
    shown = qaq("status", "--json", place / "status.json")
    assert f"{worker} was started again once" in shown.stdout
    assert json.loads((place / "status.json").read_text())["restarts"][worker]["restarts"] == 1


def asks_for_its_key(said: str, url: str, directory: Path) -> None:
    """`qaq up` says where the key is and not what it is, and OpenAI's API wants it."""
    path = directory / "client.key"
    key = path.read_text().strip()
    assert f'export QAQ_API_KEY="$(cat {path})"' in said
    assert f'export OPENAI_API_KEY="$(cat {path})"' in said
    assert key not in said
    for given, status in (("", 401), ("none", 401), (key, 200)):
        request = urllib.request.Request(f"{url}/v1/models", headers={"authorization": f"Bearer {given}"})
        try:
            answered = urllib.request.urlopen(request, timeout=30).status
        except urllib.error.HTTPError as error:
            answered = error.code
        assert answered == status
    other = here("generate", "Hi", "--max-new-tokens", "1", QAQ_API_KEY="qaq_of-nobody")
    assert (other.returncode, "this key is of no tenant" in other.stderr) == (1, True)


def nothing_shows_its_keys(directory: Path, place: Path) -> None:
    """Neither the list of processes, nor their environments, nor a log; and only their owner reads the files."""
    files = [directory / name for name in ("client.key", "operator.key", "tenants.json")]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    keys = [path.read_text().strip().encode() for path in files[:2]]
    shown = [path.read_bytes() for path in [directory / "stack.log", *place.rglob("*.log"), *place.rglob("*.err")]]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            shown.append(" ".join([*process.cmdline(), *process.environ().values()]).encode())
    assert len(shown) > 5
    assert not any(key in text for key in keys for text in shown)


def failed(result: object, *sentences: str) -> None:
    assert result.returncode == 1  # type: ignore[attr-defined]
    for sentence in sentences:
        assert sentence in result.stderr  # type: ignore[attr-defined]
    assert "Traceback" not in result.stderr  # type: ignore[attr-defined]


def test_up_without_its_redis(state_directory: Path, place: Path) -> None:
    url = f"redis://:hidden@127.0.0.1:{free_port()}/0"
    result = qaq("up", "--port", "0", QAQ_REDIS_URL=url)
    failed(result, "does not answer", "unset QAQ_REDIS_URL")
    assert "hidden" not in result.stderr + result.stdout
    until_nothing_is_left(place)


def test_up_on_a_port_that_is_taken(state_directory: Path, place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed(here("up", "--port", str(port)), f"port {port} is taken; choose another with --port")
    until_nothing_is_left(place)


def test_up_with_a_model_that_is_missing(state_directory: Path, place: Path, tmp_path: Path) -> None:
    failed(here("up", "--port", "0", "--model", tmp_path / "none.gguf"), "none.gguf", "is not there; give")
    until_nothing_is_left(place)
    assert not (state_directory / "stack.json").exists()


def test_up_with_a_model_that_is_cut_short(state_directory: Path, place: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    shutil.copy(default_model_path(), cut)
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size // 2)
    failed(here("up", "--port", "0", "--model", cut), "cut.gguf")
    until_nothing_is_left(place)


def test_a_bad_option_is_told(state_directory: Path) -> None:
    failed(here("up", "--dtype", "int3"), "dtype", "float32")
