"""A pretended device: tensors that say they are elsewhere and live in host memory, for machines without a GPU.

While a `PretendedDevice` is entered, torch operations on it compute on the CPU, so results are a CPU's to the bit. What
a GPU would refuse raises: tensors of two devices in one operation, numpy arrays of tensors that are not on the host,
their addresses in the hands of C++. What a GPU would do is counted: kernel launches, copies, and times that the host
waits for the device. Nothing is said about time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("privateuseone", 0)
"""Of the type that torch leaves to others."""


class _Guard(torch._C._acc.DeviceGuard):  # type: ignore[name-defined,misc]
    """Makes the type known to torch's Python functions; there is nothing to switch to."""

    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1  # type: ignore[attr-defined]


_GUARD = _Guard()
torch._C._acc.register_python_privateuseone_device_guard(_GUARD)  # type: ignore[attr-defined]
_MODULE = ModuleType("torch.privateuseone")
vars(_MODULE).update(_lazy_init=lambda: None, _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None)
torch._register_device_module("privateuseone", _MODULE)

_WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "_linalg_check_errors"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
"""Operations whose result's size or value the host has to know."""
_ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass
class Count:
    """What a device was asked to do, by operation; in `places`, but launches, by the line that asked for it."""

    launches: Counter[str] = field(default_factory=Counter)
    copies_in: Counter[str] = field(default_factory=Counter)
    copies_out: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = ("launches", "copies_in", "copies_out", "waits")
        return ", ".join(f"{getattr(self, kind).total()} {kind.replace('_', ' ')}" for kind in kinds)


class OnDevice(torch.Tensor):
    """A tensor of the pretended device; `held` is the tensor on the CPU that has its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    def data_ptr(self) -> int:
        if not _current().addresses:
            raise RuntimeError("the address of a tensor that is not in host memory")
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        """The host reads numbers: here and in the following, which torch does not ask the mode about."""
        _current().note("waits", "tolist")
        return self.held.tolist()

    def item(self) -> Any:
        _current().note("waits", "item")
        return self.held.item()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        return self.item().__index__()  # type: ignore[no-any-return]

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    __array__ = numpy

    def as_subclass(self, cls: type) -> OnDevice:
        """Not of that class: a tensor has one. `QAQCache`'s keys are passed on as they are, see `qaq_cache`."""
        return self.detach()  # type: ignore[return-value]


class PretendedDevice(TorchDispatchMode):
    """The device, while it is entered. One at a time.

    Args:
        addresses: kernels are given addresses. They are of host memory, so emulated kernels can follow them.

    Attributes:
        count: of all that it was asked since `counted` was entered last, or from the beginning.
    """

    now: PretendedDevice | None = None

    def __init__(self, addresses: bool = False) -> None:
        super().__init__()
        self.addresses = addresses
        self.count = Count()

    def __enter__(self) -> PretendedDevice:
        assert PretendedDevice.now is None, "one device at a time"
        PretendedDevice.now = self
        # torch.tensor makes a tensor on the CPU and copies it, where this mode sees it.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        PretendedDevice.now = None

    @contextmanager
    def counted(self) -> Iterator[Count]:
        """Counts anew."""
        self.count = Count()
        yield self.count

    def note(self, kind: str, name: str) -> None:
        """Counts an operation, or the launch of a kernel that is not torch's."""
        getattr(self.count, kind)[name] += 1
        if kind != "launches":
            self.count.places[f"{kind}: {name} at {_place()}"] += 1

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Moves a module here, in place."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    moved = parameter.detach().to(DEVICE)
                    part._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.to(DEVICE)
        return module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation, on the device if one of its tensors is there or its result shall be."""
        tensors = _tensors((*args, *kwargs.values()))
        here = [part for part in tensors if isinstance(part, OnDevice)]
        target = kwargs.get("device")
        if kwargs.get("pin_memory"):  # takes a driver; memory is alike here
            kwargs = {**kwargs, "pin_memory": False}
        onto = bool(here) if target is None else torch.device(target).type == DEVICE.type
        if not here and not onto:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self._check(func, name, args, kwargs, tensors, here, onto)
        given = {key: _mapped(host_tensor, part) for key, part in kwargs.items()}
        if target is not None:
            given["device"] = torch.device("cpu")
        made = func(*_mapped(host_tensor, args), **given)
        if not onto:
            return made
        known = {id(part.held): part for part in here}  # what is written in place stays the tensor that it is
        return _mapped(lambda part: known[id(part)] if id(part) in known else OnDevice(part), made)

    def _check(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Any], here: list[Any], onto: bool
    ) -> None:
        """Counts an operation; raises if it mixes devices."""
        host = [part for part in tensors if not isinstance(part, OnDevice) and part.dim()]
        if name.endswith("_like") or name.startswith("new_"):  # of the same shape and type
            host = []
        if name in ("_to_copy", "copy_"):
            inward = onto if name == "_to_copy" else isinstance(args[0], OnDevice)
            source = args[0] if name == "_to_copy" else args[1]
            if isinstance(source, OnDevice) != inward:
                self.note("copies_in" if inward else "copies_out", name)
                waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
                if waits:
                    self.note("waits", "a copy")
                return
        if name in _INDEXING and isinstance(args[0], OnDevice):
            which = [part for part in args[1] if part is not None]
            if elsewhere := [part for part in which if part.dim() and not isinstance(part, OnDevice)]:
                self.note("copies_in", "indices")
                self.note("waits", "a copy")
                host = [part for part in host if all(part is not other for other in elsewhere)]
            if any(part.dtype in (torch.bool, torch.uint8) for part in which):
                self.note("waits", "a mask")
        if host:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got {[list(part.shape) for part in host]} "
                f"on cpu and {[list(part.shape) for part in here]} on {DEVICE}"
            )
        if name in _WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.note("waits", name)
        if name not in _ALLOCATING and not _is_view(func):
            self.note("launches", name)


@cache
def _is_view(func: Any) -> bool:
    """Whether an operation only describes numbers that are there in another way."""
    returned = [part.alias_info for part in func._schema.returns]
    return func._schema.name == "aten::_unsafe_view" or any(part and not part.is_write for part in returned)


def host_tensor(part: Any) -> Any:
    """The tensor in host memory that has a tensor's numbers; anything else as it is."""
    return part.held if isinstance(part, OnDevice) else part


def _tensors(parts: Any) -> list[torch.Tensor]:
    """The tensors among an operation's arguments, those in lists included."""
    found = []
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, list | tuple):
            found += _tensors(part)
    return found


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], part: Any) -> Any:
    """The same with every tensor changed."""
    if isinstance(part, torch.Tensor):
        return change(part)
    return type(part)(_mapped(change, one) for one in part) if isinstance(part, list | tuple) else part


def _current() -> PretendedDevice:
    assert PretendedDevice.now is not None, "the device is not entered"
    return PretendedDevice.now


def _place() -> str:
    """The innermost line of this project, or of a model, that is being run."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/qaq_core/" in file or "/transformers/models/" in file:
            return f"{file.rsplit('/', 2)[-2]}/{file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
