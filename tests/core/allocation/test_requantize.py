"""Exceptions: need that rises brings bits back from the originals, need that falls gives them up."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch

from qaq_core.allocation.allocator import TokenState
from qaq_core.allocation.attention_statistics import to_log_byte
from qaq_core.allocation.requantize import RETRY_AFTER_REVIEWS, Requantizer
from qaq_core.attention import LayerInput
from qaq_core.base.errors import OriginalsError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.rows import RowReply, RowRequest
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.storage.originals import InProcessOriginals
from tests.core.cache.test_sequence import agrees_with_originals
from tests.core.rows import normal
from tests.core.tiny_models import calibration, tiny

LENGTH = 132  # 4 sinks, 120 packed, 8 recent
OLD = 20
"""A position among the packed ones that attention comes back to."""


class LateOriginals(InProcessOriginals):
    """A real store whose answers arrive when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = False
        self.waiting: list[tuple[RowRequest, Quantizer, Future[RowReply]]] = []

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
        if self.prompt:
            return super().requantize(request, quantizer)
        self.waiting.append((request, quantizer, Future()))
        return self.waiting[-1][2]

    def answer(self) -> None:
        for request, quantizer, future in self.waiting:
            future.set_result(super().requantize(request, quantizer).result(0))
        self.waiting.clear()

    def fail(self) -> None:
        for _, _, future in self.waiting:
            future.set_exception(OriginalsError("gone"))
        self.waiting.clear()


class Subject:
    """A sequence with packed tokens, and attention as the test wants it."""

    def __init__(self, originals: InProcessOriginals, preset: str = "balanced", wait: bool = False) -> None:
        kind = "llama-gqa"
        settings = {"target_bits": 2.2} if preset == "balanced" else {}
        self.method = make_method(tiny(kind), preset=preset, calibration=calibration(kind), **settings)
        self.sequence = SequenceCache(self.method, originals, wait=wait)
        shape = self.method.shape
        for layer in range(shape.layers):
            keys, values = normal(layer, 2, shape.kv_heads, LENGTH, shape.head_dim)
            query = normal(10 + layer, shape.query_heads, LENGTH, shape.head_dim)
            self.sequence.attend(LayerInput(layer, query, keys, values, 0.1, None))
        self.sequence.commit()

    @property
    def requantizer(self) -> Requantizer:
        return self.sequence.requantizer

    def review(self, attention: float, elsewhere: float = 1e-4) -> TokenState:
        """Looks at the tokens as if one old position had got that much attention everywhere."""
        kept = self.sequence.packed_state()
        importance = torch.full(kept.state.shape, elsewhere)
        importance[:, :, OLD] = attention
        assert self.sequence.rate.own is not None
        seen = replace(kept, state=to_log_byte(importance))
        self.requantizer.review(seen, self.sequence.rate.own)
        return seen

    def widths(self, side: int) -> torch.Tensor:
        """[layers, kv_heads] at the old position."""
        return self.sequence.packed.widths(side)[:, :, OLD - 4].clone()


