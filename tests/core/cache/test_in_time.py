"""Exceptions in time: what a step looks at is exchanged before its layers end, within bounds, and nothing else."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qaq_core.allocation.requantize import Requantizer
from qaq_core.base.errors import ConfigError, OriginalsError
from qaq_core.base.rows import RowReply, RowRequest
from qaq_core.cache import in_time
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.in_time import InTimeLimits
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.kernels import load_library
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.storage.originals import InProcessOriginals
from tests.core.tiny_models import calibration, teacher_forced, tiny, token_ids

PROMPT, STEPS, KIND = 150, 24, "llama-gqa"
ALL = InTimeLimits(least_error=0.0, most_bytes=1 << 30, most_seconds=60)
KERNELS = [
    pytest.param("cpu", marks=pytest.mark.skipif(load_library() is None, reason="the C++ library is not built")),
    "reference",
]


def made(exceptions: object = "in-time", kind: str = KIND, **settings: Any) -> tuple[Any, Method]:
    model = tiny(kind)
    settings = {"target_bits": 1.5, "page_tokens": 16, "calibration": calibration(kind), **settings}
    return model, make_method(model, preset="balanced", exceptions=exceptions, **settings)


def decoded(model: Any, sequence: SequenceCache, seed: int = 0) -> torch.Tensor:
    """Log probabilities [STEPS + 1, vocabulary]."""
    return teacher_forced(model, token_ids(PROMPT + STEPS, seed), PROMPT, QAQCache([sequence])).log_softmax(-1)


@torch.no_grad()
def divergence(exceptions: object, kernel: str, kind: str = KIND) -> tuple[float, SequenceCache]:
    """Mean KL of a decoded token, and the sequence."""
    model, method = made(exceptions, kind, kernel=kernel)
    sequence = SequenceCache(method, wait=True)
    seen = decoded(model, sequence)[1:]
    exact = teacher_forced(model, token_ids(PROMPT + STEPS), PROMPT, DynamicCache()).log_softmax(-1)[1:]
    return float((exact.exp() * (exact - seen)).sum(-1).mean()), sequence


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["llama-gqa", "mistral-sliding"])
def test_what_is_corrected_is_full_precision(kind: str, kernel: str) -> None:
    without, plain = divergence("async", kernel, kind)
    some, bounded = divergence("in-time", kernel, kind)
    everything, corrected = divergence(ALL, kernel, kind)
    assert some < without
    assert everything < without / 30, "the rest is the residual window's rounding"
    assert abs(corrected.nbytes - plain.nbytes) < 0.02 * plain.nbytes, "nothing that is held has changed"
    assert plain.stats().rows_corrected == 0
    assert 0 < bounded.stats().rows_corrected < corrected.stats().rows_corrected
    assert corrected.predicted_errors == [pytest.approx(0.0, abs=1e-6)]
    assert bounded.predicted_errors[0] > 0
    assert plain.predicted_errors == []


@torch.no_grad()
def test_kernels_agree() -> None:
    results = []
    for kernel in ("cpu", "reference"):
        model, method = made(kernel=kernel)
        sequence = SequenceCache(method, wait=True)
        results.append((decoded(model, sequence), sequence.stats().rows_corrected, sequence.predicted_errors[0]))
    (one, rows, error), (other, other_rows, other_error) = results
    assert torch.allclose(one, other, atol=2e-2)
    assert rows == pytest.approx(other_rows, rel=0.02)
    assert error == pytest.approx(other_error, rel=0.05)


@torch.no_grad()
def test_the_same_again() -> None:
    model, method = made()
    runs = [decoded(model, SequenceCache(method, wait=True)) for _ in range(2)]
    assert torch.equal(*runs)


@torch.no_grad()
def forward(model: Any, sequence: SequenceCache, ids: list[int]) -> torch.Tensor:
    positions = torch.arange(sequence.length, sequence.length + len(ids))[None]
    logits: torch.Tensor = model(torch.tensor([ids]), past_key_values=QAQCache([sequence]), position_ids=positions)
    return logits.logits[0]


@torch.no_grad()
def test_generate_is_the_sequence() -> None:
    model, method = made()
    ids = token_ids(PROMPT)
    cache = QAQCache(method=method)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    sequence = SequenceCache(method)
    logits, tokens = forward(model, sequence, ids[0].tolist())[-1], []
    for _ in range(12):
        logits[model.config.eos_token_id] = float("-inf")  # `generate` goes on, too
        tokens.append(int(logits.argmax()))
        logits = forward(model, sequence, tokens[-1:])[-1]
    assert out[0, PROMPT:].tolist() == tokens
    assert cache.stats()[0].rows_corrected > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_drafts_are_corrected_as_decode_is(kernel: str) -> None:
    model, method = made(kernel=kernel)
    plain, drafted = (SequenceCache(method, wait=True) for _ in range(2))
    ids = token_ids(PROMPT + STEPS)[0].tolist()
    for sequence in (plain, drafted):
        forward(model, sequence, ids[:PROMPT])
    expected, errors = [], []
    for token in ids[PROMPT:]:
        expected.append(forward(model, plain, [token])[0])
        errors += plain.predicted_errors
    seen: list[torch.Tensor] = []
    while len(seen) < STEPS:
        room, at = min(drafted.draft_room, STEPS - len(seen)), len(seen)
        right = max(1, room - at % 2)
        draft = ids[drafted.length : drafted.length + right] + [5] * (room - right)
        drafted.expect_draft(len(draft))
        rows = forward(model, drafted, draft)
        assert drafted.predicted_errors[:right] == pytest.approx(errors[at : at + right], rel=1e-3, abs=1e-7)
        drafted.accept(right)
        assert len(drafted.predicted_errors) == right
        seen += rows[:right]
    assert torch.allclose(torch.stack(seen), torch.stack(expected), atol=1e-3)
    assert len(drafted.importance.log_sums) == 0


@torch.no_grad()
def test_a_fork_and_a_cropped_sequence_go_on() -> None:
    model, method = made()
    ids = token_ids(PROMPT + STEPS)[0].tolist()
    first = SequenceCache(method, wait=True)
    forward(model, first, ids[:PROMPT])
    for token in ids[PROMPT : PROMPT + 6]:
        forward(model, first, [token])
    second = first.fork()
    assert second.stats().rows_corrected == 0
    for token in ids[PROMPT + 6 : PROMPT + 20]:
        one, other = (forward(model, sequence, [token]) for sequence in (first, second))
        assert torch.equal(one, other)
    assert second.stats().rows_corrected > 0
    second.crop(PROMPT - 40)
    assert all(place[2] < second.packed.stop for place in second.in_time._kept)  # type: ignore[union-attr]
    again = [forward(model, second, [token]) for token in ids[PROMPT - 40 :]]
    assert bool(torch.stack(again).isfinite().all())
    second.crop(0)
    forward(model, second, ids[:PROMPT])
    assert bool(forward(model, second, [7]).isfinite().all())
    first.close()
    assert not first.in_time._kept  # type: ignore[union-attr]


@torch.no_grad()
def test_in_a_batch_each_is_as_alone() -> None:
    model, method = made()
    seeds = (1, 2, 3)
    alone = [decoded(model, SequenceCache(method, wait=True), seed)[1:] for seed in seeds]
    batch = [SequenceCache(method, wait=True) for _ in seeds]
    for seed, sequence in zip(seeds, batch, strict=True):
        forward(model, sequence, token_ids(PROMPT + STEPS, seed)[0, :PROMPT].tolist())
    for step in range(STEPS):
        ids = torch.cat([token_ids(PROMPT + STEPS, seed)[:, PROMPT + step : PROMPT + step + 1] for seed in seeds])
        positions = torch.full((len(seeds), 1), PROMPT + step)
        logits = model(ids, past_key_values=QAQCache(batch), position_ids=positions).logits[:, -1].log_softmax(-1)
        for row, one in zip(logits, alone, strict=True):
            assert torch.allclose(row, one[step], atol=2e-3)
    assert all(sequence.stats().rows_corrected for sequence in batch)


@torch.no_grad()
def test_a_step_fetches_at_most_so_many_bytes() -> None:
    limits = InTimeLimits(least_error=0.0, most_bytes=1000)
    model, method = made(limits)
    sequence = SequenceCache(method, wait=True)
    ids = token_ids(PROMPT + STEPS)[0].tolist()
    forward(model, sequence, ids[:PROMPT])
    for token in ids[PROMPT:]:
        before = sequence.stats()
        forward(model, sequence, [token])
        corrected = sequence.stats().rows_corrected - before.rows_corrected
        assert 0 < corrected * limits.width * method.shape.head_dim // 16 <= 1000


class Silent(InProcessOriginals):
    """A store that never answers for rows, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.asked, self._error = 0, error

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
        self.asked += 1
        future: Future[RowReply] = Future()
        if self._error is not None:
            future.set_exception(self._error)
        return future


