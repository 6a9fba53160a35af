"""The short form of `make faults`, under streams. What it leaves out is broken in the other files of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from qaq_eval.serving import chaos
from qaq_eval.serving.chaos import Fault
from qaq_eval.serving.chaos_result import ChaosResult, sentence
from tests.faults.__main__ import faults

SCHEMA = Path(__file__).parents[2] / "qaq_eval" / "schemas" / "bench_chaos.json"


SHORT = [
    Fault("Redis", "killed"),
    Fault("cache service", "killed"),
    Fault("router", "stopped"),
    Fault("worker", "stopped"),
    Fault("worker", "killed"),
]


async def test_nothing_is_lost_whatever_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "STOP_S", (9.0, 9.5))  # longer than it takes to notice
    monkeypatch.setattr(chaos, "PAUSE_S", (0.2, 0.5))
    monkeypatch.setattr(chaos, "RECOVERY_S", 900.0)  # other tests may run beside it
    plan = dict.fromkeys(SHORT, 1)
    result = await faults(plan, seconds=1500, clients=2, tokens=400, preset="fp16", spare=0, seed=3)
    jsonschema.validate(json.loads(result.model_dump_json()), json.loads(SCHEMA.read_text()))
    assert result.whole, (sentence(result), result.damages)
    assert {Fault(row.role, row.how): row.times for row in result.faults} == plan
    assert result.verdict.tokens > 100


def test_runs_are_added_up() -> None:
    row = {
        "role": "worker",
        "how": "killed",
        "times": 1,
        "streams_lost": 0,
        "tokens_lost": 2,
        "tokens_repeated": 0,
        "gap_median_seconds": 1.0,
        "gap_worst_seconds": 1.0,
        "gaps_seconds": [1.0],
    }
    verdict = dict.fromkeys(
        ("streams", "finished", "tokens", "streams_lost", "tokens_lost", "tokens_repeated", "tokens_out_of_order"), 1
    )
    one = ChaosResult.model_validate(
        {
            "clients": 8,
            "stream_tokens": 100,
            "preset": "fp16",
            "workers": 3,
            "routers": 2,
            "seconds": 60.0,
            "faults": [row],
            "verdict": {**verdict, "wrong_ends": 0},
            "refused": 1,
            "not_whole": None,
            "damages": ["lost"],
        }
    )
    slower = {**row, "gap_median_seconds": 3.0, "gap_worst_seconds": 3.0, "gaps_seconds": [3.0]}
    both = one + one.model_copy(update={"faults": [one.faults[0].model_validate(slower)]})
    (added,) = both.faults
    assert (added.times, added.tokens_lost, added.gaps_seconds) == (2, 4, [1.0, 3.0])
    assert (added.gap_median_seconds, added.gap_worst_seconds) == (2.0, 3.0)
    assert (both.seconds, both.refused, both.verdict.tokens_lost, both.damages) == (120.0, 2, 2, ["lost", "lost"])
    assert both.times(Fault("worker", "killed")) == 2
    assert not both.whole
