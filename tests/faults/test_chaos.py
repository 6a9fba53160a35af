"""The short form of `make faults`, under streams. What it leaves out is broken in the other files of this folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest

from qaq_eval.serving import chaos
from qaq_eval.serving.chaos import Fault
from qaq_eval.serving.chaos_result import sentence
from tests.faults.__main__ import faults
from tests.faults.processes import Processes

SCHEMA = Path(__file__).parents[2] / "qaq_eval" / "schemas" / "bench_chaos.json"


LONG = os.environ.get("QAQ_FAULTS") == "long"
SHORT = [Fault("Redis", "killed"), Fault("router", "stopped"), Fault("worker", "stopped")]
# Alone, without other faults before and behind, test_processes.py kills these.
if LONG:
    SHORT += [Fault("cache service", "killed"), Fault("worker", "killed")]


@pytest.fixture
def running(request: pytest.FixtureRequest) -> Processes | None:
    """Those of other tests, which need the very ones that the long form kills."""
    return None if LONG else request.getfixturevalue("stack").processes


async def test_nothing_is_lost_whatever_breaks(running: Processes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "STOP_S", (9.0, 9.5))  # longer than it takes to notice
    monkeypatch.setattr(chaos, "PAUSE_S", (0.2, 0.5))
    monkeypatch.setattr(chaos, "RECOVERY_S", 900.0)  # other tests may run beside it
    plan = dict.fromkeys(SHORT, 1)
    result = await faults(plan, seconds=1500, clients=2, tokens=400, preset="fp16", spare=0, seed=3, running=running)
    jsonschema.validate(json.loads(result.model_dump_json()), json.loads(SCHEMA.read_text()))
    assert result.whole, (sentence(result), result.damages)
    assert {Fault(row.role, row.how): row.times for row in result.faults} == plan
    assert result.verdict.tokens > 100
