"""Prompts that begin with stored pages: what is loaded, what is computed, and what may be shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE, Page
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.storage.originals import InProcessOriginals
from tests.core.tiny_models import calibration, tiny, token_ids

KIND, PAGE, PROMPT = "llama-gqa", 16, 200


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(KIND)


def method(model: Any, preset: str = "balanced") -> Method:
    known = {} if preset == "fp16" else {"calibration": calibration(KIND)}
    return make_method(model, preset=preset, page_tokens=PAGE, **known)


def pages_of(sequence: SequenceCache, originals: InProcessOriginals) -> list[Page]:
    found = originals.fetch(sequence.staging.names, sequence.method.page_shape).result(0)
    return [page for page in found if page is not None]


@torch.no_grad()
def run(model: Any, sequence: SequenceCache, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the next tokens."""
    at = sequence.length
    positions = torch.arange(at, at + ids.shape[1])[None]
    out = model(ids, position_ids=positions, past_key_values=QAQCache([sequence]), use_cache=True)
    logits: torch.Tensor = out.logits[0]
    return logits


@pytest.mark.parametrize("preset", ["fp16", "balanced"])
def test_a_prompt_goes_on_after_loaded_pages(model: Any, preset: str) -> None:
    """Same next token's logits, and as many bits as computing all of it."""
    ids, shared = token_ids(PROMPT), method(model, preset)
    stores = InProcessOriginals(), InProcessOriginals()
    whole = SequenceCache(shared, stores[0])
    expected = run(model, whole, ids)
    pages = pages_of(whole, stores[0])[:8]
    loaded = SequenceCache(shared, stores[1])
    loaded.load(pages, len(pages), PROMPT - 8 * PAGE)
    got = torch.cat([run(model, loaded, ids[:, 128:150]), run(model, loaded, ids[:, 150:])])
    torch.testing.assert_close(got, expected[128:], rtol=1e-4, atol=1e-4)
    assert loaded.length == loaded.exact_prefix == PROMPT
    assert len(loaded.packed) == len(whole.packed)
    for side in (KEY, VALUE):
        # Which token gets how many bits differs, because fewer queries were watched; their sum is the target's.
        held = [float(sequence.packed.widths(side).float().mean()) for sequence in (loaded, whole)]
        assert held[0] == pytest.approx(held[1], rel=0.1)
    # The first pages are the store's own and were not put again; the others are new.
    assert loaded.staging.names[:8] == [page.id for page in pages]
    assert stores[1].match(loaded.staging.names[8:]).result(0) == PROMPT // PAGE - 8
    assert loaded.staging.stored == PROMPT // PAGE
    more = token_ids(40, seed=1)
    after = [run(model, sequence, more[:, i : i + 1]) for i in range(40) for sequence in (whole, loaded)]
    if preset == "fp16":
        torch.testing.assert_close(torch.cat(after[::2]), torch.cat(after[1::2]), rtol=1e-3, atol=1e-3)


def test_loaded_originals_are_bit_for_bit_those_of_the_same_chunks(model: Any) -> None:
    """The rest, computed in the same pieces over loaded pages, gives the same bytes; in other pieces, the same
    numbers up to the rounding of sums."""
    ids, shared = token_ids(PROMPT), method(model)
    stores = [InProcessOriginals() for _ in range(3)]
    sequences = [SequenceCache(shared, store) for store in stores]
    computed, same, other = sequences
    computed.expect_prompt(PROMPT)
    for first in range(0, PROMPT, 64):
        run(model, computed, ids[:, first : first + 64])
    first_pages = pages_of(computed, stores[0])[:4]
    for sequence, pieces in ((same, (64, 128, 192)), (other, (64, 80, 150))):
        sequence.load(first_pages, 4, PROMPT - 64)
        for start, end in zip(pieces, (*pieces[1:], PROMPT), strict=True):
            run(model, sequence, ids[:, start:end])
    truth = torch.cat([page.data for page in pages_of(computed, stores[0])[4:]], 3)
    bytes_equal = torch.cat([page.data for page in pages_of(same, stores[1])], 3)
    near = torch.cat([page.data for page in pages_of(other, stores[2])], 3)
    assert torch.equal(bytes_equal, truth)
    torch.testing.assert_close(near, truth, rtol=1e-4, atol=1e-4)


def test_only_the_first_prompt_is_faithful(model: Any) -> None:
    shared = method(model, "fp16")
    sequence = SequenceCache(shared)
    run(model, sequence, token_ids(20))
    assert sequence.exact_prefix == 20
    run(model, sequence, token_ids(30))  # reads recent tokens that were rounded
    run(model, sequence, token_ids(1))
    assert (sequence.length, sequence.exact_prefix) == (51, 20)
    stepwise = SequenceCache(shared)
    for _ in range(3):
        run(model, stepwise, token_ids(1))
    assert stepwise.exact_prefix == 0


def test_after_private_pages_nothing_is_faithful(model: Any) -> None:
    """Originals of generated tokens carry what quantization did to them; so does what is computed over them."""
    store = InProcessOriginals()
    first = SequenceCache(method(model), store)
    run(model, first, token_ids(40))
    for i in range(24):
        run(model, first, token_ids(24, seed=2)[:, i : i + 1])
    moved = SequenceCache(method(model), store)
    moved.load(pages_of(first, store), 2, 30)
    run(model, moved, token_ids(30, seed=3))
    assert (moved.length, moved.exact_prefix) == (94, 32)


def test_pages_are_loaded_into_nothing_else(model: Any) -> None:
    store = InProcessOriginals()
    sequence = SequenceCache(method(model), store)
    run(model, sequence, token_ids(40))
    with pytest.raises(ConfigError, match="empty sequence"):
        sequence.load(pages_of(sequence, store), 2, 10)


def test_exceptions_of_loaded_tokens_find_their_pages(model: Any) -> None:
    """Rows packed from loaded pages widen from those pages, in the store, and agree with them bit for bit."""
    from tests.core.cache.test_sequence import agrees_with_originals

    store = InProcessOriginals()
    first = SequenceCache(method(model), store)
    run(model, first, token_ids(PROMPT))
    loaded = SequenceCache(method(model), store)
    loaded.load(pages_of(first, store), PROMPT // PAGE, 30)
    run(model, loaded, token_ids(30, seed=4))
    first.close()  # what it held of the store stays: the other has fetched it
    ids = token_ids(60, seed=5)
    for i in range(60):
        run(model, loaded, ids[:, i : i + 1])
    counts = loaded.requantizer.counts
    assert counts.rows_requantized > 0
    assert counts.originals_missing == 0
    agrees_with_originals(loaded)
