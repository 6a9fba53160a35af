"""Decode steps with CUDA's or Triton's kernels on a pretended device, and what they ask of it.

`python -m tests.launches` prints it for a model of the demo model's shape, whose numbers are random and whose
calibration is none.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qaq_core.attention import CudaAttention, triton, triton_kernels
from qaq_core.cache import backends
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.calibration import Calibration
from qaq_core.kernels.cuda.emulation import Emulation
from qaq_core.quantization import adaptation
from tests.core.tiny_models import token_ids
from tests.devices import Count, PretendedDevice, host_tensor

KERNELS = {"triton": ("packed_split", "merge", "observe"), "cuda": ("prepare", "split", "merge", "observe")}
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64
"""Of SmolLM2-135M."""
PROMPT = 196
"""The query after it is observed, and the fourth one is followed by a review."""


@contextmanager
def entered() -> Iterator[PretendedDevice]:
    """A device with kernels, on which short sequences have a rotation of their own.

    Triton's interpreter takes one tile at a time.
    """
    with pytest.MonkeyPatch.context() as patch, PretendedDevice(addresses=True) as device:
        for name, tokens in (("MEANS_TOKENS", 16), ("ROTATION_TOKENS", 1)):
            patch.setattr(adaptation, name, tokens)
        for name in ("SPLIT", "TILE"):
            patch.setattr(triton, name, 64)
        patch.setattr(triton, "missing", lambda place: None)
        patch.setattr(backends, "cuda_launcher", lambda place: Emulated(device))
        yield device


class Emulated(Emulation):
    """A launcher of CUDA's kernels whose launches are counted.

    Attributes:
        run: see `Launched`.
    """

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self._device, self.run = device, True

    def launch(
        self, kernel: str, head_dim: int, grid: tuple[int, int, int], threads: int, args: ctypes.Structure
    ) -> None:
        self._device.note("launches", kernel)
        if self.run:
            super().launch(kernel, head_dim, grid, threads, args)


class Launched:
    """A module of Triton kernels whose launches are counted.

    Attributes:
        run: whether they run, too: in Triton's interpreter, on host memory. Otherwise results are whatever was there.
    """

    def __init__(self, device: PretendedDevice) -> None:
        self._device, self.run = device, True

    def __getattr__(self, name: str) -> Any:
        return _Launcher(self, name) if name in KERNELS["triton"] else getattr(triton_kernels, name)

    def launch(self, name: str, grid: tuple[int, ...], args: Sequence[Any], settings: dict[str, Any]) -> None:
        self._device.note("launches", name)
        if self.run:
            getattr(triton_kernels, name)[grid](*map(host_tensor, args), **settings)


@dataclass(frozen=True)
class _Launcher:
    kernels: Launched
    name: str

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **settings: self.kernels.launch(self.name, grid, args, settings)


class Decoding:
    """Some sequences after a prompt.

    Args:
        device: None for the CPU, with torch's kernels.
        tokens: of each prompt.
        kernel: the device's, "cuda" or "triton".
    """

    def __init__(
        self,
        model: Any,
        known: Calibration,
        device: PretendedDevice | None,
        batch: int,
        tokens: int,
        kernel: str = "cuda",
    ) -> None:
        self._device, self._model = device, model
        if device is not None:
            device.module(model)
        kernel = "reference" if device is None else kernel
        method = make_method(model, calibration=known, target_bits=3.0, kernel=kernel)
        self._kernels: Emulated | Launched
        if isinstance(method.attention, CudaAttention):
            self._kernels = method.attention.launcher  # type: ignore[assignment]
        elif device is not None:
            self._kernels = method.attention._kernels = Launched(device)  # type: ignore[attr-defined]
        self._place = method.device
        if device is not None:
            device.count = Count()
        self.sequences = [SequenceCache(method, wait=True) for _ in range(batch)]
        for seed, one in enumerate(self.sequences):
            self.feed(token_ids(tokens, seed=seed), [one])

    @torch.no_grad()
    def feed(self, ids: torch.Tensor, sequences: list[SequenceCache]) -> torch.Tensor:
        """Logits of a pass, where they were computed."""
        cache, start = QAQCache(sequences), sequences[0].length
        given: dict[str, Any] = {"use_cache": True, "past_key_values": cache, "qaq_cache": cache}
        places = torch.arange(start, start + ids.shape[1]).expand(len(sequences), -1)
        cache.place(places)
        both = torch.stack([ids, places]).to(self._place, non_blocking=True)
        logits: torch.Tensor = self._model(input_ids=both[0], position_ids=both[1], **given).logits
        return logits

    def step(self, token: int) -> torch.Tensor:
        """Logits of a token that all sequences get."""
        return self.feed(torch.full((len(self.sequences), 1), token), self.sequences).cpu()

    def counts(self, steps: int) -> list[Count]:
        """Of steps whose kernels do not run, so that their logits mean nothing."""
        assert self._device is not None
        self._kernels.run = False
        made = []
        for token in range(10, 10 + steps):
            with self._device.counted() as count:
                self.step(token)
            made.append(count)
        return made


def demo_shape() -> tuple[Any, Calibration]:
    """A model of the demo model's shape, but for its width, and tables of its size."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    dims, octets = (LAYERS, KV_HEADS, HEAD_DIM), torch.full((LAYERS, KV_HEADS, HEAD_DIM // 8), 0.5)
    eye, mean = torch.eye(HEAD_DIM).half().expand(*dims, HEAD_DIM).clone(), torch.full(dims, 0.5)
    return model, Calibration(eye, eye.clone(), mean, mean.clone(), octets, octets.clone(), torch.ones(dims[:2]))


def main() -> None:
    for kernel, batch in (("cuda", 1), ("cuda", 4), ("triton", 1)):
        print(f"{kernel}, sequences: {batch}")
        with entered() as device:
            decoding = Decoding(*demo_shape(), device, batch, PROMPT, kernel)
            print(f"    prompts of {PROMPT} tokens: {device.count}")
            for name, count in zip(("first, observed", "plain", "plain"), decoding.counts(3), strict=True):
                print(f"    a step ({name}): {count}")
                if "-v" in sys.argv and name == "plain":
                    print(dict(count.launches), dict(count.places))


if __name__ == "__main__":
    main()
