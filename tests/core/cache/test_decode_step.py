"""A decode step in C++ against the same step layer by layer: outputs, what was kept, what was seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from qaq_core.allocation import DecayingMeanSquare
from qaq_core.attention import LayerInput, cpu
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.decode_step import GroupedStep, LayerwiseStep, NativeStep, begin_decode
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.kernels import load_library
from qaq_core.quantization.quantizer import Quantizer
from tests.core.conformance import INSTRUCTION_SETS
from tests.core.rows import normal, rotated
from tests.core.tiny_models import calibration, tiny, token_ids

pytestmark = pytest.mark.skipif(load_library() is None, reason="the C++ library is not built")

LENGTHS = (1, 3, 19, 60)
"""Tokens before the step: only sinks, nothing packed, little packed, more packed."""


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    loaded = load_library()
    assert loaded is not None
    before = loaded.qaq_isa()
    if loaded.qaq_use(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    loaded.qaq_use(before)


def method(kind: str, preset: str = "balanced", dtype: torch.dtype = torch.float32) -> Method:
    """Of which every step is observed."""
    settings = {"calibration": calibration(kind)} if preset != "fp16" else {}
    made = make_method(tiny(kind).to(dtype), preset=preset, **settings)
    return replace(made, statistic=DecayingMeanSquare(every=1)) if preset != "paper" else made


def turning(quantizer: Quantizer, originals: torch.Tensor, start: int) -> Quantizer:
    """Every sequence gets a rotation, however short it is."""
    return rotated(quantizer, originals.shape[3])


def fresh(method: Method, seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [heads, n, head_dim] of new tokens."""
    shape = method.shape
    query = normal(seed, shape.query_heads, n, shape.head_dim).to(method.dtype)
    keys, values = normal(seed + 1, 2, shape.kv_heads, n, shape.head_dim).to(method.dtype)
    return query, keys, values


def filled(method: Method, lengths: tuple[int, ...]) -> list[SequenceCache]:
    """Sequences after prompts of those lengths; the same ones every time."""
    sequences = [SequenceCache(method) for _ in lengths]
    for i, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        sequence.expect_prompt(length)
        for layer in range(method.shape.layers):
            sequence.attend(LayerInput(layer, *fresh(method, 100 * i + 10 * layer, length), 0.3, None))
        sequence.commit()
    return sequences


def stepped(
    method: Method, sequences: list[SequenceCache], native: bool, sliding_window: int | None
) -> list[torch.Tensor]:
    """Outputs of the layers in one step; the step is not committed."""
    step = begin_decode(sequences) if native else LayerwiseStep(method, sequences)
    assert isinstance(step, NativeStep) is native
    out = []
    for layer in range(method.shape.layers):
        each = [fresh(method, 5000 + 100 * i + 10 * layer, 1) for i in range(len(sequences))]
        query, keys, values = (torch.stack(parts) for parts in zip(*each, strict=True))
        out.append(step.attend(LayerInput(layer, query, keys, values, 0.3, sliding_window)))
    return out


SUBJECTS = (
    ("llama-gqa", "balanced", torch.float32),
    ("llama-gqa", "balanced", torch.bfloat16),
    ("llama-gqa", "fp16", torch.float16),
    ("llama-mqa-80", "balanced", torch.float32),
    ("qwen2", "fp16", torch.float32),
    ("gemma3", "balanced", torch.float32),
)


@pytest.mark.parametrize(
    ("kind", "preset", "dtype", "sliding_window", "own"),
    # With a sliding window and without, with rotations of the sequences' own and without: two of the four for each.
    [
        (*subject, sliding_window, (sliding_window is None) == (i % 2 == 0))
        for i, subject in enumerate(SUBJECTS)
        for sliding_window in (None, 24)
    ],
)
def test_the_step_in_cpp_is_the_step(
    isa: str, kind: str, preset: str, dtype: torch.dtype, sliding_window: int | None, own: bool
) -> None:
    subject = method(kind, preset, dtype)
    if own and subject.adaptation is not None:
        subject = replace(subject, adaptation=turning)
    ours, theirs = filled(subject, LENGTHS), filled(subject, LENGTHS)
    got, expected = stepped(subject, ours, True, sliding_window), stepped(subject, theirs, False, sliding_window)
    most = 5e-4 if own else 1e-4  # queries that were turned differ in a last bit, and so in one of their integers
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=most, atol=most * float(other.abs().max()))
    for mine, other in zip(ours, theirs, strict=True):
        for room, wanted in zip(mine.residual.places(), other.residual.places(), strict=True):
            if wanted is not None:
                assert room is not None
                stop = None if room.shape[3] == 1 else mine.residual.held + 1
                assert torch.equal(room[:, :, :, :stop], wanted[:, :, :, :stop])
        assert mine.importance.observed.keys() == other.importance.observed.keys() == {mine.length}
        seen, wanted = (each.importance.observed[mine.length] for each in (mine, other))
        assert torch.allclose(seen, wanted, rtol=10 * most, atol=1e-7)


