"""One sequence with the real model: attention reads the packed rows, and nothing else of their size exists."""

from __future__ import annotations

import gc
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from qaq_core.attention import LayerInput
from qaq_core.base.errors import ConfigError, QuantizationError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.method import PACK_TOKENS
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.models import LoadedModel
from qaq_core.storage.originals import InProcessOriginals
from qaq_core.storage.packed import BLOCK_TOKENS
from tests.core.rows import normal, request
from tests.core.tiny_models import calibration, teacher_forced, tiny, token_ids

PROMPT, STEPS = 200, 24


@pytest.fixture(scope="module")
def smollm2(shallow_smollm2: LoadedModel) -> LoadedModel:
    """The demo model's first layers: what a cache holds and reads is the same for each layer."""
    return shallow_smollm2


@pytest.fixture(scope="module")
def ids(smollm2: LoadedModel) -> torch.Tensor:
    """[1, 224] of real English."""
    encoded = smollm2.tokenizer(topics.topics["assignment"], return_tensors="pt").input_ids
    return encoded[:, : PROMPT + STEPS]


@pytest.fixture(scope="module")
def expected(smollm2: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the prompt's end and of every step, with transformers' own cache."""
    return teacher_forced(smollm2.model, ids, PROMPT)


@torch.no_grad()
def prefilled(model: Any, ids: torch.Tensor, **settings: Any) -> QAQCache:
    cache = QAQCache.for_model(model, **settings)
    model(ids, past_key_values=cache)
    return cache


def test_exact_logits_equal_the_dynamic_cache(smollm2: LoadedModel, ids: torch.Tensor, expected: torch.Tensor) -> None:
    cache = QAQCache.for_model(smollm2.model, preset="fp16")
    got = teacher_forced(smollm2.model, ids, PROMPT, cache)
    assert cache.stats()[0].key_bits == cache.stats()[0].value_bits
    assert set(cache.stats()[0].key_bits) == {16}
    assert len(cache.sequences[0].packed) > 0.8 * ids.shape[1]
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    # Logits reach 38 here: rounding keys and values to half precision alone moves one by 1.2e-2.
    assert float((got - expected).norm()) < 1e-3 * float(expected.norm())
    assert float((got - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    assert float((got.softmax(-1) - expected.softmax(-1)).abs().max()) < 1e-3


def test_more_bits_are_nearer_and_larger(smollm2: LoadedModel, ids: torch.Tensor, expected: torch.Tensor) -> None:
    expected = expected[:9].log_softmax(-1)
    divergence, bytes_held = [], []
    for bits in (1.5, 3.0):
        cache = QAQCache.for_model(smollm2.model, fingerprint=smollm2.fingerprint, target_bits=bits)
        got = teacher_forced(smollm2.model, ids[:, : PROMPT + 8], PROMPT, cache).log_softmax(-1)
        divergence.append(float((expected.exp() * (expected - got)).sum(-1).mean()))
        bytes_held.append(cache.nbytes)
    assert bytes_held[0] < bytes_held[1]
    assert divergence[1] < 0.02
    assert 2 * divergence[1] < divergence[0] < 1


@pytest.mark.parametrize("bits", [1.8, 3.5])
def test_the_target_is_met_after_the_prompt(smollm2: LoadedModel, ids: torch.Tensor, bits: float) -> None:
    cache = prefilled(smollm2.model, ids, fingerprint=smollm2.fingerprint, target_bits=bits)
    stats = cache.stats()[0]
    held = [sum(w * n for w, n in h.items()) / sum(h.values()) for h in (stats.key_bits, stats.value_bits)]
    assert sum(held) / 2 == pytest.approx(bits, rel=0.01)


@torch.no_grad()
def test_a_prompt_that_is_packed_later_is_the_same(smollm2: LoadedModel, ids: torch.Tensor) -> None:
    """Packed when asked, or when what comes next needs it; in the meantime it is as it came."""

    def step(sequence: SequenceCache, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(sequence.length, sequence.length + tokens.shape[1])[None]
        cache = QAQCache([sequence])
        return smollm2.model(tokens, past_key_values=cache, position_ids=positions, qaq_cache=cache).logits[0, -1]

    method = make_method(smollm2.model, smollm2.fingerprint)
    at_once, asked, needed, forked = (SequenceCache(method, wait=True) for _ in range(4))
    for sequence in (asked, needed, forked):
        sequence.pack_later()
    for sequence in (at_once, asked, needed, forked):
        sequence.expect_prompt(PROMPT)
        for chunk in ids[:, :PROMPT].split(128, 1):
            step(sequence, chunk)
    assert len(at_once.packed) > 0
    assert [len(sequence.packed) for sequence in (asked, needed, forked)] == [0, 0, 0]
    assert asked.pack_prompt()
    assert not asked.pack_prompt()  # nothing is left
    fork = forked.fork()
    for sequence in (asked, forked, fork):
        assert sequence.packed.nbytes == at_once.packed.nbytes
        assert all(torch.equal(sequence.packed.widths(side), at_once.packed.widths(side)) for side in (KEY, VALUE))
    following = ids[:, PROMPT : PROMPT + 1]
    logits = [step(sequence, following) for sequence in (at_once, asked, needed, fork)]
    assert all(torch.equal(each, logits[0]) for each in logits[1:])
    needed.expect_prompt(2)  # the next prompt is packed at its end again
    step(needed, ids[:, :2])
    assert needed.packed.stop + 2 * method.pack_tokens > needed.length


def test_a_compression_target_is_met_in_allocated_bytes(smollm2: LoadedModel, ids: torch.Tensor) -> None:
    cache = prefilled(smollm2.model, ids, fingerprint=smollm2.fingerprint, target_compression=3.0)
    assert cache.stats()[0].compression == pytest.approx(3.0, rel=0.02)


def test_decoding_reads_the_packed_rows(smollm2: LoadedModel, ids: torch.Tensor) -> None:
    """Zeroed codes change the next logits; deleted rows break the step."""

    def cached() -> QAQCache:
        return prefilled(smollm2.model, ids[:, :80], fingerprint=smollm2.fingerprint)

    def next_logits(cache: QAQCache) -> torch.Tensor:
        with torch.no_grad():
            return smollm2.model(ids[:, 80:81], past_key_values=cache).logits[0, -1]

    clean = next_logits(cached())
    assert torch.equal(next_logits(cached()), clean)
    for side in (KEY, VALUE):
        zeroed = cached()
        for rows in zeroed.sequences[0].packed.sides[side].pools[0].rows.values():
            rows.zero_()
        assert float((next_logits(zeroed) - clean).abs().max()) > 0.5
        deleted = cached()
        del deleted.sequences[0].packed.sides[side].pools[0].rows
        with pytest.raises(AttributeError, match="rows"):
            next_logits(deleted)


def storages() -> dict[int, int]:
    """Bytes of every tensor storage alive, by address."""
    gc.collect()
    found = {}
    with torch._C.DisableTorchFunctionSubclass():  # keys that another test left without attention refuse to be asked
        for thing in gc.get_objects():
            # Those of torch.compile and of oneDNN, which other tests leave, have no memory that could be named.
            if issubclass(type(thing), torch.Tensor) and not thing.is_mkldnn and not isinstance(thing, FakeTensor):
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def test_no_dequantized_copy_is_resident(
    smollm2: LoadedModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sequence adds to all live tensors is what it counts, its originals and the shared scratch."""
    monkeypatch.setenv("QAQ_KERNEL", "reference")
    method = make_method(smollm2.model, fingerprint=smollm2.fingerprint)
    originals = InProcessOriginals()
    cache = QAQCache([], method, originals)
    shared = QAQCache([], method)  # builds the scratch and the tables of angles
    with torch.no_grad():
        smollm2.model(ids[:, :PROMPT], past_key_values=shared, logits_to_keep=1)
        smollm2.model(ids[:, :1], past_key_values=shared)
    shared.reset()
    del shared
    scratch = method.attention._scratch
    shape = method.shape
    assert scratch.numel() == 2 * shape.kv_heads * 184 * shape.head_dim  # 200 less 4 sinks and 12 recent
    assert scratch.numel() <= 2 * shape.kv_heads * BLOCK_TOKENS * shape.head_dim

    before = storages()
    with torch.no_grad():
        smollm2.model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
        for i in range(9):
            smollm2.model(ids[:, PROMPT + i : PROMPT + i + 1], past_key_values=cache)
    after = storages()

    added = {place: size for place, size in after.items() if before.get(place) != size}
    sequence = cache.sequences[0]
    grown = method.attention._scratch.untyped_storage().nbytes() if method.attention._scratch is not scratch else 0
    counted = sequence.nbytes + sequence.staging_bytes + originals.nbytes + grown
    assert abs(sum(added.values()) - counted) < 4096
    # A dequantized copy of one side alone would be larger than all that the sequence holds on the device.
    assert sequence.nbytes < PROMPT * shape.layers * shape.kv_heads * shape.head_dim * 4


def test_closing_frees_everything_on_the_device(smollm2: LoadedModel, ids: torch.Tensor) -> None:
    cache = prefilled(smollm2.model, ids, fingerprint=smollm2.fingerprint)
    sequence = cache.sequences[0]
    held = {rows.untyped_storage().data_ptr() for side in sequence.packed.sides for rows in side.pools[0].rows.values()}
    assert held <= storages().keys()
    sequence.close()
    assert sequence.nbytes == 0
    assert sequence.staging_bytes == 0
    assert not held & storages().keys()


# -- with a tiny model, where many shapes of a conversation are quick ----------------------------------------


@pytest.mark.parametrize("prompt", [1, 2, 5, 11, 19, 20, 21, 36, 37, 100])
def test_sinks_packed_and_recent_tokens_add_up(prompt: int) -> None:
    model, ids = tiny("llama-gqa"), token_ids(prompt + 40)
    expected = teacher_forced(model, ids, prompt)
    cache = QAQCache.for_model(model, preset="fp16")
    got = teacher_forced(model, ids, prompt, cache)
    sequence = cache.sequences[0]
    assert sequence.length == prompt + 40
    recent = sequence.length - 4 - len(sequence.packed)
    assert PACK_TOKENS <= recent < 2 * PACK_TOKENS
    assert sequence.packed.start == 4
    # Half precision alone, in the reference too, moves a logit by up to 0.002 here.
    assert float((got - expected).abs().max()) < 3e-3


@torch.no_grad()
def test_a_prompt_in_chunks_is_the_prompt() -> None:
    """Announced prompts stay exact until the last chunk; the packed bits are those of the prompt in one piece."""
    model, ids = tiny("llama-gqa"), token_ids(120)
    method = make_method(model, calibration=calibration("llama-gqa"))
    whole = SequenceCache(method)
    model(ids, past_key_values=QAQCache([whole]))
    chunked = SequenceCache(method)
    chunked.expect_prompt(120)
    for first in range(0, 120, 50):
        assert len(chunked.packed) == 0
        model(ids[:, first : first + 50], past_key_values=QAQCache([chunked]))
    assert len(chunked.packed) == len(whole.packed) == 104
    for side in (KEY, VALUE):
        same = (chunked.packed.widths(side) == whole.packed.widths(side)).float().mean()
        assert float(same) > 0.99  # sums of other lengths may round a byte of importance differently
    again = SequenceCache(method)
    again.expect_prompt(10)
    with pytest.raises(ConfigError, match="announced"):
        model(ids[:, :11], past_key_values=QAQCache([again]))


@torch.no_grad()
def test_a_second_prompt_continues_the_conversation() -> None:
    model, ids = tiny("llama-gqa"), token_ids(230)
    expected = model(ids).logits[0]
    cache = QAQCache.for_model(model, preset="fp16")
    got = []
    for first, last in ((0, 90), (90, 91), (91, 92), (92, 150), (150, 151), (151, 160), (160, 230)):
        got.append(model(ids[:, first:last], past_key_values=cache).logits[0])
    assert float((torch.cat(got) - expected).abs().max()) < 2e-3
    assert cache.sequences[0].length == 230


@pytest.mark.parametrize("preset", ["balanced", "paper"])
@torch.no_grad()
def test_rows_packed_at_any_time_are_those_of_the_originals(preset: str) -> None:
    """Prompt, decode and second prompt: what was packed is bit for bit what the stored originals give."""
    model, ids = tiny("qwen2"), token_ids(230)
    settings = {"calibration": calibration("qwen2"), "preset": preset}
    method = make_method(model, **settings)
    sequence = SequenceCache(method, originals=InProcessOriginals())
    cache = QAQCache([sequence])
    for first, last in ((0, 70), *((i, i + 1) for i in range(70, 150)), (150, 200)):
        model(ids[:, first:last], past_key_values=cache)
    agrees_with_originals(sequence)


def test_a_sequence_without_a_prompt_is_packed_from_rounded_numbers() -> None:
    """What it packs was rounded in the window, so all planes of a row come when it needs more bits."""
    model, ids = tiny("qwen2"), token_ids(60)
    sequence = make_method(model, calibration=calibration("qwen2")).sequence()
    cache = QAQCache([sequence])
    for at in range(60):
        model(ids[:, at : at + 1], past_key_values=cache)
    assert len(sequence.packed)
    assert sequence.method.dtype != sequence.method.residual_dtype
    assert sequence.requantizer.rounded_from == sequence.packed.start


def agrees_with_originals(sequence: SequenceCache, at: int | None = None) -> None:
    """Asks for all planes of the rows that were packed from the model's own numbers (or of one position)."""
    packed = sequence.packed
    for side in (KEY, VALUE):
        widths = packed.widths(side).reshape(-1)
        position = torch.arange(len(packed)).expand(packed.tags.shape).reshape(-1) + packed.start
        looked = position < sequence.requantizer.rounded_from if at is None else position == at
        index = torch.nonzero((widths > 0) & looked).squeeze(1)
        assert len(index)
        layer, head, token = np.unravel_index(index.numpy(), packed.tags.shape)
        asked = request(
            sequence.staging.shape,
            packed.sides[side].meta,
            layer,
            head,
            token + packed.start,
            np.full(len(index), side),
            np.zeros(len(index)),
            widths[index].numpy(),
            packed.start,
            sequence.staging.page_ids(token + packed.start),
        )
        for part, future in sequence.staging.requantize(asked, packed.quantizer):
            reply = future.result(0)
            assert reply.found.all()
            sizes = asked.payload_bytes()[part]
            starts = sizes.cumsum() - sizes
            for width in widths.unique().tolist():
                mine = (asked.want[part] == width).nonzero()[0]
                if width == 0 or not len(mine):
                    continue
                reach = starts[mine][:, None] + np.arange(int(sizes[mine[0]]))
                answered = torch.from_numpy(reply.planes[reach])
                pool = packed.sides[side].pools[0]
                held = pool.take(packed.tags, side, index[part][mine], width)
                assert torch.equal(held.reshape(len(mine), -1), answered)


def test_what_is_packed_does_not_depend_on_the_kernel() -> None:
    held = []
    for kernel in ("reference", "auto"):
        method = make_method(tiny("llama-gqa"), calibration=calibration("llama-gqa"), kernel=kernel)
        sequence, shape = SequenceCache(method), method.shape
        for layer in range(shape.layers):
            keys, values = normal(layer, 2, shape.kv_heads, 150, shape.head_dim)
            sequence.attend(
                LayerInput(layer, normal(9, shape.query_heads, 150, shape.head_dim), keys, values, 0.1, None)
            )
        sequence.commit()
        held.append(sequence.packed)
    one, other = held
    assert torch.equal(one.tags, other.tags)
    for mine, its in zip(one.sides, other.sides, strict=True):
        assert torch.equal(mine.meta, its.meta)
        assert mine.pools[0].rows.keys() == its.pools[0].rows.keys()
        assert all(torch.equal(rows, its.pools[0].rows[width]) for width, rows in mine.pools[0].rows.items())


def test_nan_keys_are_refused_naming_the_layer() -> None:
    model = tiny("llama-gqa")
    sequence = SequenceCache(make_method(model, calibration=calibration("llama-gqa")))
    shape = sequence.method.shape
    for layer in range(shape.layers):
        keys = normal(layer, shape.kv_heads, 80, shape.head_dim)
        if layer == 2:
            keys[0, 30, 0] = float("nan")
        sequence.attend(
            LayerInput(layer, normal(9, shape.query_heads, 80, shape.head_dim), keys, keys.abs(), 0.1, None)
        )
    with pytest.raises(QuantizationError, match="layer 2"):
        sequence.commit()
    one = normal(0, shape.kv_heads, 1, shape.head_dim)
    with pytest.raises(QuantizationError, match="begin a new sequence"):
        sequence.attend(LayerInput(0, normal(9, shape.query_heads, 1, shape.head_dim), one, one, 0.1, None))
