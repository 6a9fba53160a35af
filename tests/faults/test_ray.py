"""A stack under Ray that is broken: `qaq bench serve --chaos`, and the end of the raylet."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path

import jsonschema
import psutil
import pytest
from qaq.v1 import common_pb2, generate_pb2

from qaq_core.models.default_model import default_model_path
from qaq_eval.cli import bench_chaos
from services.cluster import control
from services.cluster.state import StackSettings, StackState
from services.common import streams
from services.common.channel import open_channel
from services.common.errors import Unavailable
from services.common.keys import authorization
from services.common.redis import connect
from services.common.routers import Routers, registered
from services.common.streams import Stream
from tests.e2e.command import qaq, until_nothing_is_left, watched
from tests.faults.hearing import Heard, listen

pytestmark = pytest.mark.ray
SCHEMA = Path(__file__).parents[2] / "qaq_eval" / "schemas" / "bench_chaos.json"


def test_a_stack_is_broken_at_random_and_then_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray starts what was killed again, and nothing is lost. Without its raylet the stack ends; a sentence says so."""
    out = tmp_path / "chaos.json"
    with watched() as place:
        monkeypatch.setenv("TMPDIR", str(place))
        settings = StackSettings(model=str(default_model_path()), port=0)
        with control.attached(settings, lambda *_: None) as running:
            # Its first faults, by the seed: the router is killed, then the cache service.
            bench_chaos.run(running, 0.05, 2, 200, "fp16", 20, out)
            assert "nothing lost or repeated" in " ".join(capsys.readouterr().out.split())
            asyncio.run(end(running, monkeypatch))
        until_nothing_is_left(place)
    result = json.loads(out.read_text())
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    assert result["faults"]


async def end(running: StackState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills the raylet in the middle of a stream."""
    monkeypatch.setattr(streams, "PATIENCE_S", 5.0)
    owned = psutil.Process(running.pid).children(recursive=True)
    (raylet,) = [child for child in owned if child.name() == "raylet"]
    redis, heard = connect(running.redis["url"]), Heard()
    dial = partial(open_channel, identity=running.access.identity("client"), role="router")
    routers = Routers(registered(redis), dial)
    request = generate_pb2.GenerateRequest(
        prompt="Once",
        sampling=common_pb2.SamplingParams(temperature=0),
        stop=common_pb2.StopParams(max_new_tokens=2000, ignore_eos=True),
    )

    async def kill() -> None:
        raylet.kill()

    with pytest.raises(Unavailable, match="the router went away after"):
        await listen(aiter(Stream(routers, request, 120, authorization(running.key("client")))), heard, 8, kill)
    assert len(heard.tokens) >= 8
    await routers.close()
    await redis.aclose()


def test_it_breaks_no_stack_of_somebody_else() -> None:
    refused = qaq("bench", "serve", "--chaos", "1", "--router", "127.0.0.1:1")
    assert refused.returncode != 0
    assert "leave out --router" in refused.stderr
