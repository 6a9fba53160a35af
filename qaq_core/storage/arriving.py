"""Numbers on their way from a device to the host."""

from __future__ import annotations

from functools import cache

import torch


class Arriving:
    """A copy to pinned memory that a GPU makes on a stream of its own, behind what was asked of it before.

    Neither the host waits for it, nor what the GPU does next.

    Args:
        numbers: on the device. They may be given back at once.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._held, self._event = numbers, None
        if numbers.device.type == "cpu":
            return
        held = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        if numbers.device.type != "cuda":
            self._held = held.copy_(numbers, non_blocking=True)
            return
        side = _side_stream(numbers.device)
        side.wait_stream(torch.cuda.current_stream(numbers.device))
        with torch.cuda.stream(side):
            self._held = held.copy_(numbers, non_blocking=True)
            self._event = side.record_event()
        numbers.record_stream(side)

    def here(self) -> torch.Tensor:
        """The numbers on the host, when they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._held


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