@torch.no_grad()
@pytest.mark.parametrize("error", [None, OriginalsError("gone")], ids=["silent", "failed"])
def test_it_does_not_wait_for_a_store_that_does_not_answer(
    error: Exception | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_time._warn_late.cache_clear()
    waited = []
    result = Future.result
    monkeypatch.setattr(Future, "result", lambda self, timeout=None: waited.append(timeout) or result(self, timeout))
    model, method = made(InTimeLimits(least_error=0.0, most_seconds=0.01, pause=5))
    store = Silent(error)
    sequence = SequenceCache(method, store)
    monkeypatch.setattr(Requantizer, "review", lambda *_, **__: None)  # it asks, too
    with caplog.at_level(logging.WARNING):
        decoded(model, sequence)
    counts = sequence.requantizer.counts
    assert 1 <= store.asked <= -(-STEPS // 6), "a step that got no answer is followed by some that do not ask"
    assert all(timeout is None or timeout <= 0.01 for timeout in waited)
    assert (counts.corrections_late > 0) == (error is None)
    assert counts.requests_failed == (store.asked if error else 0)
    assert caplog.text.count("did not come within") == (error is None)


@torch.no_grad()
def test_what_the_store_has_lost_is_counted() -> None:
    model, method = made(InTimeLimits(least_error=0.0))
    store = InProcessOriginals()
    sequence = SequenceCache(method, store, wait=True)
    ids = token_ids(PROMPT + 2)[0].tolist()
    forward(model, sequence, ids[:PROMPT])
    store._pages.clear()
    forward(model, sequence, ids[PROMPT : PROMPT + 1])
    assert sequence.stats().originals_missing > 0
    assert sequence.in_time is not None
    assert sequence.in_time._paused_until > PROMPT + 1


@torch.no_grad()
def test_rows_that_are_looked_at_again_are_not_asked_for_again() -> None:
    model, method = made(InTimeLimits(least_error=0.0, most_bytes=1 << 30))
    store = InProcessOriginals()
    sequence, other = SequenceCache(method, store, wait=True), SequenceCache(method, store, wait=True)
    other.in_time.limits = InTimeLimits(least_error=0.0, most_bytes=1 << 30, kept_bytes=0)  # type: ignore[union-attr]
    ids = token_ids(PROMPT + 8)[0].tolist()
    asked = []
    for one in (sequence, other):
        forward(model, one, ids[:PROMPT])
        count = 0
        requantize = one.staging.requantize

        def counting(request: RowRequest, quantizer: Quantizer, own: Any = requantize) -> Any:
            nonlocal count
            count += len(request)
            return own(request, quantizer)

        one.staging.requantize = counting  # type: ignore[method-assign]
        for token in ids[PROMPT:]:
            forward(model, one, [token])
        asked.append(count)
    assert asked[0] < asked[1] / 2
    assert sequence.stats().rows_corrected == other.stats().rows_corrected
    assert not other.in_time._kept  # type: ignore[union-attr]


@torch.no_grad()
def test_short_sequences_have_nothing_to_correct() -> None:
    model, method = made()
    sequence = SequenceCache(method)
    forward(model, sequence, [3, 4, 5])
    assert sequence.predicted_errors == []
    forward(model, sequence, [6])
    assert sequence.predicted_errors == [0.0]
    assert sequence.stats().rows_corrected == 0


@torch.no_grad()
def test_the_elastic_price_may_rise() -> None:
    model, method = made()
    sequence = SequenceCache(method, wait=True)
    ids = token_ids(PROMPT + STEPS)[0].tolist()
    forward(model, sequence, ids[:PROMPT])
    forward(model, sequence, ids[PROMPT : PROMPT + 1])
    before, held = sequence.stats().rows_corrected, sequence.packed.mean_bits
    sequence.set_lambda_floor(100 * sequence.rate.value)
    assert sequence.packed.mean_bits < held
    forward(model, sequence, ids[PROMPT + 1 : PROMPT + 2])
    assert sequence.stats().rows_corrected > before


@pytest.mark.parametrize("setting", ["sometimes", "in time", 1, None])
def test_another_setting_is_refused(setting: object) -> None:
    with pytest.raises(ConfigError, match="exceptions"):
        made(setting)


def test_the_setting_says_when() -> None:
    policies = {setting: made(setting)[1] for setting in (True, False, "async", "off", "in-time")}
    assert {setting: method.policy.exceptions for setting, method in policies.items()} == {
        True: True,
        False: False,
        "async": True,
        "off": False,
        "in-time": True,
    }
    assert [setting for setting, method in policies.items() if method.in_time is not None] == ["in-time"]
