"""What a decode step asks of a device, counted on a pretended one: launches, copies, and waits of the host."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qaq_core.attention.interface import attended, hand_out
from qaq_core.cache.sequence import SequenceCache
from qaq_core.quantization import LinearTransform
from qaq_core.storage import packed as packed_module
from tests.core.tiny_models import first_layers
from tests.devices import DEVICE, Count, PretendedDevice

launches = pytest.importorskip("tests.launches", exc_type=ImportError)

LAYERS, PROMPT = 2, 100
KINDS = {"triton": "llama-gqa", "cuda": "llama-64"}


@pytest.fixture(params=KINDS)
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for a CPU")
    return str(request.param)


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with launches.entered() as made:
        yield made


def rotated(sequence: SequenceCache) -> bool:
    transform = sequence.packed.quantizer.transform
    return isinstance(transform, LinearTransform) and transform.rotation is not None


def counts(device: PretendedDevice, batch: int, kernel: str) -> list[Count]:
    """Of three steps: the first one is observed, the others are plain."""
    decoding = launches.Decoding(*first_layers(KINDS[kernel], LAYERS), device, batch, PROMPT, kernel)
    assert all(rotated(one) for one in decoding.sequences)
    made: list[Count] = decoding.counts(3)
    return made


@pytest.mark.slow
def test_a_step_makes_the_logits_of_the_reference(
    device: PretendedDevice, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 64 if kernel == "triton" else 128)
    layers = (first_layers(KINDS[kernel], 1) for _ in range(2))
    away, home = (
        launches.Decoding(*known, place, 1, PROMPT, kernel) for known, place in zip(layers, (device, None), strict=True)
    )
    torch.testing.assert_close(away.step(10), home.step(10), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_plain_step_asks_triton_for_little(device: PretendedDevice, batch: int) -> None:
    """One that neither observes, reviews nor packs. The model's own operations are about 40 a layer of it."""
    first, count, again = counts(device, batch, "triton")
    assert count == again
    assert [count.launches[name] for name in launches.KERNELS["triton"]] == [LAYERS, LAYERS, 0]
    assert count.launches.total() <= (48 + 8 * batch) * LAYERS + 12
    # A table a layer, and what the model is given.
    assert count.copies_in.total() <= LAYERS + 1
    # New tokens of each sequence, and the logits.
    assert count.copies_out.total() == batch + 1
    assert count.waits.total() == batch + 1
    # A rotation's matrices are made once.
    assert [one.launches["linalg_solve_triangular"] for one in (first, count)] == [2 * LAYERS * batch, 0]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_plain_step_asks_cuda_for_three_launches_a_layer(device: PretendedDevice, batch: int) -> None:
    """However many sequences there are, and but for the model's own operations, which are counted without a cache."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for a CPU")
    model, known = first_layers(KINDS["cuda"], LAYERS)
    decoding = launches.Decoding(model, known, device, batch, PROMPT, "cuda")
    assert all(rotated(one) for one in decoding.sequences)
    _, count, again = decoding.counts(3)
    assert count == again
    kernels = launches.KERNELS["cuda"]
    assert [count.launches[name] for name in kernels] == [LAYERS, LAYERS, LAYERS, 0]
    of_the_model = count.launches.total() - sum(count.launches[name] for name in kernels)
    assert of_the_model == own_launches(device, model)
    # What the model is given, and what is new of the sequences; the logits, and the new tokens' originals.
    assert (count.copies_in.total(), count.copies_out.total()) == (2, 2)
    assert count.waits == {"a copy": 1}  # for the logits


def test_packing_launches_one_rotation_and_one_move_of_rows_a_side(device: PretendedDevice) -> None:
    """However many layers and reflections there are."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for a CPU")
    decoding = launches.Decoding(*first_layers(KINDS["cuda"], LAYERS), device, 1, PROMPT, "cuda")
    one = decoding.sequences[0]
    held = len(one.packed)
    counted = decoding.counts(8)
    assert len(one.packed) == held + 8
    assert [count.launches["rotate"] for count in counted].count(2) == 1
    packing = next(count for count in counted if count.launches["rotate"])
    assert packing.launches["weave"] >= 2  # more if rows changed their widths, too
    assert packing.launches["bmm"] <= 2
    assert packing.launches.total() < 2000


def own_launches(device: PretendedDevice, model: Any) -> int:
    """Of a model whose attention does nothing."""

    class Nothing:
        def attend(self, given: Any, *_: Any) -> torch.Tensor:
            attended(self)
            return given.query  # type: ignore[no-any-return]

        def check_model(self, config: Any) -> None:
            """It is nobody's."""

    class Cache(DynamicCache):
        def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
            return hand_out(keys, values, self.nothing, layer), values

    cache = Cache()
    cache.nothing = Nothing()
    ids = torch.zeros(1, 1, dtype=torch.long).to(DEVICE)
    with device.counted() as count, torch.no_grad():
        model(input_ids=ids, position_ids=ids, past_key_values=cache, use_cache=True, qaq_cache=cache.nothing)
    return count.launches.total()
