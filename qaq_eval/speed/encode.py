"""Speed of packing originals, in torch and in C++, in one process and in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from qaq_core import Quantizer
from qaq_core.base.pages import KEY, PAGE_TOKENS, VALUE, PageShape
from qaq_core.base.rows import RowRequest
from qaq_core.base.widths import WIDTHS
from qaq_core.kernels import load_library, make_encoder
from qaq_core.quantization import LinearTransform, ProgressiveCodec, greedy_order

SHARES = (0.02, 0.05, 0.10, 0.15, 0.20, 0.20, 0.10, 0.08, 0.05, 0.03, 0.01, 0.01)
"""Shares of rows at each of WIDTHS, from 0; about those of `balanced` after a prompt."""
MEAN_BITS = sum(share * width / 2 for share, width in zip(SHARES, WIDTHS, strict=False))
PACK_TOKENS = 8
REQUEST_ROWS = 150
"""Rows that a session re-quantizes at a time."""


@dataclass(frozen=True)
class EncodeSpeed:
    """One kind of work by one implementation.

    Attributes:
        what: "prompt": keys and values of all layers of a prompt; "group": of the tokens that leave the
            residual window at a time; "request": scattered rows of a re-quantization request.
        milliseconds: median time. ratio: torch's time over this one's.
        cpu_milliseconds: median CPU time of all threads, without that of other processes.
    """

    what: str
    rows: int
    kernel: str
    milliseconds: float
    ratio: float
    cpu_milliseconds: float


@torch.inference_mode()
def encode_speed(
    shape: tuple[int, int, int], tokens: int, repeat: int, report: Callable[[str, float], None] | None = None
) -> list[EncodeSpeed]:
    """Times both implementations.

    Args:
        shape: (layers, KV heads, head_dim). tokens: of the prompt.
        repeat: calls of each.
    """
    layers, heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    made = random_quantizer(layers, heads, dim, generator)
    originals = torch.randn(layers, 2, heads, tokens, dim, generator=generator)
    request, request_rows = random_request(made, shape, tokens, generator)
    kernels = ["reference", *(["cpu"] if load_library() is not None else [])]
    rows = {"prompt": 2 * layers * heads * tokens, "group": 2 * layers * heads * PACK_TOKENS, "request": REQUEST_ROWS}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {(what, k): [] for what in rows for k in kernels}
    widths = _widths((2, layers, heads, tokens), generator)
    for i in range(repeat):
        for kernel in kernels:
            if report:
                report(f"encoding, {kernel}", i / repeat)
            quantizer, prompt = made.using(make_encoder(kernel)), originals.clone()
            group = originals[:, :, :, :PACK_TOKENS].half()
            calls: dict[str, Callable[[], object]] = {
                "prompt": lambda q=quantizer, p=prompt: _encode(q, p, widths),  # type: ignore[misc]
                "group": lambda q=quantizer, p=group: _encode(q, p, widths),  # type: ignore[misc]
                "request": lambda q=quantizer: q.requantize(request, request_rows),  # type: ignore[misc]
            }
            for what, call in calls.items():
                begun, used = time.perf_counter(), time.process_time()
                call()
                times[what, kernel].append((time.perf_counter() - begun, time.process_time() - used))
    taken = {key: [1e3 * median(part) for part in zip(*mine, strict=True)] for key, mine in times.items()}
    return [
        EncodeSpeed(what, rows[what], kernel, wall, taken[what, "reference"][0] / wall, cpu)
        for (what, kernel), (wall, cpu) in taken.items()
    ]


def _encode(quantizer: Quantizer, originals: torch.Tensor, widths: torch.Tensor) -> None:
    """Packs originals: transforms them to rows, and encodes the rows with their scales."""
    for side in (KEY, VALUE):
        rows = quantizer.rows(side, originals[:, side], 4, overwrite=True)
        meta = quantizer.meta(rows)
        want = widths[side, :, :, : rows.shape[2]].reshape(-1)
        quantizer.encode_each(side, rows, meta.view(len(want), -1), torch.zeros_like(want), want)


def random_quantizer(layers: int, heads: int, dim: int, generator: torch.Generator) -> Quantizer:
    """A quantizer like that of a calibrated model: dense matrices, and octets of decreasing importance."""
    matrices = torch.randn(2, layers, heads, dim, dim, generator=generator).div_(dim**0.5).add_(2 * torch.eye(dim))
    transform = LinearTransform(
        key_matrix=matrices[KEY].half(),
        value_matrix=matrices[VALUE].half(),
        key_mean=torch.randn(layers, heads, dim, generator=generator),
        value_mean=torch.randn(layers, heads, dim, generator=generator),
        frequencies=(10_000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))).unsqueeze(0),
        kind=torch.zeros(layers, dtype=torch.long),
    )
    order = greedy_order(torch.linspace(0, -3, dim // 8).exp())
    return Quantizer(transform, ProgressiveCodec([order, order]))


def _widths(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    drawn = torch.multinomial(torch.tensor(SHARES), int(np.prod(shape)), True, generator=generator)
    return torch.tensor(WIDTHS, dtype=torch.uint8)[drawn].view(shape)


def random_request(
    quantizer: Quantizer, shape: tuple[int, int, int], tokens: int, generator: torch.Generator
) -> tuple[RowRequest, torch.Tensor]:
    """A request for rows at random positions that gain one bit, and their originals."""
    layers, heads, dim = shape

    def drawn(most: int) -> np.ndarray:
        numbers: np.ndarray = torch.randint(0, most, (REQUEST_ROWS,), generator=generator).numpy()
        return numbers

    position, have = drawn(tokens), drawn(6)
    request = RowRequest(
        shape=PageShape(layers, heads, PAGE_TOKENS, dim, "float32"),
        page_ids={page: bytes(32) for page in np.unique(position // PAGE_TOKENS).tolist()},
        layer=drawn(layers).astype(np.int16),
        head=drawn(heads).astype(np.int16),
        position=position.astype(np.int32),
        side=drawn(2).astype(np.uint8),
        have=have.astype(np.uint8),
        want=(have + 2).astype(np.uint8),
        meta=np.full((REQUEST_ROWS, quantizer.meta_bytes), 0x77, np.uint8),
    )
    return request, torch.randn(REQUEST_ROWS, dim, generator=generator)


def parse_shape(shape: str) -> tuple[int, int, int]:
    """(layers, KV heads, head_dim) of "30/3/64"."""
    numbers = shape.split("/")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"{shape}: layers/KV heads/head_dim")
    layers, heads, dim = map(int, numbers)
    if dim % 16:
        raise ValueError(f"{shape}: head_dim is a multiple of 16")
    return layers, heads, dim
