"""Tables that never change, on other devices than the CPU."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

_COPIES = WeakIdKeyDictionary()


def constant_on(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A table on a device: copied there at its first use alone, since the host waits for every copy.

    Args:
        table: on the CPU. It is not written to any more.
    """
    if table.device == device:
        return table
    copies = _COPIES.setdefault(table, {})
    if device not in copies:
        copies[device] = table.to(device)
    made: torch.Tensor = copies[device]
    return made
