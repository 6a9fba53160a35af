"""Decode attention in CUDA C++ (kernels/cuda/): `prepare`, `split`, `merge` for a layer of a batch, and `observe`.

Which machine runs them is a `Launcher`'s: a GPU's driver, or a CPU that pretends to be one in tests.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from qaq_core.allocation.attention_statistics import Observer, StepObserver
from qaq_core.attention.cuda_rows import TiledRows
from qaq_core.attention.cuda_tables import Tables, near_angles, refused_codec, refused_layout
from qaq_core.attention.fallback import KernelWithFallback
from qaq_core.attention.reference import LayerTokens, ReferenceAttention
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.kernels.cuda import emulation, structures
from qaq_core.kernels.cuda.driver import DriverLauncher, missing_kernels
from qaq_core.kernels.cuda.structures import DTYPES, HEAD_DIMS, MOST_GROUP, NEAR, QUAD, REDUCTIONS
from qaq_core.quantization.codecs import Codec
from qaq_core.quantization.transforms import LinearTransform, Rotation
from qaq_core.storage.packed import PackedTokens


class Launcher(Protocol):
    """Runs kernels.

    Attributes:
        block: packed tokens of a block. threads: of a block of `split`.
    """

    name: str
    block: int
    threads: int

    def launch(
        self, kernel: str, head_dim: int, grid: tuple[int, int, int], threads: int, args: ctypes.Structure
    ) -> None: ...


def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, with what to do about it; None if they can."""
    if device.type == "cpu":
        return emulation.missing()
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return missing_kernels(torch.cuda.get_device_capability(device))


def launcher(device: torch.device) -> Launcher:
    """What runs kernels on a device.

    Raises:
        ConfigError: nothing does; with what to do about it.
    """
    reason = missing(device)
    if reason is not None:
        raise ConfigError(f"QAQ_KERNEL=cuda: {reason}")
    return DriverLauncher(device) if device.type == "cuda" else emulation.Emulation()


