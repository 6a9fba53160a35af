"""A cropped sequence goes on as if its tail had never been."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qaq_core.base.errors import ConfigError, OriginalsError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.storage.originals import InProcessOriginals
from tests.core.allocation.test_requantize import LENGTH, LateOriginals, Subject
from tests.core.cache.test_sequence import agrees_with_originals
from tests.core.rows import normal
from tests.core.tiny_models import calibration, teacher_forced, tiny, token_ids

pytestmark = pytest.mark.slow

KIND, PAGE = "llama-gqa", 16
SETTINGS: dict[str, dict[str, object]] = {
    "balanced": {"target_bits": 2.5},
    "paper": {"attention_window": 3},
    "fp16": {},
}


def made(preset: str) -> tuple[Any, Method]:
    model = tiny(KIND)
    own = {} if preset == "fp16" else {"calibration": calibration(KIND)}
    return model, make_method(model, preset=preset, page_tokens=PAGE, **own, **SETTINGS[preset])


def run(model: Any, sequence: SequenceCache, prompt: torch.Tensor, decoded: torch.Tensor | None = None) -> torch.Tensor:
    """Logits after a prompt and after each token that is decoded behind it, all [1, n]."""
    ids = prompt if decoded is None else torch.cat([prompt, decoded], 1)
    return teacher_forced(model, ids, prompt.shape[1], QAQCache([sequence]))


def packed_at(length: int) -> int:
    """Tokens that a sequence of a length has packed, however it got there."""
    return max(0, (length - 4) // 8 - 1) * 8


@given(prompt=st.integers(2, 90), decoded=st.integers(0, 40), gone=st.integers(0, 130), seed=st.integers(0, 9))
@example(prompt=60, decoded=0, gone=1, seed=0)
@example(prompt=60, decoded=0, gone=60, seed=0)
@example(prompt=17, decoded=20, gone=33, seed=0)
def test_what_is_appended_sees_what_it_would_have_seen(prompt: int, decoded: int, gone: int, seed: int) -> None:
    model, method = made("fp16")
    ids, other = token_ids(prompt + decoded, seed), token_ids(30, seed + 100)
    left = max(0, prompt + decoded - gone)
    store = InProcessOriginals()
    cropped, never = SequenceCache(method, store), SequenceCache(method)
    run(model, cropped, ids[:, :prompt], ids[:, prompt:])
    cropped.crop(left)
    if left:
        run(model, never, ids[:, : min(left, prompt)], ids[:, min(left, prompt) : left])
    for sequence in (cropped, never):
        assert sequence.length == sequence.staging.tokens == left
        assert len(sequence.packed) == packed_at(left)
        assert sequence.residual.held == left - packed_at(left)
    assert cropped.nbytes <= never.nbytes or not left
    assert cropped.staging_bytes == never.staging_bytes
    wanted, got = (run(model, each, other[:, :1], other[:, 1:]) for each in (never, cropped))
    assert float((got - wanted).abs().max()) < 2e-3
    assert torch.allclose(cropped.staging.read(0, left), never.staging.read(0, left), atol=2e-3)
    cropped.close()
    assert store.nbytes == 0


@given(prompt=st.integers(30, 120), decoded=st.integers(0, 30), gone=st.integers(1, 60))
@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_tokens_that_stay_packed_are_not_touched(preset: str, prompt: int, decoded: int, gone: int) -> None:
    model, method = made(preset)
    ids, other = token_ids(prompt + decoded + 40), token_ids(40, seed=5)
    sequence = SequenceCache(method, wait=True)
    run(model, sequence, ids[:, :prompt], ids[:, prompt : prompt + decoded])
    left = max(1, sequence.length - gone)
    kept, before, whole = packed_at(left), sequence.nbytes, sequence.packed.copy()
    sequence.crop(left)
    assert len(sequence.packed) == kept
    assert sequence.nbytes < before
    for side in (KEY, VALUE):
        assert torch.equal(sequence.packed.widths(side), whole.widths(side)[:, :, :kept])
        if kept:
            attention, dims = method.attention, range(method.shape.layers)
            reference = getattr(attention, "_reference", attention)
            for layer in dims:
                rows = reference.unpack(whole, side, layer)[:, :kept]
                assert torch.equal(reference.unpack(sequence.packed, side, layer), rows)
    assert not bool(sequence.importance.state[:, :, left:].any())
    logits = run(model, sequence, other[:, :1], other[:, 1:])
    assert bool(torch.isfinite(logits).all())
    assert len(sequence.packed) == packed_at(left + 40)
    assert sequence.rate.own is not None
    if kept and preset == "balanced":
        agrees_with_originals(sequence)


def test_what_becomes_recent_again_is_the_original() -> None:
    model, method = made("balanced")
    sequence, never = SequenceCache(method), SequenceCache(method)
    ids = token_ids(100)
    run(model, sequence, ids)
    run(model, never, ids[:, :67])
    sequence.crop(67)
    assert torch.allclose(
        sequence.residual._buffer[:, :, :, : sequence.residual.held],
        never.residual._buffer[:, :, :, : never.residual.held],
        atol=2e-3,
    )


def test_a_sequence_of_nothing_is_new() -> None:
    model, method = made("balanced")
    store = InProcessOriginals()
    used, fresh = SequenceCache(method, store), SequenceCache(method)
    run(model, used, token_ids(100))
    used.crop(0)
    assert (used.nbytes, used.exact_prefix, store.nbytes) == (used.residual.nbytes, 0, 0)
    ids = token_ids(80, seed=3)
    assert torch.equal(run(model, used, ids), run(model, fresh, ids))
    assert (used.exact_prefix, used.rate.own) == (80, fresh.rate.own)
    assert used.bits(KEY).equal(fresh.bits(KEY))


def test_an_exact_prefix_is_only_what_is_left_of_it() -> None:
    model, method = made("fp16")
    sequence = SequenceCache(method)
    run(model, sequence, token_ids(60), token_ids(5))
    sequence.crop(50)
    assert sequence.exact_prefix == 50
    run(model, sequence, token_ids(40))
    assert sequence.exact_prefix == 50


def test_originals_that_are_lost_are_told_and_nothing_is_cropped() -> None:
    model, method = made("balanced")
    store = InProcessOriginals()
    sequence = SequenceCache(method, store)
    run(model, sequence, token_ids(100))
    before, names = sequence.stats(), list(sequence.staging.names)
    store.forget(names[3:5])
    with pytest.raises(OriginalsError, match="compute the sequence again"):
        sequence.crop(70)
    assert (sequence.stats(), sequence.staging.names, sequence.length) == (before, names, 100)
    run(model, sequence, token_ids(1))
    sequence.crop(96)  # needs other pages
    assert sequence.length == 96


def test_rows_that_were_cropped_are_not_widened_when_others_are_there() -> None:
    """A reply for tokens that are gone must not reach those that took their positions."""
    originals = LateOriginals()
    subject = Subject(originals)
    sequence, shape = subject.sequence, subject.method.shape
    subject.review(attention=1e-4, elsewhere=1.0)
    positions = originals.waiting[0][0].position
    assert positions.min() < 100 < positions.max()
    replies = [
        (future, InProcessOriginals.requantize(originals, request, quantizer).result(0))
        for request, quantizer, future in originals.waiting
    ]
    sequence.crop(110)
    for layer in range(shape.layers):
        sequence.take(layer, *normal(77 + layer, 2, shape.kv_heads, LENGTH - 110, shape.head_dim))
    sequence.commit()
    before = [sequence.packed.widths(side) for side in (KEY, VALUE)]
    for future, reply in replies:
        future.set_result(reply)
    originals.prompt = True
    subject.requantizer.apply()
    kept = packed_at(110)
    for side in (KEY, VALUE):
        after = sequence.packed.widths(side)
        assert torch.equal(after[:, :, kept:], before[side][:, :, kept:])
        assert bool((after[:, :, :kept] > before[side][:, :, :kept]).any())
    agrees_with_originals(sequence)


def test_not_while_a_prompt_arrives_and_not_below_nothing() -> None:
    _, method = made("fp16")
    sequence = SequenceCache(method)
    with pytest.raises(ConfigError, match="negative"):
        sequence.crop(-1)
    sequence.crop(5)  # longer than it is
    sequence.expect_prompt(50)
    with pytest.raises(ConfigError, match="forward pass has not ended"):
        sequence.crop(10)
