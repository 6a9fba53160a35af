"""All that a sequence does, on another device than the CPU: the same bits, no devices mixed, launches counted."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from qaq_core.attention import CudaAttention
from qaq_core.attention.fallback import PROMPT as PROMPT_OF_REFERENCE
from qaq_core.base.pages import KEY
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.quantization import adaptation
from qaq_core.storage import packed as packed_module
from qaq_core.storage.host_pages import HostPages
from qaq_core.storage.originals import InProcessOriginals
from tests.core.emulated import emulate
from tests.core.tiny_models import first_layers, token_ids
from tests.devices import DEVICE, OnDevice, PretendedDevice

KINDS, PROMPT = {"reference": "llama-gqa", "cuda": "llama-64"}, 70
PRESETS: dict[str, dict[str, Any]] = {
    "balanced": {"target_bits": 2.5},
    "in time": {"preset": "balanced", "exceptions": "in-time", "target_bits": 1.5},
    "paper": {"attention_window": 3, "outlier_ratio": 0.1},
    "fp16": {},
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences have means and a rotation of their own, and several blocks."""
    monkeypatch.setattr(adaptation, "MEANS_TOKENS", 16)
    monkeypatch.setattr(adaptation, "ROTATION_TOKENS", 2)
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 48)


class Run:
    """A tiny model of two layers and sequences of one method, on the CPU or on a device.

    Args:
        kernel: of attention, "cuda" is emulated; all else is torch's.
    Attributes:
        shown: logits of all passes, on the CPU.
    """

    def __init__(self, name: str, device: PretendedDevice | None = None, kernel: str = "reference") -> None:
        self.model, known = first_layers(KINDS[kernel], 2)
        if device is not None:
            device.module(self.model)
        settings = {"preset": name, **PRESETS[name], "kernel": "reference"}
        if settings["preset"] != "fp16":
            settings["calibration"] = known
        self.method: Method = make_method(self.model, page_tokens=16, **settings)
        if kernel == "cuda":
            emulate(self.method)
        self.store, self.shown = InProcessOriginals(), list[torch.Tensor]()

    def sequence(self, **given: Any) -> SequenceCache:
        return SequenceCache(self.method, self.store, wait=True, **given)

    def feed(self, ids: torch.Tensor, *sequences: SequenceCache) -> None:
        """A pass over the next tokens [batch, n]."""
        cache = QAQCache(list(sequences))
        positions = [list(range(one.length, one.length + ids.shape[1])) for one in sequences]
        logits = self.model(
            input_ids=ids.to(self.method.device),
            position_ids=torch.tensor(positions, device=self.method.device),
            past_key_values=cache,
            use_cache=True,
            qaq_cache=cache,
        ).logits
        self.shown.append(logits.cpu())

    def decode(self, steps: int, *sequences: SequenceCache, seed: int = 5) -> None:
        for token in token_ids(steps, seed=seed)[0]:
            self.feed(token.expand(len(sequences), 1), *sequences)