class CudaAttention(KernelWithFallback):
    """The operation in CUDA C++ for one query position.

    It keeps tiled copies of packed rows, as many bytes as `tiled_bytes`, for as long as the tokens live.
    """

    def __init__(self, codec: Codec, device: torch.device, launcher: Launcher) -> None:
        super().__init__(ReferenceAttention(codec, device), "CUDA")
        self._codec, self._device, self._launcher = codec, device, launcher
        self._refused = refused_codec(codec)
        self._tables: dict[int, Tables] = {}
        self._near: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows: weakref.WeakKeyDictionary[PackedTokens, dict[int, TiledRows]] = weakref.WeakKeyDictionary()
        self._factors: weakref.WeakKeyDictionary[Rotation, torch.Tensor] = weakref.WeakKeyDictionary()

    @property
    def name(self) -> str:
        return self._launcher.name

    @property
    def tiled_bytes(self) -> int:
        """Allocated bytes of tiled copies, of all sequences."""
        return sum(rows.nbytes for layers in self._rows.values() for rows in layers.values())

    def unsupported(self, query: torch.Tensor, tokens: LayerTokens, observer: Observer | None) -> str | None:
        """See `KernelWithFallback`."""
        reason = super().unsupported(query, tokens, observer)
        if reason is not None:
            return reason
        head_dim, group = query.shape[-1], query.shape[-3] // tokens.keys.shape[0]
        if head_dim not in HEAD_DIMS:
            return f"a head_dim of {head_dim}"
        if group > MOST_GROUP:
            return f"{group} query heads for a KV head"
        return self._refused or refused_layout(self._codec, head_dim)

    def decode(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[StepObserver | None],
    ) -> torch.Tensor:
        """See `KernelWithFallback`."""
        if query.dtype not in DTYPES:
            query = query.float()
        query = query.contiguous()
        step = _Step(self, query, tokens, scaling, sliding_window, observers)
        batch, query_heads, dim = query.shape
        heads, quads, splits = step.heads, step.quads, step.splits
        rows = (batch, heads, quads)
        asked, framed, turned = self._empty(3, *rows, QUAD, dim).unbind()
        fragments, factors = self._empty(*rows, dim // 16, 32, 4), self._empty(*rows, 2, QUAD)
        sums, norms = self._empty(*rows, splits, QUAD, dim), self._empty(*rows, splits, QUAD, 2)
        out, totals = self._empty(batch, query_heads, dim), self._empty(batch, query_heads, 2)
        on_host, on_device = step.given, step.layout
        prepare = structures.PrepareArgs(on_host, on_device, query.data_ptr())
        prepare.dtype = DTYPES[query.dtype]
        prepare.asked, prepare.framed, prepare.turned = asked.data_ptr(), framed.data_ptr(), turned.data_ptr()
        prepare.fragments, prepare.factors = fragments.data_ptr(), factors.data_ptr()
        launch = self._launcher.launch
        launch("prepare", dim, (heads * quads, batch, 1), 128, prepare)
        if splits:
            made = (part.data_ptr() for part in (framed, fragments, turned, factors, sums, norms))
            split = structures.SplitArgs(on_host, on_device, *made)
            launch("split", dim, (splits, heads * quads, batch), self._launcher.threads, split)
        merge = structures.MergeArgs(on_host, on_device, asked.data_ptr(), sums.data_ptr(), norms.data_ptr())
        merge.out, merge.out_dtype, merge.totals = out.data_ptr(), DTYPES[out.dtype], totals.data_ptr()
        launch("merge", dim, (heads * quads, batch, 1), 128, merge)
        if step.watched:
            longest = max(mine.length for mine in tokens)
            observe = structures.ObserveArgs(on_host, totals.data_ptr())
            launch("observe", dim, (-(-longest // 256), heads, batch), 256, observe)
        for observer, total in zip(observers, totals, strict=True):
            if observer is not None and observer.log_sums is not None:
                observer.log_sums.copy_(total[:, 0] + total[:, 1].log())
        return out.unsqueeze(2)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=self._device)

    def tables(self, packed: PackedTokens) -> Tables:
        """The tables for rows of a head_dim."""
        dim = packed.head_dim
        if dim not in self._tables:
            layouts = packed.quantizer.layout(KEY, dim), packed.quantizer.layout(VALUE, dim)
            self._tables[dim] = Tables(self._codec, layouts, self._device)
        return self._tables[dim]

    def rows(self, packed: PackedTokens, layer: int) -> TiledRows:
        """A layer's tiled rows, up to date."""
        layers = self._rows.setdefault(packed, {})
        mine = layers.setdefault(layer, TiledRows(self._launcher.block, self._device))
        mine.update(packed, layer)
        return mine

    def near(self, transform: LinearTransform, layer: int, angles: torch.Tensor) -> torch.Tensor:
        """`near_angles` of a layer."""
        frequencies = transform.frequencies
        key = frequencies.data_ptr(), layer
        if key not in self._near:  # what is kept here cannot share its address with another
            self._near[key] = frequencies, near_angles(angles)
        return self._near[key][1]

    def factors(self, rotation: Rotation) -> torch.Tensor:
        """2 / |v|² of all reflections, float32 [layers, kv_heads, dim - 1]; 0 of a vector of zeros."""
        if rotation not in self._factors:
            layers, heads, dim = rotation.shape
            ends = torch.arange(dim, 1, -1, device=self._device).cumsum(0)
            sums = rotation.reflections.double().square().cumsum(-1)[..., ends - 1]
            squares = sums.diff(dim=-1, prepend=sums.new_zeros(layers, heads, 1))
            self._factors[rotation] = torch.where(squares > 0, 2 / squares.clamp_min(1), 0.0).float()
        return self._factors[rotation]


class _Step:
    """What a decode step's kernels are given, and what has to live until they are done: all on torch's stream."""

    def __init__(
        self,
        attention: CudaAttention,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[StepObserver | None],
    ) -> None:
        self._attention, self._window = attention, sliding_window
        self._held: list[torch.Tensor] = []
        self.heads = tokens[0].keys.shape[0]
        self.group = query.shape[1] // self.heads
        self.quads = -(-self.group // QUAD)
        self.splits = 0
        self.watched = False
        self.layout = structures.Layout()
        types = {mine.keys.dtype for mine in tokens}
        self._dtype = types.pop() if len(types) == 1 else torch.float32
        described = (structures.Sequence * len(tokens))()
        for one, mine, observe in zip(described, tokens, observers, strict=True):
            self._exact(one, mine)
            if observe is not None:
                self._watch(one, mine, observe)
            if mine.packed is not None and len(mine.packed):
                self._packed(one, mine.packed, mine.layer)
        table = torch.frombuffer(bytearray(described), dtype=torch.uint8)
        if query.device.type != "cpu":
            table = table.pin_memory().to(query.device, non_blocking=True)
        self._held.append(table)
        self.given = structures.Batch(
            table.data_ptr(), len(tokens), self.heads, self.group, self.quads, self.splits, DTYPES[self._dtype], scaling
        )

    def _exact(self, one: structures.Sequence, tokens: LayerTokens) -> None:
        for side, rows in enumerate((tokens.keys, tokens.values)):
            rows = self._keep(rows.to(self._dtype))
            one.exact[side], one.exact_stride[side] = rows.data_ptr(), rows.stride(0)
        one.sinks, one.exact_tokens, one.tokens = tokens.sinks, tokens.keys.shape[1], tokens.packed_tokens
        one.first = max(0, tokens.length - self._window) if self._window else 0
        one.new_place = -1

    def _watch(self, one: structures.Sequence, tokens: LayerTokens, observe: StepObserver) -> None:
        self.watched = True
        scores = self._keep(observe.into.new_empty(self.heads * self.group, tokens.length))
        one.scores, one.statistic = scores.data_ptr(), observe.into.data_ptr()
        one.reduction = REDUCTIONS[observe.reduction]

    def _packed(self, one: structures.Sequence, packed: PackedTokens, layer: int) -> None:
        rows = self._attention.rows(packed, layer)
        one.runs, one.blocks, one.start = rows.runs.data_ptr(), rows.runs.shape[1], packed.start
        self.splits = max(self.splits, one.blocks)
        tags = packed.tags[layer]
        one.tags, one.tag_stride = tags.data_ptr(), tags.stride(0)
        for side in (KEY, VALUE):
            meta = packed.sides[side].meta
            mine = meta[min(layer, meta.shape[0] - 1)]
            one.meta[side], one.meta_stride[side] = mine.data_ptr(), mine.stride(0) if len(mine) > 1 else 0
        tables, layout = self._attention.tables(packed), self.layout
        for name in ("units", "planes", "deepest", "pools", "levels", "scales"):
            setattr(layout, name, getattr(tables, name).data_ptr())
        transform = packed.quantizer.transform
        if isinstance(transform, LinearTransform):
            self._transform(one, transform, layer, packed.stop)

    def _transform(self, one: structures.Sequence, transform: LinearTransform, layer: int, stop: int) -> None:
        keys, values = transform.maps()
        self.layout.query_map, self.layout.output_map = keys[layer].data_ptr(), values[layer].data_ptr()
        mean, angles = transform.center(layer, max(stop, NEAR))
        self._keep(angles)
        if not self.layout.angles or angles.shape[0] > self._positions:
            self.layout.angles, self._positions = angles.data_ptr(), angles.shape[0]
        self.layout.near = self._attention.near(transform, layer, angles).data_ptr()
        one.key_mean, one.value_mean = self._keep(mean).data_ptr(), transform.value_mean[layer].data_ptr()
        for side, rotation in enumerate(transform.rotation or ()):
            turn, factors = one.turns[side], self._attention.factors(rotation)
            turn.vectors, turn.factors = rotation.reflections[layer].data_ptr(), factors[layer].data_ptr()
            turn.before, turn.after = rotation.before[layer].data_ptr(), rotation.after[layer].data_ptr()

    _positions = 0

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._held.append(tensor)
        return tensor
