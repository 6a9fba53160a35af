"""What a decoder layer does to few rows outside of attention, in C++ (csrc/dense.h). `models.dense` has the same in
torch, which defines the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import byref, c_float, c_int32, c_void_p
from typing import Any

import torch

from qaq_core.kernels.library import checked
from qaq_core.kernels.structures import Heads, Weights

MOST_ROWS = 32
"""Of a product in C++. With more rows the library that torch uses is as fast, as it goes through weights in blocks."""
GATES = {"silu": 0, "gelu_pytorch_tanh": 1}
"""QaqGate of csrc/dense.h, by transformers' names."""

Linear = Callable[[torch.Tensor], torch.Tensor]


class NativeDense:
    """See `models.dense.TorchDense`. Rows are contiguous float32 on the CPU, and 16 divides their sizes."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def linear(self, weights: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> Linear:
        """The product of rows [rows, inputs] with weights [outputs, inputs], which are read where they lie."""
        held = [(w.detach(), None if b is None else b.detach()) for w, b in weights]
        table = (Weights * len(held))(*(_described(w, b) for w, b in held))
        outputs = sum(len(w) for w, _ in held)

        def multiply(x: torch.Tensor) -> torch.Tensor:
            if len(x) > MOST_ROWS:
                return torch.cat([torch.nn.functional.linear(x, w, b) for w, b in held], -1)
            return self._multiply(x, table, len(table), outputs)

        return multiply

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product with one layer's weights, [rows, outputs]."""
        return self._multiply(x, _described(weight, bias), 1, len(weight))

    def _multiply(self, x: torch.Tensor, table: Any, count: int, outputs: int) -> torch.Tensor:
        out = x.new_empty(len(x), outputs)
        rows = c_void_p(x.data_ptr()), c_int32(len(x)), c_int32(x.shape[1])
        more = byref(table), c_int32(count), c_void_p(out.data_ptr()), c_int32(torch.get_num_threads())
        checked(self._library.qaq_multiply, *rows, *more)
        return out

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `TorchDense.norm`."""
        out = torch.empty_like(x)
        more = None if added is None else added.data_ptr()
        pointers = c_void_p(x.data_ptr()), c_void_p(more), c_void_p(weight.data_ptr())
        sizes = c_int32(x.shape[0]), c_int32(x.shape[1])
        checked(self._library.qaq_norm, *pointers, c_float(epsilon), *sizes, c_void_p(out.data_ptr()))
        return out

    def rotate(
        self,
        joint: torch.Tensor,
        heads: tuple[int, int, int],
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        epsilon: float,
        table: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `TorchDense.rotate`."""
        (query_heads, kv_heads, dim), (cos, sin), rows = heads, table, len(joint)
        query = joint.new_empty(rows, query_heads, dim)
        key, value = joint.new_empty(2, rows, kv_heads, dim)
        query_norm, key_norm = (None, None) if norms is None else (part.data_ptr() for part in norms)
        given = Heads(
            *(rows, query_heads, kv_heads, dim, joint.data_ptr(), query_norm, key_norm, epsilon),
            *(part.data_ptr() for part in (cos, sin, query, key, value)),
        )
        checked(self._library.qaq_rotate, byref(given))
        return query, key, value

    def gate(self, both: torch.Tensor, kind: str) -> torch.Tensor:
        """See `TorchDense.gate`."""
        rows, size = len(both), both.shape[1] // 2
        out = both.new_empty(rows, size)
        sizes = c_int32(GATES[kind]), c_int32(rows), c_int32(size)
        checked(self._library.qaq_gate, c_void_p(both.data_ptr()), *sizes, c_void_p(out.data_ptr()))
        return out


def _described(weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
    return Weights(weight.data_ptr(), None if bias is None else bias.data_ptr(), len(weight))