def test_attention_that_comes_back_to_an_old_token_raises_its_width() -> None:
    """Through the real path: the keys of one old token meet a query that looks at nothing else."""
    subject = Subject(InProcessOriginals())
    sequence, shape = subject.sequence, subject.method.shape
    before = subject.widths(VALUE)
    target = [normal(layer, 2, shape.kv_heads, LENGTH, shape.head_dim)[0][:, OLD] for layer in range(shape.layers)]
    for _ in range(24):
        for layer in range(shape.layers):
            query = 5 * target[layer].repeat_interleave(shape.query_heads // shape.kv_heads, 0).unsqueeze(1)
            keys, values = normal(99, 2, shape.kv_heads, 1, shape.head_dim) * 0.1
            sequence.attend(LayerInput(layer, query, keys, values, 1.0, None))
        sequence.commit()
    counts = subject.requantizer.counts
    assert bool((subject.widths(VALUE) > before).all())
    assert counts.exceptions >= counts.rows_requantized > 0
    assert counts.requantize_bytes > 0
    assert counts.rows_narrowed > 0
    assert (counts.originals_missing, counts.requests_failed) == (0, 0)
    agrees_with_originals(sequence)


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_rows_and_bytes_are_counted(preset: str) -> None:
    subject = Subject(InProcessOriginals(), preset)
    subject.review(attention=1e-5)  # everything settles
    held = [subject.sequence.packed.widths(side).long() for side in (KEY, VALUE)]
    counts = replace(subject.requantizer.counts)
    bytes_before = subject.sequence.packed.nbytes
    subject.review(attention=1.0)
    after = [subject.sequence.packed.widths(side).long() for side in (KEY, VALUE)]
    gained = [(new - old).clamp_min(0) for new, old in zip(after, held, strict=True)]
    lost = [(old - new).clamp_min(0) for new, old in zip(after, held, strict=True)]
    half_bit = subject.method.shape.head_dim // 16
    now = subject.requantizer.counts
    rows = sum(int((g > 0).sum()) for g in gained)
    assert rows > 0
    assert now.exceptions - counts.exceptions == now.rows_requantized - counts.rows_requantized == rows
    assert now.requantize_bytes - counts.requantize_bytes == half_bit * sum(int(g.sum()) for g in gained)
    assert now.rows_narrowed - counts.rows_narrowed == sum(int((x > 0).sum()) for x in lost)
    change = half_bit * sum(int(g.sum()) - int(x.sum()) for g, x in zip(gained, lost, strict=True))
    assert subject.sequence.packed.nbytes == bytes_before + change
    agrees_with_originals(subject.sequence)


def test_a_row_that_rises_gets_what_a_larger_importance_would_be_worth() -> None:
    subject = Subject(InProcessOriginals())
    policy, allocator = subject.method.policy, subject.method.allocator
    before = [subject.sequence.packed.widths(side) for side in (KEY, VALUE)]
    kept = subject.review(attention=1.0)
    want = allocator.widths(allocator.demand(kept), subject.sequence.rate.own, need=policy.rise)
    for side in (KEY, VALUE):
        after = subject.sequence.packed.widths(side)
        risen = after > before[side]
        assert risen.any()
        assert torch.equal(after[risen], want[side][risen])
    assert policy.rise > 1


def test_rows_packed_from_the_rounded_window_come_back_whole() -> None:
    """Half-precision recent tokens make codes that may differ from the float32 originals'."""
    originals = LateOriginals()
    subject = Subject(originals)
    sequence, shape = subject.sequence, subject.method.shape
    originals.prompt = True
    for step in range(40):
        for layer in range(shape.layers):
            query, keys, values = normal(1000 + 10 * step + layer, 3, shape.query_heads, 1, shape.head_dim)
            sequence.attend(LayerInput(layer, query, keys[: shape.kv_heads], values[: shape.kv_heads], 0.1, None))
        sequence.commit()
    position = sequence.packed.stop - 2
    assert position >= sequence.requantizer.rounded_from
    originals.prompt = False
    kept = sequence.packed_state()
    importance = torch.full(kept.state.shape, 1e-6)
    importance[:, :, position] = 1.0
    assert sequence.rate.own is not None
    subject.requantizer.review(replace(kept, state=to_log_byte(importance)), sequence.rate.own)
    rounded = [request.have[request.position >= sequence.requantizer.rounded_from] for request, *_ in originals.waiting]
    assert sum(map(len, rounded)) + subject.requantizer.counts.rows_requantized > 0
    assert not any(have.any() for have in rounded)
    originals.answer()
    subject.requantizer.apply()
    originals.prompt = True
    agrees_with_originals(sequence, at=position)


def test_without_waiting_decode_goes_on_with_the_old_bits() -> None:
    originals = LateOriginals()
    subject = Subject(originals)
    before = subject.widths(VALUE)
    subject.review(attention=1.0)
    assert subject.requantizer.pending
    asked = subject.requantizer.counts.exceptions
    assert asked == sum(len(request) for request, _, _ in originals.waiting) > 0
    assert torch.equal(subject.widths(VALUE), before)
    subject.review(attention=1.0)  # one request at a time
    assert subject.requantizer.counts.exceptions == asked
    originals.answer()
    assert torch.equal(subject.widths(VALUE), before)  # applied between steps, not when it arrives
    subject.requantizer.apply()
    assert bool((subject.widths(VALUE) > before).all())
    assert subject.requantizer.counts.rows_requantized == asked
    assert not subject.requantizer.pending


def test_with_wait_a_step_blocks_until_the_rows_are_there() -> None:
    class Answering(LateOriginals):
        """Answers while the caller waits for the result."""

        def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
            store = self

            class Waited(Future[RowReply]):
                def result(self, timeout: float | None = None) -> RowReply:
                    store.answer()
                    return super().result(timeout)

            self.waiting.append((request, quantizer, Waited()))
            return self.waiting[-1][2]

    subject = Subject(Answering(), wait=True)
    before = subject.widths(VALUE)
    subject.review(attention=1.0)
    assert not subject.requantizer.pending
    assert bool((subject.widths(VALUE) > before).all())


def test_a_failed_answer_is_counted_and_the_bits_stay() -> None:
    originals = LateOriginals()
    subject = Subject(originals)
    subject.review(attention=1.0)
    widths = [subject.sequence.packed.widths(side) for side in (KEY, VALUE)]
    originals.fail()
    subject.requantizer.apply()
    counts = subject.requantizer.counts
    assert (counts.requests_failed, counts.rows_requantized, counts.requantize_bytes) == (1, 0, 0)
    assert all(torch.equal(subject.sequence.packed.widths(side), widths[side]) for side in (KEY, VALUE))
    for _ in range(RETRY_AFTER_REVIEWS):
        subject.review(attention=1.0)
        assert not originals.waiting
    subject.review(attention=1.0)  # and they are asked for again, after a while
    assert originals.waiting
    originals.answer()
    subject.requantizer.apply()
    assert counts.rows_requantized > 0


def test_missing_originals_are_counted_and_the_others_widened() -> None:
    originals = InProcessOriginals()
    subject = Subject(originals)
    gone = subject.sequence.staging.names[OLD // 32]
    originals.forget([gone])
    before = subject.widths(VALUE)
    subject.review(attention=1.0, elsewhere=0.01)
    counts = subject.requantizer.counts
    assert torch.equal(subject.widths(VALUE), before)
    assert counts.originals_missing > 0
    assert counts.exceptions == counts.originals_missing + counts.rows_requantized


def test_a_row_that_was_narrowed_while_its_planes_were_under_way_stays_as_it_is() -> None:
    originals = LateOriginals()
    subject = Subject(originals)
    sequence = subject.sequence
    subject.review(attention=1.0)
    asked, _, _ = originals.waiting[0]
    assert int((asked.have > 1).sum()) > 0
    subject.review(attention=1e-12, elsewhere=1e-3)
    moved = [sequence.packed.widths(side) for side in (KEY, VALUE)]
    where = (asked.layer.astype(int), asked.head.astype(int), asked.position - sequence.packed.start)
    held = np.where(asked.side == KEY, moved[KEY].numpy()[where], moved[VALUE].numpy()[where])
    narrowed = held < asked.have
    originals.answer()
    subject.requantizer.apply()
    after = [sequence.packed.widths(side).numpy()[where] for side in (KEY, VALUE)]
    now = np.where(asked.side == KEY, after[KEY], after[VALUE])
    assert np.array_equal(now[narrowed], held[narrowed])
    assert np.array_equal(now[~narrowed], asked.want[~narrowed])
    assert narrowed.any()
    assert subject.requantizer.counts.rows_requantized == int((~narrowed).sum())
    originals.prompt = True
    agrees_with_originals(sequence)


def test_rows_on_the_growing_page_are_answered_from_staging() -> None:
    kind = "llama-gqa"
    originals = LateOriginals()
    method = make_method(tiny(kind), calibration=calibration(kind), page_tokens=256)
    subject = Subject(originals)
    subject.sequence = SequenceCache(method, originals)
    shape = method.shape
    for layer in range(shape.layers):
        keys, values = normal(layer, 2, shape.kv_heads, LENGTH, shape.head_dim)
        subject.sequence.attend(
            LayerInput(layer, normal(9, shape.query_heads, LENGTH, shape.head_dim), keys, values, 0.1, None)
        )
    subject.sequence.commit()
    before = subject.widths(VALUE)
    subject.review(attention=1.0)
    assert not originals.waiting
    assert bool((subject.widths(VALUE) > before).all())
    agrees_with_originals(subject.sequence)


def test_tokens_packed_while_an_answer_is_under_way_do_not_move_its_rows() -> None:
    originals = LateOriginals()
    subject = Subject(originals)
    sequence, shape = subject.sequence, subject.method.shape
    before = subject.widths(VALUE)
    subject.review(attention=1.0)
    packed = len(sequence.packed)
    policy = sequence.method.policy
    every, type(policy).every = type(policy).every, 10**6
    try:
        for _ in range(20):
            for layer in range(shape.layers):
                keys, values = normal(77, 2, shape.kv_heads, 1, shape.head_dim)
                sequence.attend(
                    LayerInput(layer, normal(78, shape.query_heads, 1, shape.head_dim), keys, values, 0.1, None)
                )
            sequence.commit()
    finally:
        type(policy).every = every
    assert len(sequence.packed) > packed
    originals.answer()
    subject.requantizer.apply()
    assert bool((subject.widths(VALUE) > before).all())
    originals.prompt = True
    agrees_with_originals(sequence)
