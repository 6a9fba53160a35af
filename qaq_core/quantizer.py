"""The quantizer: a frame and a codec. The worker and the cache service run this same code."""

from __future__ import annotations

import json

import numpy as np
import torch
from blake3 import blake3
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from qaq_core import codecs
from qaq_core.codecs import Codec
from qaq_core.errors import ConfigError, QuantizationError
from qaq_core.frames import Frame, LinearFrame, PlainFrame
from qaq_core.originals import RowRequest
from qaq_core.packing import HALF, RowLayout, pack_half

_SETTINGS = "codec_settings"


class Quantizer:
    """Makes packed rows of originals.

    Attributes:
        id: 16 bytes that name frame and codec; the cache service looks them up by it.
        meta_bytes: scale bytes of a row.
    """

    def __init__(self, frame: Frame, codec: Codec) -> None:
        self.frame, self.codec = frame, codec
        self.meta_bytes = codec.meta_bytes
        self._layouts: dict[tuple[int, int], RowLayout] = {}
        self.id = blake3(self.to_bytes()).digest(16)

    def layout(self, side: int, head_dim: int) -> RowLayout:
        """Which plane of which octet each byte of a row holds."""
        key = (side, head_dim)
        if key not in self._layouts:
            self._layouts[key] = RowLayout(self.codec.order(side, head_dim))
        return self._layouts[key]

    def rows(self, side: int, originals: torch.Tensor, start: int) -> torch.Tensor:
        """Rows to quantize of consecutive positions.

        Args:
            originals: [layers, kv_heads, tokens, head_dim] of positions start, start+1, ….
        Returns:
            float32, same shape.
        Raises:
            QuantizationError: NaN or infinite; names the layer.
        """
        rows = self.frame.rows(side, originals, start)
        finite = torch.isfinite(rows.sum((1, 2, 3)))
        if not bool(finite.all()):
            bad = int(torch.nonzero(~finite)[0, 0])
            raise QuantizationError(f"layer {bad}: {'value' if side else 'key'} rows hold NaN or infinity")
        return rows

    def encode(self, side: int, rows: torch.Tensor, meta: torch.Tensor, have: int, want: int) -> torch.Tensor:
        """The bytes of rows that those of width `want` have and those of width `have` lack; of HALF all.

        Args:
            rows: float32 [n, head_dim]. meta: uint8 [n, meta_bytes].
        Returns:
            uint8 [n, bytes].
        """
        head_dim = rows.shape[1]
        scale, offset = self.codec.affine(meta)
        units = (rows if offset is None else rows - offset.unsqueeze(-1)) / self.spread(scale, head_dim)
        if want == HALF:
            return pack_half(units)
        layout = self.layout(side, head_dim)
        return layout.pack(self.codec.codes(units), layout.row_bytes(have), layout.row_bytes(want))

    def spread(self, scale: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Scales [..., 1 or 2] of rows as those of their dims: [..., 1 or head_dim]."""
        first = 8 * self.codec.split
        if not first:
            return scale
        dims = torch.tensor([first, head_dim - first], device=scale.device)
        return scale.repeat_interleave(dims, -1, output_size=head_dim)

    def encode_each(
        self, side: int, rows: torch.Tensor, meta: torch.Tensor, have: torch.Tensor, want: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What rows lack that have some width and want another, see `encode`.

        Args:
            rows: float32 [n, head_dim]. meta: uint8 [n, meta_bytes]. have, want: uint8 [n].
        Returns:
            uint8 bytes, one row after another; int64 [n], where a row's begin.
        """
        sizes = torch.where(want == HALF, HALF, want.long() - have) * rows.shape[1] // 16
        offsets = sizes.cumsum(0) - sizes
        out = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=rows.device)
        kinds = have.long() * 256 + want
        for kind in kinds.unique().tolist():
            mine = torch.nonzero(kinds == kind).squeeze(1)
            made = self.encode(side, rows[mine], meta[mine], kind // 256, kind % 256)
            out[offsets[mine][:, None] + torch.arange(made.shape[1], device=rows.device)] = made
        return out, offsets

    def requantize(self, request: RowRequest, originals: torch.Tensor) -> np.ndarray:
        """Bytes that a request's rows lack, one row after another.

        Args:
            originals: float [n, head_dim], the request's rows in full precision.
        Returns:
            uint8 bytes, as `RowReply.planes`.
        """
        layer, head, position, side, have, want = (
            torch.from_numpy(getattr(request, name).astype(np.int64))
            for name in ("layer", "head", "position", "side", "have", "want")
        )
        meta, sizes = torch.from_numpy(request.meta), torch.from_numpy(request.payload_bytes())
        ends = sizes.cumsum(0)
        answer = torch.empty(int(sizes.sum()), dtype=torch.uint8)
        for one in side.unique().tolist():
            mine = torch.nonzero(side == one).squeeze(1)
            rows = self.frame.rows_at(one, originals[mine], layer[mine], head[mine], position[mine])
            made, offsets = self.encode_each(one, rows, meta[mine], have[mine], want[mine])
            shift = (ends[mine] - sizes[mine] - offsets).repeat_interleave(sizes[mine])
            answer[torch.arange(len(made)) + shift] = made
        raw: np.ndarray = answer.numpy()
        return raw

    def to_bytes(self) -> bytes:
        """Frame and codec as safetensors; the same tables give the same bytes."""
        described = {"frame": self.frame.name, "codec": self.codec.settings()}
        note = torch.frombuffer(bytearray(json.dumps(described, sort_keys=True).encode()), dtype=torch.uint8)
        # Clones: a file cannot hold tensors that share memory, as keys' and values' tables may.
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in self.frame.tensors().items()}
        return save_tensors({**tensors, _SETTINGS: note})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Quantizer:
        tensors = load_tensors(raw)
        described = json.loads(bytes(tensors.pop(_SETTINGS).numpy()))
        frames = {PlainFrame.name: PlainFrame, LinearFrame.name: LinearFrame}
        if described["frame"] not in frames:
            raise ConfigError(f"unknown frame {described['frame']!r}")
        return cls(frames[described["frame"]](**tensors), codecs.make(**described["codec"]))
