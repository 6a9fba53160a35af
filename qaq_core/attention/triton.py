"""Decode attention in Triton, for GPUs; on a CPU under Triton's interpreter (TRITON_INTERPRET=1), for tests.

Three launches do one layer of a whole batch of sequences, see `triton_kernels`. They read the packed pools as they
are. What they have to know of each sequence goes to the device as one table of numbers and addresses. Scratch is
torch's and given back when a call returns: on the device all is in the order of torch's stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qaq_core.allocation.attention_statistics import Observer, StepObserver
from qaq_core.attention.fallback import KernelWithFallback, restored_outputs, transformed_queries
from qaq_core.attention.reference import LayerTokens, ReferenceAttention
from qaq_core.attention.triton_table import NIBBLE, Table
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import WIDTHS
from qaq_core.quantization.bit_planes import RowLayout
from qaq_core.quantization.codecs import Codec
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.storage import packed as packed_rows

SPLIT = 512
"""Packed tokens of a program."""
TILE = 32
"""Tokens that a program decodes at a time."""
GROUP = 16
"""Most query heads of a KV head."""

_NOWHERE = 1 << 30
"""The place of units that pad a layout: no row holds it."""


def missing(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device, with what to do about it; None if they can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed; pip install 'qaq-kv[triton]'"
    interpreted = bool(triton.knobs.runtime.interpret)
    if device.type == "cpu" and not interpreted:
        return "on a CPU it runs under Triton's interpreter only, for tests; set TRITON_INTERPRET=1"
    if device.type != "cpu" and interpreted:
        return f"Triton's interpreter does not run on {device.type}; unset TRITON_INTERPRET"
    return None


class TritonAttention(KernelWithFallback):
    """The operation in Triton for one query position."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        reason = missing(device)
        if reason is not None:
            raise ConfigError(f"QAQ_KERNEL=triton: {reason}")
        from qaq_core.attention import triton_kernels

        super().__init__(ReferenceAttention(codec, device), "Triton")
        self._kernels, self._device = triton_kernels, device
        # A code's missing planes are 0, so a level stands where they are.
        levels = torch.zeros(9, 256)
        for bits in range(1, 9):
            levels[bits] = codec.levels(bits).repeat_interleave(256 >> bits)
        self._levels = levels.to(device)
        # With one meta byte a row, scales are looked up; other codecs' parameters are passed as numbers.
        self._by_meta = codec.meta_bytes == 1
        self._has_offset = codec.affine(torch.zeros(1, codec.meta_bytes, dtype=torch.uint8))[1] is not None
        scales = torch.ones(256, 1)
        if self._by_meta:
            scales = codec.affine(torch.arange(256, dtype=torch.uint8).unsqueeze(-1))[0]
        self._scales = scales.contiguous().to(device)
        self._layouts: dict[tuple[RowLayout, RowLayout], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @property
    def name(self) -> str:
        return "triton (interpreted)" if self._device.type == "cpu" else "triton"

    def unsupported(self, query: torch.Tensor, tokens: LayerTokens, observer: Observer | None) -> str | None:
        """See `KernelWithFallback`."""
        group = query.shape[-3] // tokens.keys.shape[0]
        too_many = f"{group} query heads for a KV head" if group > GROUP else None
        sums = "sums of scores" if isinstance(observer, StepObserver) and observer.log_sums is not None else None
        return super().unsupported(query, tokens, observer) or too_many or sums

    def decode(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[StepObserver | None],
    ) -> torch.Tensor:
        """See `KernelWithFallback`."""
        # A transform takes queries as [query_heads, n, head_dim]; here n counts sequences.
        query = (query.transpose(0, 1).float() * scaling).contiguous()
        heads, batch, dim = query.shape
        layer, kv_heads = tokens[0].layer, tokens[0].keys.shape[0]
        packed = next((mine.packed for mine in tokens if mine.packed is not None), None)
        transforms = [(mine.packed or packed).quantizer.transform for mine in tokens] if packed is not None else []
        octets = _power_of_two(dim // 8)
        per_block = -(-packed_rows.BLOCK_TOKENS // SPLIT)
        splits = per_block * max(mine.packed.blocks if mine.packed else 0 for mine in tokens)
        table = Table(self._device, per_block, sliding_window, self._by_meta)
        sequences = table.fill(tokens, observers, heads)
        shape = (batch, kv_heads, heads // kv_heads, dim)
        peaks, masses = self._empty(2, batch, kv_heads, splits, GROUP).unbind()
        sums = self._empty(batch, kv_heads, splits, GROUP, 8 * octets)
        if packed is not None:
            asked = transformed_queries(transforms, layer, query)
            stop = max(TILE, max(mine.packed.stop for mine in tokens if mine.packed))
            centers = [center for own in transforms if (center := own.center(layer, stop)) is not None]
            mean, angles = self._scales, self._scales
            if centers:
                mean, angles = torch.stack([center[0] for center in centers]), centers[0][1]
            self._kernels.packed_split[splits, kv_heads, batch](
                *(sequences, query, asked, mean, angles, *self._layout(packed.quantizer, dim)),
                *(self._levels, self._scales, peaks, masses, sums, *shape),
                *(splits, packed_rows.BLOCK_TOKENS, per_block),
                HALF_DIM=_power_of_two(max(16, dim // 2)),
                OCTETS=octets,
                FIRST_OCTETS=packed.quantizer.codec.split or octets,
                PARTS=self._scales.shape[1],
                BY_META=self._by_meta,
                HAS_OFFSET=self._has_offset,
                HAS_MEAN=len(centers) > 0,
                SPLIT=SPLIT,
                TILE=TILE,
                num_warps=min(16, max(4, octets)),
            )
        exact, middle = self._empty(2, heads, batch, dim).unbind()
        mass, norms = self._empty(heads, batch), self._empty(heads, batch, 2)
        self._kernels.merge[kv_heads, batch](
            *(sequences, query, peaks, masses, sums, exact, middle, mass, norms, *shape, splits),
            OCTETS=octets,
            EXACT_TYPE=getattr(self._kernels.tl, str(table.exact_type).removeprefix("torch.")),
            TILE=TILE,
        )
        if table.watched:
            longest = max(mine.length for mine in tokens)
            grid = (-(-longest // SPLIT), kv_heads, batch)
            self._kernels.observe[grid](sequences, norms, batch, shape[2], TILE=SPLIT)
        out = exact.add_(restored_outputs(transforms, layer, middle)) if transforms else exact
        taken = [one for own in transforms if (one := own.value_center(layer)) is not None]
        if taken:
            out.addcmul_(mass.unsqueeze(-1), torch.stack(taken, 1).repeat_interleave(heads // kv_heads, 0))
        return out.transpose(0, 1).unsqueeze(2)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=self._device)

    def _layout(self, quantizer: Quantizer, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int32 bytes of a row [16]; most planes of an octet [2, 16]; places of units [2, octets, 8]."""
        layouts = quantizer.layout(KEY, dim), quantizer.layout(VALUE, dim)
        if layouts not in self._layouts:
            widths = torch.zeros(NIBBLE, dtype=torch.int32)
            widths[: len(WIDTHS)] = torch.tensor([layouts[0].row_bytes(width) for width in WIDTHS])
            depth = torch.zeros(2, NIBBLE, dtype=torch.int32)
            units = torch.full((2, _power_of_two(dim // 8), 8), _NOWHERE, dtype=torch.int32)
            for side, layout in enumerate(layouts):
                planes = [int(layout.planes[width].max()) for width in WIDTHS[:-1]]
                depth[side, : len(planes)] = torch.tensor(planes)
                for octet in range(dim // 8):
                    units[side, octet] = torch.nonzero(layout.order == octet).squeeze(1)
            made = widths.to(self._device), depth.to(self._device), units.to(self._device)
            self._layouts[layouts] = made
        return self._layouts[layouts]


def _power_of_two(n: int) -> int:
    """The next one, n itself included."""
    return 1 << (n - 1).bit_length()
