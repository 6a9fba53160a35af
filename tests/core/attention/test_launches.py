"""What a decode step asks of a device, counted on a pretended one: launches, copies, and waits of the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qaq_core.quantization import LinearTransform
from qaq_core.storage import packed as packed_module
from tests.core.tiny_models import first_layers
from tests.devices import Count, PretendedDevice

launches = pytest.importorskip("tests.launches", exc_type=ImportError)

KIND, LAYERS, PROMPT = "llama-gqa", 2, 68


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with launches.entered() as made:
        yield made


def counts(device: PretendedDevice, batch: int) -> list[Count]:
    """Of three steps: the first one is observed, the others are plain."""
    decoding = launches.Decoding(*first_layers(KIND, LAYERS), device, batch, PROMPT)
    transforms = [one.packed.quantizer.transform for one in decoding.sequences]
    assert all(isinstance(one, LinearTransform) and one.rotation is not None for one in transforms)
    made: list[Count] = decoding.counts(3)
    return made


@pytest.mark.slow
def test_a_step_with_tritons_kernels_makes_the_logits_of_the_reference(
    device: PretendedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 64)
    away, home = (launches.Decoding(*first_layers(KIND, 1), place, 1, PROMPT) for place in (device, None))
    torch.testing.assert_close(away.step(10), home.step(10), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_plain_step_asks_for_little(device: PretendedDevice, batch: int) -> None:
    """One that neither observes, reviews nor packs. The model's own operations are about 40 a layer of it."""
    first, count, again = counts(device, batch)
    assert count == again
    assert [count.launches[name] for name in launches.KERNELS] == [LAYERS, LAYERS, 0]
    assert count.launches.total() <= (48 + 8 * batch) * LAYERS + 12
    # A table a layer, and what the model is given.
    assert count.copies_in.total() <= LAYERS + 2
    # New tokens of each sequence, and the logits.
    assert count.copies_out.total() == batch + 1
    assert count.waits.total() <= batch + 3
    # A rotation's matrices are made once.
    assert [one.launches["linalg_solve_triangular"] for one in (first, count)] == [2 * LAYERS * batch, 0]
