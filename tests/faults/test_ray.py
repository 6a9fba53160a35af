"""A stack under Ray that is broken: `qaq bench serve --chaos`, and the end of the raylet."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import psutil
import pytest
from qaq.v1 import common_pb2, generate_pb2

from qaq_core.models.default_model import default_model_path
from services.cluster import control
from services.cluster.state import StackSettings
from services.common import streams
from services.common.errors import Unavailable
from services.common.routers import Routers, named
from services.common.streams import Stream
from tests.e2e.command import qaq, until_nothing_is_left, watched
from tests.faults.hearing import Heard, listen

pytestmark = pytest.mark.ray
SCHEMA = Path(__file__).parents[2] / "qaq_eval" / "schemas" / "bench_chaos.json"


def test_a_stack_is_broken_at_random_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "chaos.json"
    with watched() as place:
        monkeypatch.setenv("TMPDIR", str(place))
        options = ("--workers", "2", "--clients", "4", "--stream-tokens", "200", "--preset", "fp16", "--seed", "5")
        broken = qaq("bench", "serve", "--chaos", "0.3", *options, "--json", out)
        assert broken.returncode == 0, broken.stdout + broken.stderr
        assert "nothing lost or repeated" in broken.stdout
        until_nothing_is_left(place)
    result = json.loads(out.read_text())
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    assert result["faults"]


def test_it_breaks_no_stack_of_somebody_else() -> None:
    refused = qaq("bench", "serve", "--chaos", "1", "--router", "127.0.0.1:1")
    assert refused.returncode != 0
    assert "leave out --router" in refused.stderr


async def test_without_its_raylet_a_stack_ends_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's actors end with it. Clients get a sentence, and nothing is left when the stack is stopped."""
    monkeypatch.setattr(streams, "PATIENCE_S", 5.0)
    with watched() as place:
        monkeypatch.setenv("TMPDIR", str(place))
        settings = StackSettings(model=str(default_model_path()), port=0)
        with control.attached(settings, lambda *_: None) as running:
            routers = Routers(named(running.router))
            request = generate_pb2.GenerateRequest(
                prompt="Once",
                sampling=common_pb2.SamplingParams(temperature=0),
                stop=common_pb2.StopParams(max_new_tokens=2000, ignore_eos=True),
            )
            owned = psutil.Process(running.pid).children(recursive=True)
            (raylet,) = [child for child in owned if child.name() == "raylet"]
            heard = Heard()

            async def kill() -> None:
                raylet.kill()

            with pytest.raises(Unavailable, match="the router went away after"):
                await listen(aiter(Stream(routers, request, 120, ())), heard, 8, kill)
            assert len(heard.tokens) >= 8
            await routers.close()
        until_nothing_is_left(place)
