"""A forked sequence goes on as if it had come the whole way alone, in memory of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.storage.originals import InProcessOriginals
from qaq_core.storage.residual import ResidualWindow
from tests.core.tiny_models import calibration, teacher_forced, tiny, token_ids

KIND, PROMPT, STEPS = "llama-gqa", 150, 60
SETTINGS = [("balanced", {"target_bits": 2.5}), ("paper", {"attention_window": 3}), ("fp16", {})]


def made(preset: str = "fp16", **settings: object) -> tuple[Any, Method]:
    """A model and its method."""
    own = {} if preset == "fp16" else {"calibration": calibration(KIND)}
    model = tiny(KIND)
    return model, make_method(model, preset=preset, page_tokens=16, **own, **settings)


def storages(sequence: SequenceCache) -> set[int]:
    """Addresses of what the sequence holds on its device."""
    packed = sequence.packed
    held = [packed.tags, sequence.importance.state, sequence.residual._buffer]
    for side in packed.sides:
        held += [side.meta, *(rows for pool in side.pools for rows in pool.rows.values())]
        held += [side.outliers.index, side.outliers.value] if side.outliers else []
    return {tensor.untyped_storage().data_ptr() for tensor in held if tensor.numel()}


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "settings"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_both_go_on_as_one_alone(preset: str, settings: dict[str, object]) -> None:
    model, method = made(preset, **settings)
    ids, other = token_ids(PROMPT + STEPS), token_ids(STEPS, seed=9)
    twisted = torch.cat([ids[:, :PROMPT], other], 1)
    # Waiting for re-quantized rows keeps what happens in step.
    alone = [SequenceCache(method, wait=True) for _ in range(2)]
    expected = [
        teacher_forced(model, which, PROMPT, QAQCache([twin]))
        for which, twin in zip((ids, twisted), alone, strict=True)
    ]

    first = SequenceCache(method, wait=True)
    with torch.no_grad():
        logits = model(ids[:, :PROMPT], past_key_values=QAQCache([first])).logits[0, -1]
    second = first.fork()
    assert second.nbytes == first.nbytes
    assert storages(first).isdisjoint(storages(second))
    assert second.stats().exceptions == 0
    for sequence, which, wanted, twin in zip((first, second), (ids, twisted), expected, alone, strict=True):
        assert torch.equal(logits, wanted[0])
        got = teacher_forced(model, which[:, PROMPT:], 1, QAQCache([sequence]))
        assert torch.equal(got, wanted[1:])
        assert sequence.stats() == twin.stats()
        assert sequence.stats().exceptions > 0 or preset == "fp16"


def test_pages_are_shared_until_both_have_gone() -> None:
    (model, method), store = made(), InProcessOriginals()
    first = SequenceCache(method, store)
    with torch.no_grad():
        model(token_ids(40), past_key_values=QAQCache([first]))
        second = first.fork()
        for sequence, seed in ((first, 1), (second, 2)):
            for token in token_ids(20, seed=seed)[0]:
                model(token[None, None], past_key_values=QAQCache([sequence]))
    pages = first.staging.names
    assert pages[:2] == second.staging.names[:2]
    assert pages[2] != second.staging.names[2]
    assert store.match(pages).result() == 3
    first.close()
    assert store.match(second.staging.names).result() == 3
    assert store.match(pages).result() == 2
    second.close()
    assert store.nbytes == 0


@pytest.mark.parametrize("how", ["repeat", "deepcopy"])
def test_forks_that_fail_midway_leave_nothing(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, method), store = made(), InProcessOriginals()
    cache = QAQCache(method=method, originals=store)
    ids = torch.cat([token_ids(40), token_ids(40, seed=2)])
    with torch.no_grad():
        expected = model(ids, past_key_values=cache).logits[:, -1]
        held, before = store.nbytes, list(cache.sequences)
        copies = iter([ResidualWindow.copy])
        with monkeypatch.context() as patched:
            patched.setattr(ResidualWindow, "copy", lambda window: next(copies)(window))
            with pytest.raises(StopIteration):
                cache.batch_repeat_interleave(2) if how == "repeat" else copy.deepcopy(cache)
        assert cache.sequences == before
        cache.crop(-1)
        torch.testing.assert_close(
            model(ids[:, -1:], past_key_values=cache).logits[:, -1], expected, atol=3e-3, rtol=3e-3
        )
    assert store.nbytes == held
    cache.reset()
    assert store.nbytes == 0


def test_not_in_the_middle_of_a_prompt() -> None:
    sequence = SequenceCache(made()[1])
    sequence.expect_prompt(50)
    with pytest.raises(ConfigError, match="prefill has not ended"):
        sequence.fork()
