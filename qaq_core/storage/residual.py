"""The residual window: tokens that are not quantized. Sinks, recent tokens, and a prompt during prefill.

They share one buffer, [sinks | recent | prompt]. A prompt is held in the model's dtype. After prefill, sinks and
recent tokens are held in the window's dtype: half precision where the model computes in float32. Originals are always
the model's own numbers, not these.
"""

from __future__ import annotations

import torch

from qaq_core.base.errors import QuantizationError
from qaq_core.base.pages import KEY, VALUE


class ResidualWindow:
    """Unquantized keys and values of one sequence.

    Args:
        dims: (layers, kv_heads, head_dim).
        capacity: tokens that the buffer has room for outside prefill.
        dtype: of the model. residual_dtype: of the buffer outside prefill.
    """

    def __init__(
        self,
        dims: tuple[int, int, int],
        capacity: int,
        dtype: torch.dtype,
        residual_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.held = 0
        self.capacity, self.dtype, self.residual_dtype = capacity, dtype, residual_dtype
        self._dims, self._device = dims, device
        self._buffer = self._new(0, residual_dtype)
        self._step: torch.Tensor | None = None
        self._incoming = 0
        self._overwritten = False

    @property
    def nbytes(self) -> int:
        return self._buffer.untyped_storage().nbytes()

    @property
    def residual_bytes(self) -> int:
        """Bytes of the buffer outside prefill."""
        layers, heads, dim = self._dims
        return layers * 2 * heads * self.capacity * dim * self.residual_dtype.itemsize

    def begin_prompt(self, tokens: int) -> None:
        """Makes room for a prompt in the model's dtype."""
        self._move(self.held + tokens, self.dtype)

    def load(self, originals: torch.Tensor) -> None:
        """Takes stored tokens of a prompt: [layers, 2, kv_heads, n, head_dim]."""
        stop = self.held + originals.shape[3]
        self._buffer[:, :, :, self.held : stop] = originals
        self.held = stop

    def end_prompt(self) -> None:
        """Shrinks the buffer to the window's size and dtype."""
        self._move(max(self.capacity, self.held), self.residual_dtype)

    def begin_step(self, n: int, prompt: bool) -> None:
        """Expects n tokens, layer by layer.

        Raises:
            QuantizationError: tokens were overwritten while packing, and packing failed.
        """
        if self._overwritten:
            raise QuantizationError("the tokens of this sequence could not be packed: begin a new sequence")
        self._incoming = n
        if prompt:
            return
        if self._buffer.shape[3] < self.held + n:
            self._move(max(self.capacity, self.held + n), self.residual_dtype)
        if self.dtype != self.residual_dtype:
            self._step = self._new(n, self.dtype)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes a layer's new keys and values [kv_heads, n, head_dim]; returns those of the whole window."""
        stop = self.held + self._incoming
        for side, new in ((KEY, keys), (VALUE, values)):
            self._buffer[layer, side, :, self.held : stop] = new
            if self._step is not None:
                self._step[layer, side] = new
        return self._buffer[layer, KEY, :, :stop], self._buffer[layer, VALUE, :, :stop]

    def tokens(self, layer: int, side: int) -> torch.Tensor:
        """The keys or values of a layer [kv_heads, held, head_dim]."""
        return self._buffer[layer, side, :, : self.held]

    def places(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the step's keys and values go, for a kernel that writes them itself.

        Returns:
            [layers, 2, kv_heads, room, head_dim], at the tokens from `held` on; and in the model's dtype
            [layers, 2, kv_heads, n, head_dim], or None if the first has that dtype.
        """
        return self._buffer, self._step

    def end_step(self, keep: int | None = None) -> torch.Tensor:
        """The originals [layers, 2, kv_heads, n, head_dim] of the step's first `keep` tokens, in the model's dtype.

        Later tokens of the step are dropped. All are kept if `keep` is not given.
        """
        keep = self._incoming if keep is None else keep
        if self._step is not None:
            fresh = self._step[:, :, :, :keep]
        else:
            fresh = self._buffer[:, :, :, self.held : self.held + keep]
        self.held += keep
        self._step, self._incoming = None, 0
        return fresh

    def take_for_packing(self, first: int, last: int) -> torch.Tensor:
        """Tokens first..last-1 in buffer order: [layers, 2, kv_heads, n, head_dim].

        The caller may overwrite them, so that a prompt's rows need no extra memory, and must drop them next.
        """
        self._overwritten = True
        return self._buffer[:, :, :, first:last]

    def drop(self, first: int, last: int) -> None:
        """Removes tokens first..last-1; later ones move up."""
        self._overwritten = False
        tail = self._buffer[:, :, :, last : self.held].clone()
        self.held -= last - first
        self._buffer[:, :, :, first : self.held] = tail

    def truncate(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens in buffer order; gives back what a long step took beyond the capacity."""
        self.held = min(self.held, tokens)
        if self._buffer.shape[3] > max(self.capacity, self.held):
            self._move(max(self.capacity, self.held), self.residual_dtype)

    def insert(self, at: int, originals: torch.Tensor) -> None:
        """Puts tokens [layers, 2, kv_heads, n, head_dim] before the one at `at`; later ones move back."""
        n = originals.shape[3]
        tail = self._buffer[:, :, :, at : self.held].clone()
        self._move(max(self.capacity, self.held + n), self.residual_dtype)
        self._buffer[:, :, :, at : at + n] = originals
        self._buffer[:, :, :, at + n : self.held + n] = tail
        self.held += n

    def copy(self) -> ResidualWindow:
        """A copy; between steps only."""
        other = ResidualWindow(self._dims, self.capacity, self.dtype, self.residual_dtype, self._device)
        other.held, other._buffer, other._overwritten = self.held, self._buffer.clone(), self._overwritten
        return other

    def close(self) -> None:
        self.held, self._step = 0, None
        self._buffer = self._new(0, self.residual_dtype)

    def _move(self, tokens: int, dtype: torch.dtype) -> None:
        if self._buffer.shape[3] == tokens and self._buffer.dtype == dtype:
            return
        moved = self._new(tokens, dtype)
        moved[:, :, :, : self.held] = self._buffer[:, :, :, : self.held]
        self._buffer = moved

    def _new(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        layers, heads, dim = self._dims
        return torch.empty(layers, 2, heads, tokens, dim, dtype=dtype, device=self._device)