@torch.no_grad()
def whole_life(run: Run) -> list[Any]:
    """Every path; returns what can be compared."""
    ids = token_ids(PROMPT)
    first = run.sequence(host_pages=HostPages(1 << 20))
    first.expect_prompt(PROMPT)
    run.feed(ids[:, :50], first)
    run.feed(ids[:, 50:], first)
    run.decode(5, first)
    second = first.fork()
    run.decode(3, first, second, seed=6)
    first.expect_draft(3)
    run.feed(token_ids(3, seed=7), first)
    first.accept(2)
    second.crop(PROMPT - 20)
    run.decode(1, second)
    run.feed(token_ids(30, seed=8), second)  # another turn
    bits = []
    if first.rate.elastic and first.in_time is None:
        bits.append(first.bits_at(2 * first.rate.value))
        for factor in (8.0, 0.1):
            first.set_lambda_floor(factor * first.rate.value)
            run.decode(5, first)
            bits.append(first.packed.mean_bits)
    third = run.sequence()
    pages = [page for page in run.store.fetch(first.staging.names[:3], run.method.page_shape).result() if page]
    third.load(pages, 2, 20)
    run.feed(token_ids(20, seed=9), third)
    run.decode(1, first, third)
    stats = [one.stats() for one in (first, second, third)]
    held = [one.bits(side) for one in (first, second, third) for side in (0, 1)]
    for one in (first, second, third):
        one.close()
    return [*stats, *held, *bits]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [*((name, "reference") for name in PRESETS), *((name, "cuda") for name in ("balanced", "in time", "fp16"))],
)
def test_every_path_makes_the_bits_of_a_cpu(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "cuda" and shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for a CPU")
    if kernel == "cuda":
        monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 128)
    at_home = Run(name, kernel=kernel)
    expected = whole_life(at_home)
    with PretendedDevice(addresses=kernel == "cuda") as device:
        away = Run(name, device, kernel)
        assert away.method.device == DEVICE
        got = whole_life(away)
    assert all(map(torch.equal, away.shown, at_home.shown))
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other
    if kernel == "cuda":
        for run in (at_home, away):
            attention = run.method.attention
            assert isinstance(attention, CudaAttention)
            assert set(attention.fallbacks) == {PROMPT_OF_REFERENCE}
            assert "split" in attention.launcher.launched  # type: ignore[attr-defined]
    stats = expected[0]
    if name in ("balanced", "paper"):
        assert min(stats.exceptions, stats.rows_requantized, stats.rows_narrowed) > 0
    assert (stats.rows_corrected > 0) == (name == "in time")


@torch.no_grad()
def test_a_padded_batch_and_beams() -> None:
    ids, mask = token_ids(2 * 26).view(2, 26), torch.ones(2, 26, dtype=torch.long)
    mask[1, :7] = 0

    def logits(run: Run) -> list[torch.Tensor]:
        place, cache = run.method.device, QAQCache(method=run.method)

        def fed(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            given = {"input_ids": ids.to(place), "attention_mask": mask.to(place), "qaq_cache": cache}
            out: torch.Tensor = run.model(**given, past_key_values=cache, use_cache=True).logits.cpu()
            return out

        made = [fed(ids[:, :24], mask[:, :24]), fed(ids[:, 24:25], mask[:, :25])]
        beams = torch.tensor([1, 0, 1])
        cache.reorder_cache(beams.to(place))
        return [*made, fed(ids[beams, 25:], mask[beams])]

    expected = logits(Run("fp16"))
    with PretendedDevice() as device:
        got = logits(Run("fp16", device))
    assert all(map(torch.equal, got, expected))


@torch.no_grad()
def test_rows_in_half_precision_become_codes() -> None:
    """What no preset does: half precision has no bit planes, so codes are made of it, where it is."""

    def narrowed(run: Run) -> list[torch.Tensor]:
        sequence = run.sequence()
        run.feed(token_ids(PROMPT), sequence)
        packed, index = sequence.packed, torch.arange(0, 90, 3, device=run.method.device)
        widths = torch.where(index % 2 == 0, 8, 3).to(torch.uint8)
        packed.change(KEY, index, widths, widths[:0], torch.zeros_like(index))
        held = [rows for pool in packed.sides[KEY].pools for rows in pool.rows.values()]
        return [part.cpu() for part in (packed.tags, *held)]

    expected = narrowed(Run("fp16"))
    with PretendedDevice() as device:
        got = narrowed(Run("fp16", device))
    assert all(map(torch.equal, got, expected))
    assert len(expected) == 1 + 2 * 3  # tags, and three widths in each of two blocks


def test_the_device_refuses_what_a_gpu_refuses_and_counts() -> None:
    with PretendedDevice() as device:
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert isinstance(there, OnDevice)
        for mixed in (lambda: there + here, lambda: torch.cat([here, there]), lambda: here.add_(there)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="address"):
            there.data_ptr()
        with device.counted() as count:
            total = (there.view(3, 1) * 2 + torch.tensor(1.0)).sum()
            assert count.launches == {"mul": 1, "add": 1, "sum": 1}
            assert not count.waits
            assert float(total) == 9
            assert count.waits == {"item": 1}
            there[1:].copy_(here[1:])
            assert there[there > 0].tolist() == [1, 1, 1]
            assert (count.copies_in.total(), count.copies_out.total()) == (1, 0)
            assert torch.equal(there.cpu(), here)
            assert (count.copies_out.total(), count.waits.total()) == (1, 5)
