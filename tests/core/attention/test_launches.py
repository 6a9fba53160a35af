"""What a decode step asks of a device, counted on a pretended one: launches, copies, and waits of the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qaq_core.attention import triton
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.quantization import adaptation
from tests.core.tiny_models import calibration, tiny, token_ids
from tests.devices import Count, PretendedDevice, host_tensor

triton_kernels = pytest.importorskip("qaq_core.attention.triton_kernels")

KIND, LAYERS, PROMPT = "llama-gqa", 3, 68
KERNELS = ("packed_split", "merge", "observe")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDevice]:
    """With sequences that have a rotation of their own."""
    monkeypatch.setattr(adaptation, "MEANS_TOKENS", 16)
    monkeypatch.setattr(adaptation, "ROTATION_TOKENS", 1)
    monkeypatch.setattr(triton, "missing", lambda place: None)
    with PretendedDevice(addresses=True) as made:
        yield made


class Launched:
    """A module of Triton kernels whose launches are counted.

    Attributes:
        run: whether they run, too: in Triton's interpreter, on host memory. Otherwise results are whatever was there.
    """

    def __init__(self, kernels: Any, names: Sequence[str], device: PretendedDevice) -> None:
        self._kernels, self._names, self._device = kernels, names, device
        self.run = True

    def __getattr__(self, name: str) -> Any:
        return _Launcher(self, name) if name in self._names else getattr(self._kernels, name)

    def launch(self, name: str, grid: tuple[int, ...], args: Sequence[Any], settings: dict[str, Any]) -> None:
        self._device.note("launches", name)
        if self.run:
            getattr(self._kernels, name)[grid](*map(host_tensor, args), **settings)


@dataclass(frozen=True)
class _Launcher:
    kernels: Launched
    name: str

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **settings: self.kernels.launch(self.name, grid, args, settings)


class Decoding:
    """Some sequences after a prompt.

    Args:
        device: None for the CPU.
    """

    def __init__(self, device: PretendedDevice | None, batch: int) -> None:
        self._device = device
        self._model = tiny(KIND) if device is None else device.module(tiny(KIND))
        kernel = "reference" if device is None else "triton"
        method = make_method(self._model, calibration=calibration(KIND), target_bits=3.0, kernel=kernel)
        if device is not None:
            self.kernels = method.attention._kernels = Launched(triton_kernels, KERNELS, device)  # type: ignore[attr-defined]
        self._place = method.device
        self.sequences = [SequenceCache(method, wait=True) for _ in range(batch)]
        for seed, one in enumerate(self.sequences):
            self.feed(token_ids(PROMPT, seed=seed), [one])

    @torch.no_grad()
    def feed(self, ids: torch.Tensor, sequences: list[SequenceCache]) -> torch.Tensor:
        cache, start = QAQCache(sequences), sequences[0].length
        given: dict[str, Any] = {"use_cache": True, "past_key_values": cache, "qaq_cache": cache}
        positions = torch.arange(start, start + ids.shape[1], device=self._place).expand(len(sequences), -1)
        logits: torch.Tensor = self._model(input_ids=ids.to(self._place), position_ids=positions, **given).logits
        return logits

    def step(self, token: int) -> torch.Tensor:
        return self.feed(torch.full((len(self.sequences), 1), token), self.sequences).cpu()


def counted(device: PretendedDevice, batch: int) -> list[Count]:
    """Of two plain steps, which compute nothing: the one before is observed, and the next would be reviewed."""
    decoding = Decoding(device, batch)
    assert all(one.packed.quantizer.own_bytes > 40_000 for one in decoding.sequences)
    decoding.kernels.run = False
    counts = []
    decoding.step(10)  # makes what is kept
    for token in (11, 12):
        with device.counted() as count:
            decoding.step(token)
        counts.append(count)
    return counts


def test_a_step_with_tritons_kernels_makes_the_logits_of_the_reference(device: PretendedDevice) -> None:
    away, home = Decoding(device, 2), Decoding(None, 2)
    torch.testing.assert_close(away.step(10), home.step(10), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_plain_step_asks_for_little(device: PretendedDevice, batch: int) -> None:
    """One that neither observes, reviews nor packs. The model's own operations are about 40 a layer of it."""
    count, again = counted(device, batch)
    assert count == again
    assert [count.launches[name] for name in KERNELS] == [LAYERS, LAYERS, 0]
    assert count.launches.total() <= (60 + 8 * (batch - 1)) * LAYERS + 30
    # A table a layer, and what the model is given.
    assert count.copies_in.total() <= LAYERS + 2
    # New tokens of each sequence, and the logits.
    assert count.copies_out.total() == batch + 1
    assert count.waits.total() <= batch + 4


def test_matrices_of_a_rotation_are_made_once(device: PretendedDevice) -> None:
    decoding = Decoding(device, 1)
    decoding.kernels.run = False
    made = []
    for token in range(10, 13):
        with device.counted() as count:
            decoding.step(token)
        made.append(count.launches["linalg_solve_triangular"])
    assert made == [2 * LAYERS, 0, 0]
