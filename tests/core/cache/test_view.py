"""What a view tells is what the cache holds."""

from __future__ import annotations

import itertools
from pydoc_data import topics

import numpy as np
import pytest
import torch

from qaq_core.allocation.requantize import RowLog
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.cache.view import EIGHTHS, CacheView
from qaq_core.models import LoadedModel

PROMPT, STEPS = 200, 24


@pytest.fixture(scope="module")
def decoded(shallow_smollm2: LoadedModel) -> SequenceCache:
    """A text that was decoded for some steps; whoever changes it forks it."""
    model = shallow_smollm2.model
    ids = shallow_smollm2.tokenizer(topics.topics["assignment"], return_tensors="pt").input_ids[:, : PROMPT + STEPS]
    cache = QAQCache.for_model(model, fingerprint=shallow_smollm2.fingerprint, target_bits=3)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        CacheView.of(cache.sequences[0], 1, 1)  # somebody watches from here on
        for at in range(PROMPT, PROMPT + STEPS):
            model(ids[:, at : at + 1], past_key_values=cache)
    return cache.sequences[0]


def test_bits_are_means_of_those_that_are_held(decoded: SequenceCache) -> None:
    view = CacheView.of(decoded, 1000, 100)
    assert (view.length, view.first) == (PROMPT + STEPS, 0)
    start, stop = view.packed
    assert 0 < start < stop < view.length
    for side in (KEY, VALUE):
        held = decoded.bits(side)
        np.testing.assert_allclose(view.bits[side], held.mean((0, 1)).numpy(), rtol=1e-5)
        exact = view.bits[side] == 16
        assert exact[:start].all()
        assert exact[stop:].all()
        assert not exact[start:stop].any()
        edges = [column * view.length // 100 for column in range(101)]
        for column, (begin, end) in enumerate(itertools.pairwise(edges)):
            first, last = max(begin, start), min(end, stop)
            among = held[:, :, first:last] if first < last else held[:, :, begin:end]
            want = among.mean((1, 2)).numpy()
            np.testing.assert_allclose(view.grids[side][:, column] / EIGHTHS, want, atol=0.5 / EIGHTHS + 1e-6)


def test_only_the_last_tokens_are_told(decoded: SequenceCache) -> None:
    everything, last = CacheView.of(decoded, 1000, 64), CacheView.of(decoded, 10, 64)
    assert last.first == PROMPT + STEPS - 10
    for name in ("attention", "asked", "answered"):
        np.testing.assert_allclose(getattr(last, name), getattr(everything, name)[-10:], rtol=1e-5)
    np.testing.assert_allclose(last.bits[KEY], everything.bits[KEY][-10:], rtol=1e-5)
    np.testing.assert_array_equal(last.grids[KEY], everything.grids[KEY])


def test_attention_is_the_statistic(decoded: SequenceCache) -> None:
    view = CacheView.of(decoded, 1000, 4)
    want = decoded.importance.view(decoded.length).mean((0, 1))
    np.testing.assert_allclose(view.attention, want.numpy(), rtol=1e-5)
    assert view.attention[0] == view.attention.max()  # the first token is a sink


def test_exceptions_are_counted_by_token(decoded: SequenceCache) -> None:
    sequence = decoded.fork()
    try:
        CacheView.of(sequence, 1, 1)
        sequence.set_lambda_floor(64 * sequence.rate.value)
        narrow = CacheView.of(sequence, 1000, 4)
        sequence.set_lambda_floor(0)
        for _ in range(20):
            sequence.recover()
        assert not sequence.rate.recovering
        view = CacheView.of(sequence, 1000, 4)
        counts = sequence.requantizer.counts
        assert view.answered.sum() == counts.rows_requantized > 0
        assert view.asked.sum() == counts.exceptions
        assert (view.asked >= view.answered).all()
        more = view.bits[KEY] + view.bits[VALUE] > narrow.bits[KEY] + narrow.bits[VALUE]
        np.testing.assert_array_equal(more, view.answered > 0)
        start, stop = view.packed
        assert not view.asked[:start].any()
        assert not view.asked[stop:].any()
    finally:
        sequence.close()


def test_a_prompt_under_way_and_an_empty_cache_have_views(shallow_smollm2: LoadedModel) -> None:
    method = make_method(shallow_smollm2.model, fingerprint=shallow_smollm2.fingerprint)
    sequence = SequenceCache(method)
    cache = QAQCache([sequence])
    empty = CacheView.of(sequence, 10, 10)
    assert (empty.length, len(empty.attention), empty.grids[KEY].shape[1]) == (0, 0, 0)
    sequence.expect_prompt(60)
    with torch.no_grad():
        shallow_smollm2.model(torch.arange(40)[None], past_key_values=cache, use_cache=True)
    under_way = CacheView.of(sequence, 100, 10)
    assert under_way.length == 40
    assert (under_way.bits[VALUE] == 16).all()
    assert not under_way.attention.any()


def test_a_log_forgets_tokens_that_are_cropped() -> None:
    log = RowLog()
    log.ask(np.array([3, 3, 9]))
    log.answer(np.array([3]))
    log.ask(np.array([], dtype=np.int32))
    assert log.asked(0, 12).tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0]
    log.crop(5)
    assert log.asked(2, 10).tolist() == [0, 2, 0, 0, 0, 0, 0, 0]
    assert log.answered(3, 4).tolist() == [1]
