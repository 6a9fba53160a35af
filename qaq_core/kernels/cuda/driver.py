"""The CUDA driver, through ctypes: loads the cubins that `build` made, and launches kernels on torch's stream.

It has never run with a GPU. Tests hold it to a library that pretends to be the driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qaq_core.base.errors import KernelError
from qaq_core.kernels.cuda.build import ARCHITECTURES, SOURCES, cubin_name

LIBRARY = "libcuda.so.1"
ALIKE = ("observe", "weave")
"""Kernels that are the same for every head_dim."""
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


def architecture_for(capability: tuple[int, int]) -> str | None:
    """The architecture whose kernels a device of a compute capability runs: its own, or an older one of its kind."""
    major, minor = capability
    kinds = [name for name in ARCHITECTURES if name[3:-1] == str(major) and int(name[-1]) <= minor]
    return kinds[-1] if kinds else None


def missing_kernels(capability: tuple[int, int], folder: Path = SOURCES) -> str | None:
    """Why a device has no compiled kernels, with what to do about it; None if it has."""
    architecture = architecture_for(capability)
    if architecture is None:
        return f"there are no CUDA kernels for compute capability {'.'.join(map(str, capability))}"
    if not (folder / cubin_name(architecture, 64)).exists():
        return "the CUDA kernels are not built: run python -m qaq_core.kernels.cuda.build where there is an nvcc"
    return None


@cache
def load_driver(path: str = LIBRARY) -> Any:
    """The driver's library.

    Raises:
        KernelError: there is none.
    """
    try:
        loaded = ctypes.CDLL(path)
        for name, arguments in _SIGNATURES.items():
            getattr(loaded, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise KernelError(f"the CUDA driver cannot be used: {error}") from None
    return loaded


class DriverLauncher:
    """Launches kernels on a GPU; see `Launcher`.

    Args:
        capability: the device's compute capability.
        stream: gives the stream that kernels go to, by default torch's current one of the device. What torch has put
            there before comes before.
    Raises:
        KernelError: no kernels, or no driver.
    """

    name = "cuda"
    block = 1024
    threads = 128

    def __init__(
        self,
        device: torch.device,
        capability: tuple[int, int] | None = None,
        stream: Callable[[], int] | None = None,
        library: str = LIBRARY,
        folder: Path = SOURCES,
    ) -> None:
        capability = capability or torch.cuda.get_device_capability(device)
        reason = missing_kernels(capability, folder)
        if reason is not None:
            raise KernelError(reason)
        self._architecture, self._folder = str(architecture_for(capability)), folder
        self._driver = load_driver(library)
        self._device = device
        self._stream = stream or (lambda: int(torch.cuda.current_stream(device).cuda_stream))
        self._modules: dict[int, c_void_p] = {}
        self._functions: dict[tuple[str, int], c_void_p] = {}

    def launch(
        self, kernel: str, head_dim: int, grid: tuple[int, int, int], threads: int, args: ctypes.Structure
    ) -> None:
        """Puts a kernel in the stream; it has copied `args` when this returns.

        Raises:
            KernelError: the driver refuses it.
        """
        given = (c_void_p * 1)(ctypes.addressof(args))
        with self._current():
            stream, function = self._stream(), self._function(kernel, head_dim)
            self._call("cuLaunchKernel", function, *grid, threads, 1, 1, 0, stream, given, None)

    def _current(self) -> AbstractContextManager[Any]:
        """While this lasts, the driver's context is the device's: torch's, which has begun."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _function(self, kernel: str, head_dim: int) -> c_void_p:
        if (kernel, head_dim) not in self._functions:
            name = f"qaq_{kernel}" if kernel in ALIKE else f"qaq_{kernel}_{head_dim}"
            found = c_void_p()
            self._call("cuModuleGetFunction", byref(found), self._module(head_dim), name.encode())
            self._functions[kernel, head_dim] = found
        return self._functions[kernel, head_dim]

    def _module(self, head_dim: int) -> c_void_p:
        """A head_dim's kernels, loaded into the context that is current on this thread."""
        if head_dim not in self._modules:
            path = self._folder / cubin_name(self._architecture, head_dim)
            try:
                image = path.read_bytes()
            except OSError as error:
                raise KernelError(f"CUDA kernels for a head_dim of {head_dim} cannot be read: {error}") from None
            module = c_void_p()
            self._call("cuModuleLoadData", byref(module), image)
            self._modules[head_dim] = module
        return self._modules[head_dim]

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._driver, name)(*arguments)
        if result:
            text = c_char_p()
            known = self._driver.cuGetErrorString(result, byref(text)) == 0 and text.value
            raise KernelError(f"{name}: {text.value.decode() if known and text.value else f'CUDA error {result}'}")
