"""Numbers on their way from a device to the host."""

from __future__ import annotations

import torch


class Arriving:
    """A copy that the device makes when it gets there, in its order; the host goes on.

    Args:
        numbers: on the device.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._held, self._event = numbers, None
        if numbers.device.type == "cpu":
            return
        held = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._held = held.copy_(numbers, non_blocking=True)
        if numbers.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    def here(self) -> torch.Tensor:
        """The numbers on the host, when they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._held
