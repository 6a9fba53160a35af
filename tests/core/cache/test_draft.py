"""A draft that is verified in one pass is what its tokens would be one by one, and no refused token stays."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from qaq_core.attention import LayerInput
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.decode_step import NativeDraft, SequentialStep, begin_draft
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.kernels import load_library
from tests.core.rows import normal
from tests.core.tiny_models import calibration, tiny, token_ids

pytestmark = pytest.mark.slow

PRESETS: dict[str, dict[str, object]] = {"balanced": {"target_bits": 2.5}, "paper": {}, "fp16": {}}
native = pytest.mark.skipif(load_library() is None, reason="the C++ library is not built")


def made(preset: str, kind: str = "llama-gqa", kernel: str | None = None) -> tuple[Any, Method]:
    model = tiny(kind)
    own = {} if preset == "fp16" else {"calibration": calibration(kind)}
    return model, make_method(model, preset=preset, page_tokens=16, kernel=kernel, **own, **PRESETS[preset])


@torch.no_grad()
def forward(model: Any, sequence: SequenceCache, ids: list[int]) -> torch.Tensor:
    """Logits [n, vocabulary] of a pass over tokens."""
    positions = torch.arange(sequence.length, sequence.length + len(ids))[None]
    logits: torch.Tensor = model(
        torch.tensor([ids]), past_key_values=QAQCache([sequence]), position_ids=positions
    ).logits[0]
    return logits


def same_state(one: SequenceCache, other: SequenceCache) -> None:
    """Everything that decides what comes next, and what it takes."""
    assert one.length == other.length == one.staging.tokens
    assert (one.residual.held, one.residual.nbytes) == (other.residual.held, other.residual.nbytes)
    assert len(one.packed) == len(other.packed)
    assert one.packed.nbytes == pytest.approx(other.packed.nbytes, rel=0.01)
    assert len(one.staging.names) == len(other.staging.names)
    if len(one.packed):
        for side in (KEY, VALUE):
            moved = (one.packed.widths(side) != other.packed.widths(side)).float().mean()
            assert float(moved) < 0.01, "rounding may move a width, and nothing else may"
    moved = (one.importance.state.float() - other.importance.state.float()).abs() > 8
    assert float(moved.float().mean()) < 0.01, (
        "a width that was moved for some steps moves what its row was seen to get"
    )


# Of the slower kernel, one that begins with nothing packed and one with some.
STARTS = [pytest.param("cpu", prompt, marks=native) for prompt in (1, 3, 19, 66)]
STARTS += [("reference", 3), ("reference", 66)]


@pytest.mark.parametrize(("kernel", "prompt"), STARTS)
@pytest.mark.parametrize(
    ("kind", "preset"),
    [("llama-gqa", "balanced"), ("llama-gqa", "fp16"), ("llama-gqa", "paper"), ("gemma3", "balanced")],
)
def test_greedy_tokens_are_those_of_decode(kind: str, preset: str, prompt: int, kernel: str) -> None:
    model, method = made(preset, kind, kernel)
    plain, drafted = (SequenceCache(method, wait=True) for _ in range(2))
    ids = token_ids(prompt)[0].tolist()
    expected = [*ids]
    logits = forward(model, plain, ids)
    for _ in range(60):
        expected.append(int(logits[-1].argmax()))
        logits = forward(model, plain, expected[-1:])
    expected.append(int(logits[-1].argmax()))

    chance, tokens, passes = random.Random(prompt), [*ids], 0
    tokens.append(int(forward(model, drafted, ids)[-1].argmax()))
    while drafted.length < plain.length:
        room = min(drafted.draft_room, plain.length - drafted.length)
        draft = expected[len(tokens) : len(tokens) + chance.randint(0, room - 1)]
        wrong = chance.randint(0, 2 * len(draft))
        draft[wrong:] = [3 + (token + 1) % 90 for token in draft[wrong:]]
        drafted.expect_draft(1 + len(draft))
        assert drafted.drafting
        rows = forward(model, drafted, [tokens[-1], *draft])
        passes += 1
        for kept, row in enumerate(rows, 1):
            tokens.append(int(row.argmax()))
            if draft[kept - 1 : kept] != tokens[-1:]:
                break
        drafted.accept(kept)
        assert len(tokens) == drafted.length + 1
    assert tokens == expected
    assert (passes < 50) == (preset != "paper"), "a review after each token leaves no room"
    same_state(drafted, plain)


@native
@pytest.mark.parametrize("sliding_window", [None, 24])
@pytest.mark.parametrize("preset", ["balanced", "fp16"])
@pytest.mark.parametrize("before", [2, 12, 60])
def test_a_draft_in_cpp_is_the_draft(preset: str, before: int, sliding_window: int | None) -> None:
    method = made(preset)[1]
    shape, n, outputs, sequences = method.shape, 3, [], []
    for kind in (NativeDraft, SequentialStep):
        sequence = SequenceCache(method)
        for layer in range(shape.layers):
            sequence.take(layer, *normal(layer, 2, shape.kv_heads, before, shape.head_dim))
        sequence.commit()
        sequence.expect_draft(n)
        step = begin_draft(method, sequence, n) if kind is NativeDraft else SequentialStep([sequence], [n])
        assert type(step) is kind
        out = []
        for layer in range(shape.layers):
            keys, values = normal(50 + layer, 2, 1, shape.kv_heads, n, shape.head_dim)
            query = normal(70 + layer, 1, shape.query_heads, n, shape.head_dim)
            out.append(step.attend(LayerInput(layer, query, keys, values, 0.3, sliding_window)))
        observed = {at: seen.clone() for at, seen in sequence.importance.observed.items()}
        sequence.commit()
        sequence.accept(n)
        outputs.append((torch.cat(out), observed))
        sequences.append(sequence)
    (ours, seen), (theirs, wanted) = outputs
    assert ours.shape == theirs.shape == (shape.layers, shape.query_heads, n, shape.head_dim)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert seen.keys() == wanted.keys()
    for at, mine in seen.items():
        assert torch.allclose(mine, wanted[at], rtol=1e-3, atol=1e-7)
    one, other = (sequence.staging.read(0, before + n) for sequence in sequences)
    assert torch.equal(one, other)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_draft_that_is_refused_leaves_nothing_behind(preset: str) -> None:
    model, method = made(preset)
    sequence, other = SequenceCache(method, wait=True), SequenceCache(method, wait=True)
    ids = token_ids(70)[0].tolist()
    for each in (sequence, other):
        forward(model, each, ids)
    for _ in range(3):
        sequence.expect_draft(40)
        forward(model, sequence, token_ids(40, seed=4)[0].tolist())
        assert (sequence.drafted, sequence.length, sequence.staging.tokens) == (40, 70, 70)
        sequence.accept(0)
    step = torch.stack([forward(model, each, [5])[0] for each in (sequence, other)])
    assert torch.allclose(step[0], step[1], atol=1e-4)
    same_state(sequence, other)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_draft_beyond_the_room_is_packed_when_it_is_accepted(preset: str) -> None:
    model, method = made(preset)
    sequence = SequenceCache(method, wait=True)
    forward(model, sequence, token_ids(70)[0].tolist())
    long = token_ids(40, seed=4)[0].tolist()
    assert sequence.draft_room < 40
    sequence.expect_draft(40)
    got = forward(model, sequence, long)
    sequence.accept(33)
    assert (sequence.length, len(sequence.packed), sequence.residual.held) == (103, 88, 15)
    other = SequenceCache(method, wait=True)
    forward(model, other, token_ids(70)[0].tolist())
    plain = torch.cat([forward(model, other, [token]) for token in long[:33]])
    assert sequence.nbytes <= 1.1 * other.nbytes
    if preset == "fp16":
        assert float((got[:33] - plain).abs().max()) < 2e-3


def test_drafts_out_of_turn_are_told() -> None:
    model, method = made("fp16")
    sequence = SequenceCache(method)
    with pytest.raises(ConfigError, match="at least 1"):
        sequence.expect_draft(0)
    with pytest.raises(ConfigError, match="1 tokens cannot be accepted"):
        sequence.accept(1)
    sequence.expect_draft(3)
    with pytest.raises(ConfigError, match="draft of 3 tokens was announced"):
        forward(model, sequence, [5, 6])
    forward(model, sequence, [5, 6, 7])
    with pytest.raises(ConfigError, match="say with `accept`"):
        forward(model, sequence, [5])
    for refused in (sequence.fork, lambda: sequence.expect_draft(2), lambda: sequence.expect_prompt(2)):
        with pytest.raises(ConfigError, match="draft has not ended"):
            refused()
    with pytest.raises(ConfigError, match="4 tokens cannot be accepted"):
        sequence.accept(4)
    sequence.accept(2)
    assert sequence.length == 2
    sequence.expect_prompt(4)
    with pytest.raises(ConfigError, match="prefill has not ended"):
        sequence.expect_draft(2)


def test_a_crop_ends_a_draft() -> None:
    model, method = made("balanced")
    sequence = SequenceCache(method)
    forward(model, sequence, token_ids(70)[0].tolist())
    for length in (72, 71, 60):
        sequence.expect_draft(3)
        forward(model, sequence, [5, 6, 7])
        sequence.crop(length)
        assert (sequence.length, sequence.drafted) == (length, 0)
    forward(model, sequence, [8])
    assert sequence.length == 61