def test_halves_are_rounded_as_everywhere(isa: str) -> None:
    subject = method("llama-gqa")
    shape, sequences = subject.shape, filled(subject, (3,))
    step = begin_decode(sequences)
    size = (1, shape.kv_heads, 1, shape.head_dim)
    hard = torch.tensor([0.0, -0.0, 1.0, 2049.0, 2051.0, 65519.0, 65520.0, 1e9, 6e-8, 2.9e-8, 3e-8, 1e-40, 6.1e-5])
    hard = torch.cat([hard, 2.0 ** -torch.arange(12.0, 27.0) * 1.0003, torch.tensor([torch.inf, -torch.inf, 0.1])])
    keys = hard.repeat(size[1] * size[3])[: size[1] * size[3]].view(size)
    step.attend(LayerInput(0, torch.zeros(1, shape.query_heads, 1, shape.head_dim), keys, -keys, 1.0, None))
    room, originals = sequences[0].residual.places()
    assert originals is not None
    assert torch.equal(room[0, :, :, 3], torch.stack([keys, -keys])[:, 0, :, 0].half())
    assert torch.equal(originals[0], torch.stack([keys, -keys])[:, 0])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, before = method("llama-gqa"), torch.get_num_threads()
    alone = stepped(subject, filled(subject, LENGTHS), True, None)
    monkeypatch.setattr(cpu, "SINGLE_THREAD_BELOW", 0)
    torch.set_num_threads(threads)
    try:
        together = stepped(subject, filled(subject, LENGTHS), True, None)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_rows_that_moved_are_found_again() -> None:
    """Descriptions are kept between steps, and must not outlive what they describe."""
    model = tiny("llama-gqa")
    subject = make_method(model, calibration=calibration("llama-gqa"), kernel="cpu")
    other = make_method(model, calibration=calibration("llama-gqa"), kernel="reference")
    ids, logits = token_ids(84), []
    with torch.inference_mode():
        for one in (subject, other):
            cache = QAQCache([], one)
            model(ids[:, :60], past_key_values=cache)
            moved = cache.sequences[0].packed.version
            steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(60, 84)]
            assert cache.sequences[0].packed.version >= moved + 3
            logits.append(torch.cat(steps))
    assert torch.allclose(*logits, rtol=0.02, atol=0.02 * float(logits[0].abs().max()))


def test_what_the_library_does_not_do_goes_layer_by_layer() -> None:
    subject = method("llama-gqa")
    prefilling = SequenceCache(subject)
    prefilling.expect_prompt(1)
    assert type(begin_decode([prefilling])) is LayerwiseStep
    for other in (
        method("llama-gqa", "paper"),
        make_method(tiny("llama-gqa"), preset="fp16", kernel="reference"),
    ):
        assert type(begin_decode([SequenceCache(other)])) is LayerwiseStep


def test_sequences_of_several_methods_are_computed_as_alone() -> None:
    """And so they hold what they hold alone: nothing is kept beside a rotation."""
    methods = [replace(method("llama-gqa"), adaptation=turning) for _ in range(2)]
    alone = [stepped(one, filled(one, LENGTHS), True, 24) for one in methods]
    sequences = [sequence for pair in zip(*(filled(one, LENGTHS) for one in methods), strict=True) for sequence in pair]
    step = begin_decode(sequences)
    assert isinstance(step, GroupedStep)
    for layer in range(methods[0].shape.layers):
        each = [fresh(methods[0], 5000 + 100 * (i // 2) + 10 * layer, 1) for i in range(len(sequences))]
        query, keys, values = (torch.stack(parts) for parts in zip(*each, strict=True))
        out = step.attend(LayerInput(layer, query, keys, values, 0.3, 24))
        for i, one in enumerate(alone):
            assert torch.equal(out[i::2], one[layer])
    assert all(sequence.packed.quantizer.transform.kept_bytes == 0 for sequence in sequences)
