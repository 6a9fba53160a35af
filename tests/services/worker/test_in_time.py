"""Exceptions in time on a worker: the setting, the quality figure of every token, and the metrics."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY
from pydantic import ValidationError
from qaq.v1 import common_pb2
from qaq.v1.common_pb2 import OutputParams

from qaq_core.models import LoadedModel
from services.common.settings import WorkerSettings
from services.worker.methods import Methods
from tests.services.worker.conftest import EXACT, STORY, Ids, MakeScheduler, outcome, request

LOW = common_pb2.CacheParams(preset="balanced", target_bits=0.5)
"""So few that some rows cost a step more than is accepted; the first layers alone cost less than the whole model."""


def sample(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


@pytest.mark.parametrize("speculative_tokens", [0, 3])
async def test_every_decoded_token_has_its_error(
    make_scheduler: MakeScheduler, ids: Ids, speculative_tokens: int
) -> None:
    names = ("qaq_predicted_error_count", "qaq_rows_corrected_total")
    before = [sample(name) for name in names]
    sent: list[common_pb2.Token] = []
    settings = {"exceptions": "in-time", "requantize_wait": True, "speculative_tokens": speculative_tokens}
    async with make_scheduler(**settings) as scheduler:
        wanted = request(ids(STORY * 6), 10, cache=LOW, output=OutputParams(logprobs=True))
        done = await outcome(scheduler.submit(wanted), sent)
    first, *others = [token.info for token in sent]
    assert not first.HasField("predicted_error"), "the prompt is computed in full precision"
    assert len(others) == 9
    assert all(info.predicted_error > 0 for info in others)
    decoded, corrected = (sample(name) - was for name, was in zip(names, before, strict=True))
    assert decoded == 9
    assert corrected > 0
    assert done.done is not None


@pytest.mark.parametrize(("exceptions", "cache"), [("async", LOW), ("in-time", EXACT)])
async def test_without_them_a_token_has_none(
    make_scheduler: MakeScheduler, ids: Ids, exceptions: str, cache: common_pb2.CacheParams
) -> None:
    sent: list[common_pb2.Token] = []
    async with make_scheduler(exceptions=exceptions) as scheduler:
        wanted = request(ids(STORY), 3, cache=cache, output=OutputParams(logprobs=True))
        await outcome(scheduler.submit(wanted), sent)
    assert len(sent) == 3
    assert not any(token.info.HasField("predicted_error") for token in sent)


def test_the_setting_reaches_the_methods(smollm2: LoadedModel) -> None:
    paper = common_pb2.CacheParams(preset="paper")
    for setting, reviewed in (("off", False), ("async", True), ("in-time", True)):
        methods = Methods(smollm2, WorkerSettings(model="smollm2", exceptions=setting))
        assert methods.get(LOW).policy.exceptions == reviewed
        assert (methods.get(LOW).in_time is not None) == (setting == "in-time")
        assert methods.get(paper).policy.exceptions == reviewed
        assert methods.get(paper).in_time is None
        methods.close()
    with pytest.raises(ValidationError, match="exceptions"):
        WorkerSettings(model="smollm2", exceptions="sometimes")
